"""The weights of a model folder one tensor at a time, and a model that runs with one layer of them in memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from posttrain.model.checkpoint import Recipe, recipes
from posttrain.model.embedded import resolve_model
from posttrain.model.rope import forget_lengths

WEIGHTS = "model.safetensors"
SAMPLES = 64  # values of a weight that its hash is made of


@dataclass(frozen=True)
class Shards:
    """Safetensors files. `files`: tensor → file; `recipes`: what each parameter of the model is made of."""

    files: Mapping[str, Path]
    recipes: Mapping[str, Recipe]
    model: PreTrainedModel

    def __contains__(self, name: str) -> bool:
        return name in self.recipes

    @functools.cached_property
    def converted(self) -> frozenset[str]:
        """Parameters that are made of other tensors, and are written as those."""
        return frozenset(name for name, recipe in self.recipes.items() if recipe.converter is not None)

    def read(self, name: str) -> Tensor:
        """A parameter in the type it is stored in."""
        return self.recipes[name].make(self.stored, self.model, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the headers alone."""
        return self.recipes[name].shape(self.stored_shape, self.model, name)

    def stored(self, key: str) -> Tensor:
        """A tensor of the files."""
        tensor: Tensor = _open(self.files[key]).get_tensor(key)
        return tensor

    def stored_shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor of the files."""
        return tuple(_open(self.files[key]).get_slice(key).get_shape())


@functools.lru_cache(maxsize=4)
def _opened(file: Path, _changed: int) -> Any:
    return safe_open(file, "pt")


def _open(file: Path) -> Any:
    return _opened(file, file.stat().st_mtime_ns)


def find_shards(
    name_or_path: str, model: PreTrainedModel, *, with_heads: bool = True, drawn: frozenset[str] = frozenset()
) -> Shards | None:
    """The files of a folder or hub model for a model's parameters; None where it has no safetensors, or of other names or shapes.

    `drawn`: parameters that may be absent (a reward model's head). Other names are those of a tensor that several parameters are cut from.
    """
    try:
        files = _files(resolve_model(name_or_path))
    except SafetensorError:
        return None
    found = Shards(files, recipes(model, files), model)
    needed = dict(model.named_parameters()) if with_heads else _without_heads(model)
    fits = all(
        found.shape(name) == tuple(parameter.shape) if name in found else name in drawn for name, parameter in needed.items()
    )
    return found if fits else None


def _files(folder: str) -> dict[str, Path]:
    def find(name: str) -> Path | None:
        if Path(folder).is_dir():
            return Path(folder, name) if Path(folder, name).is_file() else None
        found = cached_file(
            folder, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        return Path(found) if found else None

    index = find(f"{WEIGHTS}.index.json")
    if index is not None:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {file: find(file) for file in {*places.values()}}
        return {name: path for name, file in places.items() if (path := paths[file]) is not None}
    single = find(WEIGHTS)
    return dict.fromkeys(_open(single).keys(), single) if single is not None else {}


def empty_model(config: Any) -> PreTrainedModel:
    """A causal language model without weights."""
    return without_weights(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def without_weights(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `build` makes, without weights: they are on the meta device, what it computes from its config is not."""
    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()
    forget_lengths(model)
    return model.eval()


def folder_fingerprint(name_or_path: str, model: PreTrainedModel) -> str | None:
    """`base_fingerprint` of a model from its files; None as `find_shards`. `model`: with the right names and shapes, weights or not."""
    shards = find_shards(name_or_path, model, with_heads=False)
    if shards is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(_without_heads(model)):
        update_fingerprint(digest, name, shards.read(name))
    return digest.hexdigest()


def stored_fingerprint(model: PreTrainedModel) -> str | None:
    """The same of a model that was quantised while it was read, reward model or not; None where its files are quantised themselves."""
    config = AutoConfig.from_pretrained(model.name_or_path) if not model.is_custom_code() else None
    if config is None or getattr(config, "quantization_config", None) is not None:
        return None
    return folder_fingerprint(model.name_or_path, empty_model(config))


def _without_heads(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    left_out = heads(model)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in left_out}


def heads(model: PreTrainedModel) -> set[int]:
    """Identities of the weights of embedding and output head, which are no part of a base's fingerprint."""
    return {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}


def update_fingerprint(digest: Any, name: str, weight: Tensor) -> None:
    """Add a weight to a hash: name, shape and values as bfloat16."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.bfloat16).view(torch.int16).cpu()
    digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())


@contextlib.contextmanager
def layer_by_layer(model: PreTrainedModel, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Let a model without weights run: a layer's weights are read as its forward begins, in float32, and let go as it ends."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _read_buffers(model, read)
    hooks = []
    for unit in _units(model):
        owned = [(m, key, p) for m in unit.modules() for key, p in m._parameters.items() if p is not None]

        def load(*_: Any, owned: list[Any] = owned) -> None:
            for module, key, empty in owned:
                module._parameters[key] = nn.Parameter(read(names[id(empty)]).float(), requires_grad=False)

        def let_go(*_: Any, owned: list[Any] = owned) -> None:
            for module, key, empty in owned:
                module._parameters[key] = empty

        hooks += [unit.register_forward_pre_hook(load), unit.register_forward_hook(let_go)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """What is read at once: the elements of the outermost lists of modules (the layers), and what has weights outside of them."""
    layers = {
        f"{path}.{index}" if path else str(index): layer
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+\.", f".{path}.")
        for index, layer in enumerate(module)
    }
    yield from layers.values()
    for path, module in model.named_modules():
        inside = any(path == layer or path.startswith(f"{layer}.") for layer in layers)
        if not inside and any(p is not None for p in module._parameters.values()):
            yield module


def _read_buffers(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Buffers that are part of a model's file (a router's bias, say) are small: all of them, once."""
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                buffer.copy_(read(f"{path}.{key}" if path else key))
