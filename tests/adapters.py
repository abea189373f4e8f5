"""A base folder, an adapter on it and what they say: for the tests of merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import tiny_llama
from posttrain.model.adapter import Lora, attach_lora
from posttrain.model.load import load_model
from posttrain.model.reward import load_reward_model


def stir(model: Any, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def save_base(folder: Path, tokenizer: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    tiny_llama(vocab=len(tokenizer), **changes).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(base: str, folder: Path, lora: Lora = Lora(), tokenizer: Any = None, scale: float = 0.1) -> str:  # noqa: B008
    adapted = attach_lora(load_model(base, "float32"), lora)
    stir(adapted, scale)
    adapted.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def save_reward_adapter(base: str, folder: Path, lora: Lora = Lora(), scale: float = 0.1, **options: Any) -> str:  # noqa: B008
    torch.manual_seed(11)
    adapted = attach_lora(load_reward_model(base, "float32", **options), lora)
    stir(adapted, scale)
    adapted.save_pretrained(folder)
    return str(folder)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()
