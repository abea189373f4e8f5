"""A model without its weights: every tensor on the meta device, where it has a shape and takes no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.model.adapter import Lora, attach_lora, read_adapter_config
from posttrain.types import UserError


@dataclass(frozen=True)
class Counts:
    """Weights of a model by where they are."""

    weights: int
    linear: int  # of the layers' linear maps and fused experts
    attention: int  # of the linear maps under a module named attention
    layer: int  # of the largest decoder layer
    head: int  # of an output head that is not the embedding


def skeleton(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a config, on the meta device. Raises UserError for one that cannot be built so."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{config.model_type}: cannot be built without its weights ({reason})") from error
    return model


def count_weights(model: PreTrainedModel) -> Counts:
    """What the model's tensors hold, shared ones once."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    apart = {id(head), id(embedding)}
    own = head is not None and head.weight is not embedding.weight
    linear = attention = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in apart:
            linear += module.weight.numel()
            attention += module.weight.numel() if "attn" in name or "attention" in name else 0
    linear += sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name)
    layers = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
    return Counts(sum(p.numel() for p in model.parameters()), linear, attention, largest, head.weight.numel() if own else 0)


def count_adapter(model: PreTrainedModel, lora: Lora) -> tuple[int, int]:
    """(trained weights of a new adapter, ranks over the maps that it adapts). Changes the model."""
    with torch.device("meta"):
        adapted = attach_lora(model, lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    ranks = sum(p.shape[0] for name, p in adapted.named_parameters() if ".lora_A." in name)
    return trained, ranks


def lora_of(path: str) -> Lora:
    """The shape of a saved adapter."""
    saved = read_adapter_config(path)
    targets = saved.get("target_modules") or "all"
    whole = ",".join(sorted({*(saved.get("modules_to_save") or [])} - {"score", "classifier"})) or None
    names = targets if isinstance(targets, str) else ",".join(targets)
    return Lora(
        int(saved["r"]), float(saved["lora_alpha"]), 0.0, "all" if names == "all-linear" else names, whole,
        bool(saved.get("use_rslora")), bool(saved.get("use_dora")),
    )  # fmt: skip
