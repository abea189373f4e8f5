"""A tiny random model that says different things after different texts, as the tied one of the common fixture does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import tiny_llama


def save_lively(folder: Path, tokenizer: Any) -> str:
    """Untied, and weights large enough that attention and position decide the next token."""
    model = tiny_llama(vocab=len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
