"""FlashAttention-2 and -3 where their packages are installed, and one line that says which attention kernel really runs."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from posttrain.model.attention import unwrap
from posttrain.model.kernels import flash_takes


class Flash(NamedTuple):
    """An installed package: its name for the log, transformers' name for padded rows, and its kernel for packed rows."""

    name: str
    implementation: str
    attend: Callable[..., Tensor]  # called as torch's varlen_attn is


def installed_flash() -> Flash | None:
    """The newest package that transformers finds usable on this machine, or None."""
    for number, available, module in (
        (3, is_flash_attn_3_available, "flash_attn_interface"),
        (2, is_flash_attn_2_available, "flash_attn"),
    ):
        if available():
            kernel = importlib.import_module(module).flash_attn_varlen_func
            return Flash(f"FlashAttention-{number}", f"flash_attention_{number}", functools.partial(attend_flash, kernel))
    return None


def attend_flash(
    kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *lengths: Any, scale: float | None, window_size: tuple[int, int]
) -> Tensor:  # fmt: skip
    """The package's kernel on (tokens, heads, width), causal, the last query at the last key. `lengths` as torch's varlen_attn takes them."""
    output = kernel(query, key, value, *lengths, softmax_scale=scale, causal=True, window_size=window_size)
    attended: Tensor = output[0] if isinstance(output, tuple) else output  # version 3 began by returning the norms, too
    return attended


def use_flash(model: nn.Module, flash: Flash | None, *, packed: bool, device: str, dtype: torch.dtype) -> str:
    """Switch padded rows to the package, if there is one (packed rows got it by `enable_segments`), and say what runs, and why.

    `dtype`: what attention is computed in.
    """
    core = unwrap(model)
    if device != "cuda":
        own = packed and device == "cpu" and not _dropout(core)
        runs = "blocks of queries (our kernel for the CPU)" if own else "SDPA"
        return f"{runs}; FlashAttention needs a CUDA device, and this is {device}"
    why = _misfit(core, dtype)
    if packed:
        if why:
            return f"SDPA, one call per example, because {why}"
        return flash.name if flash else "torch's variable-length flash kernel; no flash-attn package is installed"
    if flash is None:
        return "SDPA, of which torch chooses the kernel; no flash-attn package is installed"
    if not why and not core._supports_flash_attn:
        why = f"{type(core).__name__} does not take it"
    if why:
        return f"SDPA, because {why}"
    core.set_attn_implementation(flash.implementation)
    return f"{flash.name}, padded rows"


def _misfit(core: Any, dtype: torch.dtype) -> str:
    """Why no flash kernel takes what the model computes; "" if one does."""
    config = core.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not flash_takes(width, dtype):
        return f"flash kernels take bfloat16 or float16 (this is {str(dtype).removeprefix('torch.')}) and heads of 8, 16, … 256 (this is {width})"
    return "of attention dropout" if _dropout(core) else ""


def _dropout(core: Any) -> float:
    return getattr(core.config.get_text_config(), "attention_dropout", None) or 0.0
