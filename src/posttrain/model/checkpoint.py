"""Which tensors of a checkpoint make which parameter of a model: transformers' own rules, one parameter at a time.

Most are the same tensor under the same name. Others are renamed, and a mixture's experts, stored one by one, are stacked into one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

Read = Callable[[str], Tensor]  # a stored tensor by its name


@dataclass(frozen=True)
class Recipe:
    """What one parameter is made of. Without a converter it is its one source as it is."""

    sources: tuple[str, ...]  # stored tensors
    patterns: tuple[str, ...]  # of the converter, which they match
    converter: WeightConverter | None
    stored_name: str  # what it is written as where it has no converter

    def make(self, read: Read, model: PreTrainedModel, name: str) -> Tensor:
        """The parameter `name` from its stored tensors."""
        if self.converter is None:
            return read(self.sources[0])
        converter = copy.deepcopy(self.converter)
        for pattern, source in zip(self.patterns, self.sources, strict=True):
            converter.add_tensor(name, source, pattern, read(source))
        (made,) = converter.convert(name, model=model, config=model.config).values()
        return made[0] if isinstance(made, list) else made

    def shape(self, shape_of: Callable[[str], tuple[int, ...]], model: PreTrainedModel, name: str) -> tuple[int, ...]:
        """Its shape, from those of the stored tensors."""
        return tuple(self.make(lambda source: torch.empty(shape_of(source), device="meta"), model, name).shape)


def recipes(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Recipe]:
    """By parameter (or saved buffer) of the model. One that is a part of a stored tensor has none."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, wanted = model.base_model_prefix, model.state_dict()
    found: dict[str, list[tuple[str | None, str]]] = {}
    for key in sorted(stored, key=dot_natural_key):  # the order in which experts are stacked
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name in wanted:
            found.setdefault(name, []).append((pattern, key))
    made = {}
    for name, sources in found.items():
        patterns = tuple(pattern for pattern, _ in sources if pattern is not None)
        converter = by_pattern[patterns[0]] if patterns else None
        if converter is not None and len(converter.target_patterns) > 1:
            continue
        keys = tuple(key for _, key in sources)
        # A name that differs by the base's prefix alone is written as the model has it, as `save_pretrained` does.
        same = keys[0].removeprefix(f"{prefix}.") == name.removeprefix(f"{prefix}.")
        made[name] = Recipe(keys, patterns, converter, name if same else keys[0])
    return made
