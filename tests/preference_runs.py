"""Runs of rm and dpo through the command line on the tiny model, shared by the tests of the preference stages."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from posttrain.cli import main

DEFAULTS: dict[str, Any] = {
    "bf16": False, "report_to": "none", "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
    "max_steps": 3, "save_strategy": "no",
}  # fmt: skip
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


@pytest.fixture(scope="module")
def young_garbage() -> Iterator[None]:
    """Runs are short, and the library collects garbage before each: what is alive by now is taken out of that."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pairs(n_pairs: int = 17, animal: str = "fox") -> list[dict[str, Any]]:
    """Pairs with prompts and answers of several lengths; neither answer is always the longer one. An odd number by default."""
    tails = ("", " in the shade of a tree", " and rests", " over the lazy dog in the shade")
    return [
        {
            "conversations": [{"from": "human", "value": f"what is {i}?" + " and then" * (i % 4)}],
            "chosen": f"the quick {animal} number {i}{tails[i % 4]}",
            "rejected": f"no idea what {i} is{tails[i % 3]}",
        }
        for i in range(n_pairs)
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def words(stage: str, out: Path, **flags: Any) -> list[str]:
    """The command line of a short run; a flag of None is left out."""
    flags = {"output_dir": out, **DEFAULTS, **flags}
    return [stage, *(str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value))]


def run(stage: str, out: Path, **flags: Any) -> Path:
    """A run that must succeed; its folder."""
    assert main(words(stage, out, **flags)) == 0
    return out


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without what the clock says."""
    clock = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime_seconds")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in found]


def logged(folder: Path, name: str) -> list[float]:
    """All logged values of a metric."""
    return [line[name] for line in lines(folder) if name in line]


def weights(folder: Path) -> Tensor:
    """The trained tensors of a run, in a row."""
    file = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(file).items())])


def digest(file: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tiny_mixtral(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """A saved random two-layer mixture of four experts, with its tokenizer."""
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512, sliding_window=None,
        pad_token_id=3, bos_token_id=None, eos_token_id=2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
