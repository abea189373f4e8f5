"""Merging tensor by tensor: in memory are the file being written and one layer, never base or result."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from posttrain.model.attention import find_decoder
from posttrain.model.certificate import References
from posttrain.model.merge_plan import Stream
from posttrain.model.reward import HEAD, empty_reward_model, has_score_head, library_class
from posttrain.model.shards import Shards, empty_model, find_shards, layer_by_layer, without_weights


@torch.no_grad()
def references(stream: Stream, batch: Mapping[str, Tensor]) -> References:
    """Logits of base + adapter, of the base alone and of the float32 sum, in one pass over the files: each reads a third of the rows.

    Of a reward model the scores at every token, all under the trained head.
    """
    hooks = []
    for path, module in stream.model.named_modules():
        if path in stream.low_rank:
            hooks.append(module.register_forward_hook(_adapted(stream, path)))
        elif path in stream.replaced:
            hooks.append(module.register_forward_hook(_replaced(stream.replaced[path].float())))
    try:
        with layer_by_layer(stream.model, stream.read):
            rows = {name: tensor.repeat(3, 1) for name, tensor in batch.items()}
            found = _answers(stream.model, rows, lambda: stream.replaced[HEAD])
    finally:
        for hook in hooks:
            hook.remove()
    return References(*(part[batch["attention_mask"].bool()].float() for part in found.chunk(3)))


def _answers(model: PreTrainedModel, rows: Mapping[str, Tensor], head: Callable[[], Tensor]) -> Tensor:
    """Logits (rows, T, V), or of a reward model scores (rows, T) under `head` (1, D), which is not asked for otherwise."""
    if not has_score_head(model):
        logits: Tensor = model(**rows, use_cache=False).logits
        return logits
    hidden: Tensor = find_decoder(model)(**rows, use_cache=False).last_hidden_state
    return hidden.float() @ head()[0].float()


def _adapted(stream: Stream, path: str) -> Any:
    """Forward hook: thirds of the rows with the adapter beside the layer, without it, and under the weight that will be written."""
    low_rank, written = stream.low_rank[path], functools.partial(stream.written, f"{path}.weight", torch.float32)

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        first, _, last = args[0].chunk(3)
        beside, alone, _ = output.chunk(3)
        with _Weight(module, written()):
            merged = module.forward(last)
        return torch.cat([low_rank.beside(first, beside, module), alone, merged])

    return hook


def _replaced(weight: Tensor) -> Any:
    """Forward hook: thirds of the rows under the trained weight, under the base's, and again under the trained one."""

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        first, _, last = args[0].chunk(3)
        with _Weight(module, weight):
            return torch.cat([module.forward(first), output.chunk(3)[1], module.forward(last)])

    return hook


def write_stream(stream: Stream, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Config and weights of the result into `folder`, as `save_pretrained` would, a file at a time."""
    model = stream.model
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    pieces = _pieces(stream, dtype)
    shapes = {name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for name, piece in pieces.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, inside in split.filename_to_tensors.items():
        save_file({name: pieces[name].read() for name in inside}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Piece(NamedTuple):
    """A tensor of a file that is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def _pieces(stream: Stream, dtype: torch.dtype) -> dict[str, _Piece]:
    """The result's tensors by the names that the base's files have for them: experts one by one, as they were read."""
    model, shards = stream.model, stream.shards
    names = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in shards or name.removesuffix(".weight") in stream.replaced
    }
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head_name = next(name for name, module in model.named_modules() if module is head) + ".weight"
        names.pop(head_name, None)
        if not stream.tied:
            names[head_name] = head.weight
    pieces = {}
    for name, tensor in names.items():
        kind = stream.dtype(name, dtype) if tensor.is_floating_point() else tensor.dtype
        if name in shards.converted:
            for key in shards.recipes[name].sources:
                pieces[key] = _Piece(shards.stored_shape(key), kind, functools.partial(_cast, shards, key, kind))
        else:
            written = shards.recipes[name].stored_name if name in shards else name
            pieces[written] = _Piece(tuple(tensor.shape), kind, functools.partial(stream.written, name, dtype))
    return pieces


def _cast(shards: Shards, key: str, dtype: torch.dtype) -> Tensor:
    return shards.stored(key).to(dtype)


@torch.no_grad()
def read_back(folder: Path, batch: Mapping[str, Tensor]) -> tuple[Tensor, PreTrainedModel]:
    """Logits (tokens, V) of a written folder, a layer in memory at a time, and the model without its weights."""
    model = empty_model(AutoConfig.from_pretrained(folder))
    return _read(folder, model, batch), model


@torch.no_grad()
def read_scores(folder: Path, batch: Mapping[str, Tensor]) -> tuple[Tensor, PreTrainedModel, type[PreTrainedModel] | None]:
    """The same of a reward model, with its scores (tokens,), and transformers' class that read it, where it has one."""
    config = AutoConfig.from_pretrained(folder)
    model = empty_reward_model(str(folder), config)
    theirs = library_class(model)
    if theirs is not None:
        model = without_weights(lambda: AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
    return _read(folder, model, batch), model, theirs


def _read(folder: Path, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    shards = find_shards(str(folder), model)
    if shards is None:
        raise RuntimeError(f"{folder}: does not hold the weights that its config.json says")
    with layer_by_layer(model, shards.read):
        found = _answers(model, batch, lambda: shards.read(f"{HEAD}.weight"))
    return found[batch["attention_mask"].bool()].float()


def padded(ids: list[Tensor], pad_id: int) -> dict[str, Tensor]:
    """Texts, each (1, T), as one batch padded on the right, so that a layer is read once for all of them."""
    longest = max(text.shape[1] for text in ids)
    rows = [torch.nn.functional.pad(text[0], (0, longest - text.shape[1]), value=pad_id) for text in ids]
    mask = [torch.arange(longest) < text.shape[1] for text in ids]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask).long()}


class _Weight:
    """Another weight in a module for a while."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self.module, self.weight = module, nn.Parameter(weight, requires_grad=False)

    def __enter__(self) -> None:
        self.own, self.module._parameters["weight"] = self.module._parameters["weight"], self.weight

    def __exit__(self, *_: object) -> None:
        self.module._parameters["weight"] = self.own
