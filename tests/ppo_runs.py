"""Runs of ppo through the command line on a tiny model that speaks letters, shared by the tests of PPO."""

from __future__ import annotations

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import CHATML
from posttrain.cli import main

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
LETTERS = [*string.ascii_lowercase, " ", "\n"]
STOP = SPECIAL.index("<|im_end|>")
REWARDS = Path(__file__).with_name("ppo_rewards.py")
CLOCK = ("rollout_tokens_per_second", "update_tokens_per_second")

DEFAULTS: dict[str, Any] = {
    "bf16": False, "report_to": "none", "learning_rate": 1e-2, "rollout_batch_size": 8, "mini_batch_size": 4, "max_steps": 3,
    "max_source_length": 64, "max_target_length": 12, "reward_func": f"{REWARDS}:vowels",
}  # fmt: skip


def letter_tokenizer(**changes: Any) -> Any:
    """One token a letter, ChatML's marks, and a template."""
    from tokenizers import Tokenizer, decoders, models

    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *LETTERS])}, []))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "model_max_length": 512, **changes}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    made.chat_template = CHATML
    return made


def save_speaker(folder: Path, tokenizer: Any = None, scale: float = 1.0, **changes: Any) -> Path:
    """A random llama of two layers over letters, with its tokenizer. `scale`: of its matrices; large ones make it say more likely things."""
    tokenizer = tokenizer or letter_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": STOP, "pad_token_id": SPECIAL.index("<|pad|>"),
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(file: Path, asked: list[str]) -> Path:
    """Prompts of a user's turn each."""
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in asked))
    return file


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
