"""Longer context: rotary positions stretched in a config (arXiv 2306.15595, 2309.00071), and how far a model reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from posttrain.types import UserError

RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """Longer context by stretching rotary positions. Without `factor` it is derived from `context_tokens`."""

    kind: RopeKind
    factor: float | None = None
    context_tokens: int | None = None


def scale_rope(config: Any, rope: RopeScaling) -> None:
    """Write RoPE scaling into a config, in place (transformers' `rope_parameters`; sources: its modeling_rope_utils).

    linear, yarn and llama3 stretch from the trained length to `factor` times it; dynamic (NTK) derives its base from the
    length at hand and so keeps `max_position_embeddings`. A config that already has this very scaling is left as it is.
    """
    trained_tokens = getattr(config, "max_position_embeddings", None)
    current = getattr(config, "rope_parameters", None)
    if not current or not trained_tokens:
        raise UserError(f"--rope_scaling {rope.kind}: {config.model_type} has no rotary position embedding")
    labels = getattr(config, "_rope_type_labels", None) or getattr(config, "layer_types", None) or ()
    nested = [kind for kind in current if kind in labels]
    if nested and not current.get("full_attention"):
        raise UserError(
            f"--rope_scaling {rope.kind}: {config.model_type} has rotary settings per layer kind ({', '.join(nested)})"
        )
    target = current["full_attention"] if nested else current
    if target["rope_type"] == rope.kind and rope.factor in (None, target.get("factor")):
        return
    if target["rope_type"] != "default":
        raise UserError(
            f"--rope_scaling {rope.kind}: the model is already scaled ({target['rope_type']}, factor {target.get('factor')});"
            " leave the flag out"
        )
    factor = rope.factor or math.ceil((rope.context_tokens or 0) / trained_tokens)
    if factor <= 1:
        raise UserError(
            f"--rope_scaling {rope.kind}: the model already reads {trained_tokens} tokens; ask for longer rows, or say --rope_factor"
        )
    target |= {"rope_type": rope.kind, "factor": float(factor)}
    if rope.kind in ("yarn", "llama3"):
        target["original_max_position_embeddings"] = trained_tokens
    if rope.kind == "llama3":
        target |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope.kind != "dynamic":
        config.max_position_embeddings = int(trained_tokens * factor)


def rope_scaling(config: Any) -> dict[str, Any] | None:
    """`rope_type` and `factor` of a config (of its full attention, where layer kinds differ); None where nothing is scaled."""
    settings = getattr(config, "rope_parameters", None) or {}
    settings = settings.get("full_attention") or settings
    if settings.get("rope_type", "default") == "default" or "factor" not in settings:
        return None
    return {"rope_type": settings["rope_type"], "factor": float(settings["factor"])}


def own_positions(config: Any) -> int | None:
    """The positions that a model's own code computes and no more (ChatGLM); None for other models."""
    return getattr(config, "seq_length", None) if getattr(config, "auto_map", None) else None


def context_tokens(config: Any) -> int | None:
    """The longest text that a model reads, prompt and answer together; None where its config does not say."""
    longest: int | None = getattr(config, "max_position_embeddings", None) or own_positions(config)
    scaling = rope_scaling(config)
    if longest and scaling and scaling["rope_type"] == "dynamic":
        return int(longest * scaling["factor"])  # its config keeps the trained length, which the base is derived from
    return longest


def forget_lengths(model: nn.Module) -> None:
    """Let dynamic scaling depend on the row at hand alone.

    transformers' rotary module keeps the base of the longest row until one within the trained length comes, so that what a row
    gives would depend on the rows before it: evaluation on training, a resumed run on where it was cut.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == "dynamic" or (isinstance(kinds, dict) and "dynamic" in kinds.values()):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, _args: Any) -> None:
    """Forward pre-hook of a rotary module: as it was made."""
    kinds = module.rope_type
    prefixes = [""] if isinstance(kinds, str) else [f"{layer}_" for layer, kind in kinds.items() if kind == "dynamic"]
    for prefix in prefixes:
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        current: torch.Tensor = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(current.device))
