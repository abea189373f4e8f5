"""A pair computed as one prompt with two branches is the pair computed as two sequences: log-probabilities and gradients.

Both sides are float32, the vocabulary small, so that a log-probability has digits left below 1e-6. Measured: the largest absolute
difference of a log-probability (nats), and for every parameter the norm of the difference of its gradients over the norm of the whole
model's gradient (a parameter whose gradient cancels, a key's bias, has no digits of its own to compare). Each is at most 1e-6.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import WINDOW
from families import tiny as tiny_family
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pair_rows import random_pairs
from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart
from posttrain.model import block_attention, fused_functions
from posttrain.model.attention import enable_segments
from posttrain.model.fused import fuse
from posttrain.model.logprobs import install_logprobs
from posttrain.objectives.dpo import Preference
from posttrain.types import PackedBatch

FAMILIES = ["llama", "qwen3", "mistral", "mixtral"]
VOCAB = 12
LIMIT = 1e-6
BETA = 0.1
# (prompt, chosen, rejected): longer and shorter than the window of the sliding layers, and of a single token.
LENGTHS = [(19, 13, 11), (1, 12, 3), (5, 1, 17), (9, 4, 1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks of queries a segment, some of which keep their probabilities, and several blocks of rows a fused module."""
    monkeypatch.setattr(block_attention, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(block_attention, "KEEP_TOKENS", 12)
    monkeypatch.setattr(fused_functions, "BLOCK_ROWS", 16)
    block_attention.plan_blocks.cache_clear()
    yield
    block_attention.plan_blocks.cache_clear()


def tiny(family: str, **changes: Any) -> Any:
    return tiny_family(family, vocab_size=VOCAB, **changes)


def pairs() -> list[dict[str, Any]]:
    longest = 20
    rows = random_pairs(len(LENGTHS), seed=5, prompt=1, answer=1)
    tokens = torch.randint(1, VOCAB, (len(LENGTHS), 3, longest), generator=torch.Generator().manual_seed(6))
    references = -5 * torch.rand(tokens.shape, generator=torch.Generator().manual_seed(7))
    for row, lengths, ids, reference in zip(rows, LENGTHS, tokens, references, strict=True):
        for k, (name, length) in enumerate(zip(("prompt", "chosen", "rejected"), lengths, strict=True)):
            row[f"{name}_ids"] = ids[k, :length].tolist()
            if name != "prompt":
                row[f"reference_{name}"] = reference[k, :length].tolist()
    return rows


def apart(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], float]:
    """Log-probabilities (N), gradients and loss from a plain forward per sequence: logits, softmax, the loss written out."""
    found, losses = [], []
    for row in pairs():
        scores = []
        for name in ("chosen", "rejected"):
            prompt, answer = torch.tensor(row["prompt_ids"]), torch.tensor(row[f"{name}_ids"])
            logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
            found.append(logprobs.detach())
            scores.append((logprobs - torch.tensor(row[f"reference_{name}"])).sum())
        losses.append(-F.logsigmoid(BETA * (scores[0] - scores[1])))
    loss = torch.stack(losses).sum()
    loss.backward()
    return torch.cat(found), gradients(model), float(loss.detach())


def together(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor], float]:
    """The same from one forward of the objective."""
    with torch.no_grad():
        logprobs_N = model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N).logprobs_N
    loss = Preference(beta=BETA)(model, batch).total
    loss.backward()
    return logprobs_N, gradients(model), float(loss.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(got: tuple[Tensor, dict[str, Tensor], float], expected: tuple[Tensor, dict[str, Tensor], float]) -> None:
    assert float((got[0] - expected[0]).abs().max()) <= LIMIT
    assert got[1].keys() == expected[1].keys()
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    assert whole > 0
    for name, gradient in expected[1].items():
        assert float((got[1][name] - gradient).norm() / whole) <= LIMIT, name
    assert abs(got[2] - expected[2]) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_nothing(family: str) -> None:
    model = tiny(family).train()
    expected = apart(model)
    assert enable_segments(model).packed
    assert install_logprobs(model).projection is not None
    shared, twice = collate_pairs(pairs()), collate_pairs_apart(pairs())
    assert shared.n_tokens < twice.n_tokens
    for batch in (shared, twice):
        assert_equal(together(model, batch), expected)
    model.gradient_checkpointing_enable()
    assert_equal(together(model, shared), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_fused_modules(family: str) -> None:
    model = tiny(family).train()
    expected = apart(model)
    assert enable_segments(model).packed
    install_logprobs(model)
    assert "RMS norm" in fuse(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert_equal(together(model, collate_pairs(pairs())), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_adapter(family: str) -> None:
    """What training runs: LoRA over all linears, fused, checkpointed."""
    config = LoraConfig(r=3, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny(family), config).train()
    expected = apart(model)
    assert enable_segments(model).packed
    install_logprobs(model)
    assert "LoRA linear" in fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert_equal(together(model, collate_pairs(pairs())), expected)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_the_window_matters_here(family: str) -> None:
    """The sequences are long enough that a model without its window says something else: so the window was honoured above."""
    assert max(p + max(c, r) for p, c, r in LENGTHS) > 2 * WINDOW
    model = tiny(family)
    free = tiny(family, sliding_window=None)
    free.load_state_dict(copy.deepcopy(model.state_dict()))
    assert float((apart(model)[0] - apart(free)[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_answer_sees_the_other(family: str) -> None:
    """Other tokens in one answer leave the other's log-probabilities bit for bit as they were."""
    model = tiny(family).eval()
    assert enable_segments(model).packed
    install_logprobs(model)
    rows = pairs()
    changed = [{**row, "chosen_ids": [VOCAB - token for token in row["chosen_ids"]]} for row in rows]
    with torch.no_grad():
        one, other = (
            model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N).logprobs_N
            for batch in (collate_pairs(rows), collate_pairs(changed))
        )
    rejected_N = collate_pairs(rows).sequence_N % 2 == 1
    assert torch.equal(one[rejected_N], other[rejected_N])
    assert not torch.equal(one[~rejected_N], other[~rejected_N])
