"""Variants of the tiny model for the flag probes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from conftest import tiny_llama
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.reward import load_reward_model


def other_model(model: Path, folder: Path) -> Path:
    """A copy of the tiny model with other weights and a template that begins every turn with '!'."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tiny_llama(vocab=len(tokenizer), seed=1).save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("\n{{ m['content'] }}", "\n!{{ m['content'] }}")
    assert "!" in tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class CodedConfig(LlamaConfig):
    model_type = "coded"

class CodedForCausalLM(LlamaForCausalLM):
    config_class = CodedConfig

class CodedTokenizer(PreTrainedTokenizerFast):
    pass
"""


def coded_model(model: Path, folder: Path) -> Path:
    """A copy of the tiny model whose config, model and tokenizer classes come with it as code."""
    shutil.copytree(model, folder)
    (folder / "coded.py").write_text(CODE)
    changes: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "coded", "architectures": ["CodedForCausalLM"],
            "auto_map": {"AutoConfig": "coded.CodedConfig", "AutoModelForCausalLM": "coded.CodedForCausalLM"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CodedTokenizer", "auto_map": {"AutoTokenizer": [None, "coded.CodedTokenizer"]},
        },
    }  # fmt: skip
    for name, change in changes.items():
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return folder


def reward_adapter(model: Path, folder: Path, seed: int = 0) -> Path:
    """An untrained reward model's adapter on the tiny model: its head and matrices are random."""
    torch.manual_seed(seed)
    adapted = attach_lora(load_reward_model(str(model), "float32"), Lora())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
