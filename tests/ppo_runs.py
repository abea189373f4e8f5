"""Runs of ppo through the command line on a tiny model that speaks letters, shared by the tests of PPO."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from ppo_tiny import STOP, letter_tokenizer, save_speaker, write_prompts
from safetensors.torch import load_file
from torch import Tensor

from posttrain.cli import main

__all__ = ["STOP", "letter_tokenizer", "save_speaker", "write_prompts"]
REWARDS = Path(__file__).with_name("ppo_rewards.py")
CLOCK = ("rollout_tokens_per_second", "update_tokens_per_second")

DEFAULTS: dict[str, Any] = {
    "bf16": False, "report_to": "none", "learning_rate": 1e-2, "rollout_batch_size": 8, "mini_batch_size": 4, "max_steps": 3,
    "max_source_length": 64, "max_target_length": 12, "reward_func": f"{REWARDS}:vowels",
}  # fmt: skip


def words(out: Path, **flags: Any) -> list[str]:
    """The command line of a short run; a flag of None is left out."""
    flags = {"output_dir": out, **DEFAULTS, **flags}
    return ["ppo", *(str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value))]


def run(out: Path, **flags: Any) -> Path:
    """A run that must succeed; its folder."""
    assert main(words(out, **flags)) == 0
    return out


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The log of a run, without what the clock says."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK and not k.startswith("seconds_")} for line in found]


def logged(folder: Path, name: str) -> list[float]:
    """All logged values of a metric."""
    return [line[name] for line in lines(folder) if name in line]


def weights(folder: Path) -> Tensor:
    """The trained tensors of policy and value, in a row."""
    policy = next(folder / name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).is_file())
    files = [load_file(file) for file in (policy, folder / "value" / "value.safetensors")]
    return torch.cat([tensor.flatten() for tensors in files for _, tensor in sorted(tensors.items())])


def digest(file: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
