"""Long rows on the real 135M model: perplexity beyond its trained length by RoPE scaling, and shifted attention beside full.

    python benchmarks/long_context.py rope 12288
    python benchmarks/long_context.py shift 1024 2048 4096

The text is Python's own reference (`pydoc_data.topics`), which every installation has. One thread; seconds are those of the processor,
not of the clock, so that other work on the machine does not count.
"""

from __future__ import annotations

import math
import pydoc_data.topics
import sys
import time
from typing import Any

import torch

from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.load import load_model, load_tokenizer
from posttrain.model.logprobs import install_logprobs
from posttrain.model.rope import RopeScaling
from posttrain.model.shifted import install_shift
from posttrain.types import Segment, SegmentTable

MODEL = "smollm2-135m-instruct"
TRAINED_TOKENS = 8192
SCALINGS: list[Any] = ["none", "dynamic", "yarn", "linear", "llama3"]
STEPS = 4
LEARNING_RATE = 5e-4


def text_ids(n_tokens: int, skip_tokens: int = 0) -> torch.Tensor:
    """(1, T) ids of the reference, topics in the order of their names."""
    tokenizer = load_tokenizer(MODEL)
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[: 8 * (n_tokens + skip_tokens)], return_tensors="pt")["input_ids"]
    return ids[:, skip_tokens : skip_tokens + n_tokens]


def nll_nats(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, in one packed row of one segment, (T − 1)."""
    n_tokens = ids.shape[1]
    row = {"position_ids": torch.arange(n_tokens)[None], "segments": SegmentTable((Segment(0, n_tokens),)), "use_cache": False}
    return -model(input_ids=ids, **row, predict_N=torch.arange(n_tokens - 1), targets_N=ids[0, 1:]).logprobs_N


def prepared(model: Any) -> Any:
    """Packed, with log-probs and fused passes, as in training."""
    assert enable_segments(model).packed
    install_logprobs(model)
    fuse(model)
    return model


@torch.no_grad()
def rope(n_tokens: int, kinds: list[str]) -> None:
    """One row longer than the model was trained on: perplexity within the trained length and beyond it, nothing trained."""
    ids = text_ids(n_tokens)
    for kind in kinds:
        model = prepared(load_model(MODEL, "bfloat16", rope=None if kind == "none" else RopeScaling(kind, factor=2))).eval()
        nll = nll_nats(model, ids)
        within, beyond = (math.exp(part.mean()) for part in (nll[: TRAINED_TOKENS - 1], nll[TRAINED_TOKENS - 1 :]))
        print(f"{kind:8} within {within:9.2f}  beyond {beyond:9.2f}", flush=True)


def shift(lengths: list[int]) -> None:
    """A few LoRA steps on rows of a length, full and shifted: tokens a second, and full-attention perplexity of a held-out row after."""
    for n_tokens in lengths:
        held_out, rows = text_ids(n_tokens), text_ids(STEPS * n_tokens, skip_tokens=n_tokens).split(n_tokens, 1)
        for shifted in (False, True):
            torch.manual_seed(0)
            base = load_model(MODEL, "bfloat16")
            attention = enable_segments(base)
            model: Any = prepared(attach_lora(base, Lora()))
            if shifted:
                assert not install_shift(model, n_tokens // 4, attention)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
            seconds = []
            for ids in rows:
                began = time.process_time()
                nll_nats(model.train(), ids).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.process_time() - began)
            with torch.no_grad():
                perplexity = math.exp(nll_nats(model.eval(), held_out).mean())
            name = "shifted" if shifted else "full"
            print(f"{n_tokens:6} {name:8} {n_tokens / min(seconds):6.0f} tokens/s  perplexity {perplexity:.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["rope"]:
        rope(int(sys.argv[2]), sys.argv[3:] or SCALINGS)
    elif sys.argv[1:2] == ["shift"]:
        shift([int(word) for word in sys.argv[2:]])
    else:
        sys.exit(__doc__)
