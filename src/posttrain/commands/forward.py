"""How the model computes rows: segments or padding, the attention kernel, shifted groups, noise. Each acts or is refused."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from posttrain.commands.report import say
from posttrain.config import Config
from posttrain.model.adapter import adapter_rope
from posttrain.model.attention import Attention, enable_segments, unwrap
from posttrain.model.flash import installed_flash, use_flash
from posttrain.model.noise import install_noise
from posttrain.model.rope import RopeScaling, rope_scaling
from posttrain.model.shifted import install_shift
from posttrain.training.resolve_context import row_tokens
from posttrain.types import UserError


def wanted_rope(config: Config) -> RopeScaling | None:
    """The RoPE scaling that the base is to be loaded with: that of the flags, else that of the adapter that is trained on."""
    kind = config["rope_scaling"] if "rope_scaling" in config.values else None
    factor = config["rope_factor"] if kind else None
    return chosen_rope(RopeScaling(kind, factor, row_tokens(config)) if kind else None, config["peft_path"], "--peft_path")


def chosen_rope(named: RopeScaling | None, adapter: str | None, flag: str) -> RopeScaling | None:
    """What the flags name, else what the adapter says. Raises UserError where they differ. `flag`: what named the adapter."""
    of_adapter = adapter_rope(adapter) if adapter else None
    if named is None or of_adapter is None:
        return named or of_adapter
    if of_adapter.kind != named.kind or named.factor not in (None, of_adapter.factor):
        raise UserError(
            f"--rope_scaling {named.kind}: {flag} {adapter} was trained with {of_adapter.kind}, factor"
            f" {of_adapter.factor:g}; leave the flags out, or merge it first"
        )
    return of_adapter


def say_rope(model: Any) -> None:
    """The stretched positions, in one line, where they are."""
    scaling = rope_scaling(model.config)
    if scaling is not None:
        say(f"rope: {scaling['rope_type']}, factor {scaling['factor']:g}")


def prepare_forward(config: Config, model: Any, args: TrainingArguments) -> bool:
    """Let the model take the stage's rows as the flags say. Returns whether they are packed."""
    flash = installed_flash() if config["flash_attn"] and args.device.type == "cuda" else None
    attention = Attention(packed=False, reason="--padding_free False")
    if config["padding_free"]:
        attention = enable_segments(model, flash.attend if flash else None)
        say(f"rows: {'segments without padding' if attention.packed else 'padded'} ({attention.reason})")
    if config["flash_attn"]:
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else unwrap(model).dtype
        say(f"attention: {use_flash(model, flash, packed=attention.packed, device=args.device.type, dtype=half)}")
    if config.values.get("shift_attn") is not None and config["shift_attn"]:
        group_tokens = config["shift_group_tokens"]
        if reason := install_shift(model, group_tokens, attention):
            raise UserError(f"--shift_attn True: cannot be used with this model: {reason}")
        say(f"shifted attention: training in groups of {group_tokens} tokens, evaluation with full attention")
    if config["neft_alpha"]:
        install_noise(model, config["neft_alpha"])
    return attention.packed
