"""What a merge makes of a base without loading it: its files, and what a LoRA changes in each weight.

W + alpha/r · B A (arXiv 2106.09685; alpha/√r: 2312.03732), and with DoRA (2402.09353) its rows brought to a length of their own, in
float32. What is not of this form is left to merge.py, which loads the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.model.adapter import FINGERPRINT, check_rope, is_reward_adapter
from posttrain.model.adapter_file import read_adapter_weights
from posttrain.model.embedded import resolve_model
from posttrain.model.reward import HEAD, empty_reward_model, has_score_head
from posttrain.model.shards import Shards, empty_model, find_shards, folder_fingerprint
from posttrain.types import UserError

LENGTHS = "lora_magnitude_vector"  # of DoRA
# What an adapter_config.json may say; anything else that is not empty asks for more than a sum of B A.
PLAIN = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """The matrices of one layer, A (r, in) and B (out, r), and with DoRA the lengths (out,) of its rows."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool  # the layer's weight is (in, out)
    lengths: Tensor | None = None

    def on(self, weight: Tensor) -> Tensor:
        """The sum. `weight`: of the layer, in float32."""
        delta = self.scale * (self.b @ self.a)
        total = weight + (delta.T if self.transposed else delta)
        if self.lengths is None:
            return total
        factor = self._factor(total)
        return total * (factor if self.transposed else factor[:, None])

    def beside(self, x: Tensor, output: Tensor, layer: Any) -> Tensor:
        """The layer's output for `x` with the adapter, the matrices kept apart. `output`: without it."""
        low_rank = self.scale * ((x @ self.a.T) @ self.b.T)
        if self.lengths is None:
            return output + low_rank
        delta = self.scale * (self.b @ self.a)
        factor = self._factor(layer.weight + (delta.T if self.transposed else delta))
        bias = 0 if layer.bias is None else layer.bias
        return factor * (output - bias + low_rank) + bias

    def _factor(self, total: Tensor) -> Tensor:
        """(out,): wanted length of a row by its own."""
        assert self.lengths is not None
        return self.lengths / torch.linalg.norm(total.T if self.transposed else total, dim=1)


