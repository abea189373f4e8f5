"""Tables that a model's own code computes when it is built (rotary positions, ALiBi) and that no file holds.

transformers 5 builds every model on the meta device. Of what is not in the files it then fills only what its own classes know how to
fill: a buffer of other code stays as the memory was, and a tensor kept as a plain attribute stays on the meta device. So the class is
built once more with everything but its parameters in memory, and what it computed is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.model.own_code import is_own_code


def fill_tables(model: PreTrainedModel, missing: set[str]) -> list[str]:
    """Compute what no file of the model holds. `missing`: names that transformers did not find. Returns the names that were filled."""
    modules = dict(model.named_modules())
    if not any(is_own_code(module) for module in modules.values()):
        return []
    wanted = [(path, name) for path, module in modules.items() for name in _unset(module, path, missing)]
    if not wanted:
        return []
    twin = _built_again(model)
    device = next(model.parameters()).device
    for path, name in wanted:
        module = modules[path]
        value = getattr(twin.get_submodule(path), name)
        own = next((p.device for p in module.parameters() if not p.is_meta), device)
        if name in module._buffers:
            module._buffers[name] = value.to(own)
        else:
            setattr(module, name, value.to(own))
    return [f"{path}.{name}".lstrip(".") for path, name in wanted]


def settle_ties(model: PreTrainedModel) -> None:
    """Let a model be saved whose own code lists the names of tied weights, as an older transformers wanted; now they are pairs.

    One that does tie its head is refused at load by transformers, so here there is none.
    """
    for module in model.modules():
        if is_own_code(module) and isinstance(getattr(module, "_tied_weights_keys", None), list):
            module._tied_weights_keys = {}


def _unset(module: nn.Module, path: str, missing: set[str]) -> Iterator[str]:
    """Names of the buffers that no file holds, and of the plain tensors that were left on the meta device."""
    for name, buffer in module._buffers.items():
        if buffer is not None and (name in module._non_persistent_buffers_set or f"{path}.{name}".lstrip(".") in missing):
            yield name
    yield from (name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta)


def _built_again(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config: parameters on the meta device, all else computed. The random state stays."""
    build: Any = type(model)
    with torch.random.fork_rng(devices=[]), _default_dtype(model.config.dtype), init_empty_weights(include_buffers=False):
        twin: PreTrainedModel = build(copy.deepcopy(model.config))
    return twin


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """What transformers sets while it builds a model, which such code reads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
