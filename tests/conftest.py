"""Fixtures: a tiny random model and a tokenizer trained in process. No network, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite(*(file.stem for file in Path(__file__).parent.glob("flag_probes*.py")))

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """Prepared data of a test never meets that of another or of the user. The real model's cache is kept for slow tests."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE of 400 tokens with ChatML's marks; a fresh copy is cheap: use `copy.deepcopy` before changing it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog and rests in the shade of a tree"] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=4096)
    made.chat_template = CHATML
    return made


def tiny_llama(vocab: int = 400, seed: int = 0, **changes: Any) -> Any:
    """A random two-layer llama in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).float()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model with its tokenizer, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_rows(n_rows: int, seed: int = 0, longest: int = 40, vocab: int = 400) -> list[dict[str, Any]]:
    """Rows of random tokens, about half of them trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(n_rows):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(4, vocab, (length,), generator=generator).tolist()
        trained = torch.randint(0, 2, (length,), generator=generator).tolist()
        trained[-1] = 1
        rows.append({"input_ids": ids, "trained": trained, "source": f"random:{index + 1}"})
    return rows