@dataclass
class Stream:
    """A base without weights, its files, and what the adapter changes, by the paths of modules."""

    base: str
    adapter: str
    model: PreTrainedModel
    shards: Shards
    low_rank: dict[str, LowRank]
    replaced: dict[str, Tensor]  # weights trained whole
    tied: bool  # head and embedding are one tensor in the result

    @property
    def scores(self) -> bool:
        """Whether it is a reward model."""
        return has_score_head(self.model)

    @property
    def folder(self) -> str:
        """Where the base lies."""
        return resolve_model(self.base)

    @property
    def base_rows(self) -> int:
        """Of the base's embedding, before it grows."""
        return self.shards.shape(_name_of(self.model, self.model.get_input_embeddings()))[0]

    def read(self, name: str) -> Tensor:
        """A weight of the base; a vocabulary that has grown gets rows that are the mean of the old ones."""
        weight = self.shards.read(name)
        missing = self.model.get_parameter_or_buffer(name).shape[0] - weight.shape[0] if weight.ndim == 2 else 0
        if missing > 0:
            mean = weight.float().mean(0).to(weight.dtype)
            weight = torch.cat([weight, mean.expand(missing, -1)])
        return weight

    def dtype(self, name: str, wanted: torch.dtype) -> torch.dtype:
        """What a weight is written in. A score head stays in float32: it is small, and scores are told apart by it."""
        return torch.float32 if self.scores and name == f"{HEAD}.weight" else wanted

    def written(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight of the result."""
        dtype = self.dtype(name, dtype)
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in self.replaced:
            return self._numbers(self.replaced[path].float()).to(dtype).contiguous()
        weight = self.read(name)
        if leaf == "weight" and path in self.low_rank:
            return self._numbers(self.low_rank[path].on(weight.float())).to(dtype).contiguous()
        return weight.to(dtype) if weight.is_floating_point() else weight

    def _numbers(self, weight: Tensor) -> Tensor:
        if not weight.isfinite().all():
            raise UserError(f"--lora_model {self.adapter}: holds weights that are not numbers")
        return weight


def open_stream(base: str, adapter: str, settings: Mapping[str, Any], config: Any, n_tokens: int) -> Stream | str:
    """Everything but the weights of the base; or why the model has to be loaded whole.

    `n_tokens`: of the tokenizer. Raises UserError for an adapter of another base, or one that does not fit.
    """
    odd = sorted(name for name, value in settings.items() if value and name not in PLAIN)
    if odd or settings.get("bias", "none") != "none" or settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return f"the adapter is not a plain LoRA ({', '.join(odd) or 'bias or starting weights of its own'})"
    if getattr(config, "auto_map", None):
        return "the model comes with code of its own"
    scores = is_reward_adapter(dict(settings))
    build = functools.partial(empty_reward_model, base) if scores else empty_model
    model = build(config)
    shards = find_shards(base, model, drawn=frozenset({f"{HEAD}.weight"}) if scores else frozenset())
    if shards is None:
        return "its weights are stored under other names than the model has"
    head = model.get_output_embeddings()
    grown = n_tokens > shards.shape(_name_of(model, model.get_input_embeddings()))[0]
    if not scores and (head is None or (grown and getattr(head, "bias", None) is not None)):
        return "it has no output head" if head is None else "the bias of its output head has to grow"
    check_rope(dict(settings), model, adapter, scaled_since=True)
    _check_base(base, adapter, settings, empty_model(config) if scores else model)
    if grown:
        config.get_text_config().vocab_size = n_tokens
        model = build(config)
    return _with_adapter(Stream(base, adapter, model, shards, {}, {}, False), settings)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    """The name of a module's weight."""
    return next(name for name, parameter in model.named_parameters() if parameter is module.weight)


def _check_base(base: str, adapter: str, settings: Mapping[str, Any], model: PreTrainedModel) -> None:
    expected = (settings.get("auto_mapping") or {}).get(FINGERPRINT)
    actual = folder_fingerprint(base, model) if expected else None
    if expected and actual and expected != actual:
        raise UserError(
            f"{adapter}: was trained on another base ({settings.get('base_model_name_or_path')}) than {base}"
            f" (weights {expected[:8]}, here {actual[:8]})"
        )


def _with_adapter(stream: Stream, settings: Mapping[str, Any]) -> Stream | str:
    """The stream with the adapter's tensors, each held to the module it is for."""
    tensors = {name.removeprefix("base_model.model."): t for name, t in read_adapter_weights(stream.adapter).items()}
    modules = dict(stream.model.named_modules())
    head, embedding = stream.model.get_output_embeddings(), stream.model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for name in sorted(tensors):
        path, part = _target(name)
        module = modules.get(path)
        if module is None or part is None or f"{path}.weight" in stream.shards.converted:
            return f"the adapter changes {name}"
        if part == "whole":
            _check_shape(stream, path, tuple(tensors[name].shape))
            stream.replaced[path] = tensors[name]
        elif part == "lora_A":
            if not isinstance(module, nn.Linear | Conv1D) or (tied and module is head):
                return f"the adapter changes {path}"
            stream.low_rank[path] = _low_rank(stream, path, tensors, settings)
    _check_complete(stream, settings, modules)
    stream.tied = _tied_after(stream, settings, tied, modules)
    return stream


PARTS = ("lora_A.weight", "lora_B.weight", LENGTHS, f"{LENGTHS}.weight")  # of an adapted layer; peft has written both of the last


def _target(name: str) -> tuple[str, str | None]:
    """The module that a tensor of an adapter is for, and which part of it: `whole` where the module is trained as it is, None for what
    is known here not at all."""
    for part in PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part.removesuffix(".weight")
    path, _, leaf = name.rpartition(".")
    return path, "whole" if leaf == "weight" and ".lora_" not in name else None


def _low_rank(stream: Stream, path: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LowRank:
    if f"{path}.lora_B.weight" not in tensors:
        raise UserError(f"{stream.adapter}: lacks weights of the adapter it describes, the first is {path}.lora_B")
    a, b = tensors[f"{path}.lora_A.weight"].float(), tensors[f"{path}.lora_B.weight"].float()
    rank = a.shape[0]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    transposed = isinstance(stream.model.get_submodule(path), Conv1D)
    _check_shape(stream, path, (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1]))
    lengths = tensors.get(f"{path}.{LENGTHS}", tensors.get(f"{path}.{LENGTHS}.weight"))
    if settings.get("use_dora") and lengths is None:
        raise UserError(f"{stream.adapter}: lacks weights of the adapter it describes, the first is {path}.{LENGTHS}")
    return LowRank(a, b, scale, transposed, None if lengths is None else lengths.float())


def _check_shape(stream: Stream, path: str, shape: tuple[int, ...]) -> None:
    expected = tuple(stream.model.get_parameter(f"{path}.weight").shape)
    if shape != expected:
        raise UserError(
            f"{stream.adapter}: does not fit {stream.base} ({path} is {shape} in the adapter, {expected} in the model)"
        )


def _check_complete(stream: Stream, settings: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Raises UserError where a layer that the settings name has no weights in the file."""
    targets = settings.get("target_modules") or []
    for path, module in modules.items():
        named = isinstance(targets, list) and any(path == t or path.endswith(f".{t}") for t in targets)
        if named and isinstance(module, nn.Linear | Conv1D) and path not in stream.low_rank and path not in stream.replaced:
            raise UserError(f"{stream.adapter}: lacks weights of the adapter it describes, the first is {path}.lora_A")
    saved = {HEAD} if stream.scores else set()
    for name in sorted({*(settings.get("modules_to_save") or []), *saved}):
        there = any(path == name or path.endswith(f".{name}") for path in modules)  # peft names heads that a model may not have
        if there and not any(path == name or path.endswith(f".{name}") for path in stream.replaced):
            raise UserError(f"{stream.adapter}: lacks weights of the adapter it describes, the first is {name}")


def _tied_after(stream: Stream, settings: Mapping[str, Any], tied: bool, modules: Mapping[str, nn.Module]) -> bool:
    """Whether head and embedding of the result are one tensor. An adapter that trained only one of a tied pair leaves two."""
    if not tied:
        return False
    paths = {id(module): path for path, module in modules.items()}
    head, embedding = (paths[id(m)] for m in (stream.model.get_output_embeddings(), stream.model.get_input_embeddings()))
    new_head, new_embedding = stream.replaced.get(head), stream.replaced.get(embedding)
    saved = [name.rsplit(".", 1)[-1] for name in settings.get("modules_to_save") or []]
    if new_head is None and new_embedding is None:
        return True
    if new_head is not None and new_embedding is not None:
        same = torch.equal(new_head, new_embedding)
        if same:
            stream.replaced[head] = new_embedding
        return same
    if new_embedding is not None and (settings.get("ensure_weight_tying") or embedding.rsplit(".", 1)[-1] not in saved):
        stream.replaced[head] = new_embedding  # saved because the vocabulary has grown, or tied in training
        return True
    return False
