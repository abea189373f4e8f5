"""What a token of a packed row sees: its segment up to itself, the ancestors in full, and no further back than the layer looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.types import SegmentTable


class MisfitError(ValueError):
    """The model asks of its attention what segments cannot give. Caught at load, where it means padded batches."""


@dataclass(frozen=True)
class ShiftedSegments:
    """What rides through the forward in place of a segment table.

    straight, shifted  the table of the first half of the heads, and of the second: cut into groups
    whole              the row's own table, by which lengths of examples are told
    """

    straight: SegmentTable
    shifted: SegmentTable
    whole: SegmentTable


class Locality(NamedTuple):
    """How far back a layer looks: `window_tokens` (itself included), or within blocks of `chunk_tokens`. None: all the way."""

    window_tokens: int | None = None
    chunk_tokens: int | None = None

    def cuts(self, n_tokens: int) -> bool:
        """Whether a sequence of `n_tokens` has causal pairs that the layer does not see."""
        limit = self.window_tokens or self.chunk_tokens
        return limit is not None and n_tokens > limit

    def visible(self, queries: range, keys: range, device: torch.device) -> Tensor:
        """Visible pairs of positions, (queries, keys) of bool."""
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)[None, :]
        visible = key <= query
        if self.window_tokens is not None:
            visible &= key > query - self.window_tokens
        if self.chunk_tokens is not None:
            visible &= key // self.chunk_tokens == query // self.chunk_tokens
        return visible


def layer_locality(module: nn.Module, sliding_window: int | None) -> Locality:
    """The locality of an attention layer, as transformers builds its mask.

    Where the configuration lists `layer_types` they decide; elsewhere the keyword that the layer passes does (Mistral, Phi-3, Starcoder2).
    """
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not layer_types or index is None:
        return Locality(window_tokens=sliding_window)
    if layer_types[index] == "sliding_attention":
        return Locality(window_tokens=sliding_window or getattr(config, "sliding_window", None))
    if layer_types[index] == "chunked_attention":
        return Locality(chunk_tokens=getattr(config, "attention_chunk_size", None))
    return Locality()


def visible_runs(table: SegmentTable, index: int) -> list[tuple[int, int]]:
    """The token runs [start, end) that a segment sees, in order, its own last; neighbours are joined."""
    runs: list[tuple[int, int]] = []
    for segment in [*table.ancestors(index), table.segments[index]]:
        if runs and runs[-1][1] == segment.start:
            runs[-1] = (runs[-1][0], segment.end)
        else:
            runs.append((segment.start, segment.end))
    return runs
