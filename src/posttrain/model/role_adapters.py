"""The adapters of PPO's roles on one base: added from a folder, copied, made trainable."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from posttrain.model.adapter import read_adapter_config
from posttrain.model.adapter_file import layers_by_name, read_adapter_weights
from posttrain.model.policy_value import POLICY
from posttrain.types import UserError


def add_adapter(model: PeftModel, name: str, folder: str | None, *, trainable: bool) -> nn.Linear | None:
    """Add a copy of a saved adapter under a name (folder None: a new one like the policy's, whose product is zero).

    Returns the score head that a reward adapter brings along, frozen float32, else None. Raises UserError for a folder without
    adapter weights, and for an adapter that is more than low-rank matrices and a score head: the roles share all other weights.
    """
    if folder is None:
        _add(model, name, model.peft_config[POLICY])
        _finish(model, name, trainable)
        return None
    read_adapter_config(folder)
    config = LoraConfig.from_pretrained(folder)
    check_plain(config, folder)
    weights = read_adapter_weights(folder)
    heads = [key for key in weights if key.endswith("score.weight")]
    head = _frozen_head(weights.pop(heads[0])) if heads else None
    try:
        _add(model, name, config)
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (RuntimeError, ValueError) as error:  # other layers, or layers of another size
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{folder}: does not fit the policy's base ({lines[min(1, len(lines) - 1)]})") from error
    if loaded.unexpected_keys:
        raise UserError(f"{folder}: holds weights that the model has no place for, the first is {loaded.unexpected_keys[0]}")
    if lacking := [key for key in loaded.missing_keys if is_of_adapter(key, name)]:
        raise UserError(f"{folder}: lacks weights of the adapter it describes, the first is {lacking[0]}")
    _finish(model, name, trainable)
    return head


def copy_adapter(model: PeftModel, name: str) -> None:
    """Add a frozen copy of the policy's adapter as it is now."""
    _add(model, name, model.peft_config[POLICY])
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in tensors.items():
            if is_of_adapter(key, name):
                parameter.copy_(tensors[key.replace(f".{name}", f".{POLICY}")])
    _finish(model, name, trainable=False)


def check_plain(config: Any, folder: str) -> None:
    """Raises UserError for an adapter with layers that are trained whole, or with biases: all roles would share them."""
    whole = sorted({*(config.modules_to_save or [])} - {"score", "classifier"})
    if whole or config.bias != "none":
        what = f"layers that are trained whole ({', '.join(whole)})" if whole else "trained biases of the base"
        raise UserError(f"{folder}: holds {what}, which the roles of PPO would share; merge it first and name the merged model")


def is_of_adapter(key: str, name: str) -> bool:
    """Whether a parameter is one of an adapter's: `….lora_A.<name>.weight`."""
    return re.search(rf"\.lora_\w+\.{name}(\.|$)", key) is not None


def _add(model: PeftModel, name: str, config: Any) -> None:
    with layers_by_name():
        model.add_adapter(name, _plain_config(config))


def _plain_config(config: Any) -> LoraConfig:
    """The same shape of adapter, new: no modules that are trained whole, no dropout, no start that changes the base."""
    return LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=config.target_modules,
        exclude_modules=config.exclude_modules, target_parameters=config.target_parameters, rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern, layers_to_transform=config.layers_to_transform, layers_pattern=config.layers_pattern,
        use_rslora=config.use_rslora, use_dora=config.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip


def _frozen_head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.float(), requires_grad=False)
    return head


def _finish(model: nn.Module, name: str, trainable: bool) -> None:
    """float32 matrices, trainable or not; and layers may have gained tuners."""
    for key, parameter in model.named_parameters():
        if is_of_adapter(key, name):
            parameter.requires_grad_(trainable)
            parameter.data = parameter.data.float()
    for module in model.modules():
        module.__dict__.pop("_posttrain_tuners", None)


def train_only(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Make exactly these adapters trainable: adding one freezes the others."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_of_adapter(key, name) for name in adapters))
