"""An adapter's folder without its base: its tensors, safetensors or the older adapter_model.bin, and whose layers their names mean."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft.utils.transformers_weight_conversion as conversion
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from posttrain.types import UserError

WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PACKED = ".parametrizations."  # in the path of what is no layer
RUNS_CODE = f"{OLD_WEIGHTS} holds more than weights, and code from a file is not run"


def check_weights_there(path: str) -> None:
    """Raises UserError for a folder without an adapter's weights."""
    if not any((Path(path) / file).is_file() for file in (WEIGHTS, OLD_WEIGHTS)):
        raise UserError(f"{path}: no {WEIGHTS} (or .bin) in it")


def read_adapter_weights(path: str) -> dict[str, Tensor]:
    """The tensors by peft's names, without running code from the file. Raises UserError where there are none."""
    check_weights_there(path)
    if (Path(path) / WEIGHTS).is_file():
        return load_file(Path(path) / WEIGHTS)
    try:
        weights: dict[str, Tensor] = torch.load(Path(path) / OLD_WEIGHTS, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {RUNS_CODE}") from error
    return weights


def names_single_experts(path: str) -> bool:
    """Whether the tensors are for experts one by one, as they were layers before transformers 5 (…experts.3.w1…)."""
    file = Path(path) / WEIGHTS
    names = safe_open(file, "pt").keys() if file.is_file() else read_adapter_weights(path)
    return any(re.search(r"\.experts\.\d+\.", name) for name in names)


def adapted_layers(path: str) -> set[str]:
    """Names of the layers that the tensors are for, as peft's model calls them."""
    file = Path(path) / WEIGHTS
    names = safe_open(file, "pt").keys() if file.is_file() else read_adapter_weights(path)
    return {name.partition(".lora_A.")[0] for name in names if ".lora_A." in name}


@contextlib.contextmanager
def layers_by_name(unless: bool = False) -> Iterator[None]:
    """Inside, peft puts matrices on the layers that are named.

    For adapters of older models it takes `gate_proj`, `w1` and the like for names of experts, in the models whose experts were such
    layers, and adapts the fused experts; the dense layers and shared experts of the same names, which are there, are left out. And it
    takes what keeps an expert's packed weights (`experts.parametrizations.down_proj`) for a layer. `unless`: it is such an adapter.
    """
    if unless:
        yield
        return
    theirs, changed = conversion.convert_peft_config_for_transformers, []

    def leave_packed(settings: Any, model: nn.Module, **_: Any) -> None:
        if settings.exclude_modules is None and any(PACKED in name for name, _ in model.named_modules()):
            settings.exclude_modules = rf".*{re.escape(PACKED)}.*"
            changed.append(settings)

    conversion.convert_peft_config_for_transformers = leave_packed
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = theirs
        for settings in changed:  # it is of this base, not of the adapter
            settings.exclude_modules = None
