"""Shifted sparse attention for training on long rows, S²-Attn of LongLoRA (arXiv 2309.12307), as segment tables.

Attention within groups of G tokens; for half of the heads the groups begin G/2 earlier, so that what one half cuts the other joins.
The paper rolls the row by G/2, which puts the last half group in front of the first and lets the first tokens see the last. Here the
two ends are groups of their own (the paper's appendix has that variant), so nothing sees what comes after it. Every example is
grouped by itself, from its own first token; one of at most G tokens is not grouped.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from posttrain.model.attention import Attention, find_decoder, unwrap
from posttrain.model.segments import ShiftedSegments
from posttrain.types import Segment, SegmentTable


@functools.lru_cache(maxsize=1)
def shift_segments(table: SegmentTable, group_tokens: int) -> ShiftedSegments:
    """The two tables of a packed row, and its own."""
    half = group_tokens // 2
    return ShiftedSegments(group_segments(table, group_tokens, 0), group_segments(table, group_tokens, half), table)


def group_segments(table: SegmentTable, group_tokens: int, offset: int) -> SegmentTable:
    """The segments cut where their examples' positions, plus `offset`, are multiples of `group_tokens`.

    A piece that begins in the middle of a group continues the piece before it: in a segment that follows a shared prompt, the
    prompt's last.
    """
    before = _tokens_before(table)
    long = _is_long(table, before, group_tokens)
    pieces: list[Segment] = []
    last: list[int | None] = []  # of each segment its last piece
    for index, segment in enumerate(table.segments):
        previous = None if segment.parent is None else last[segment.parent]
        start = segment.start
        while start < segment.end:
            place = (before[index] + start - segment.start + offset) % group_tokens
            end = min(start + group_tokens - place, segment.end) if long[index] else segment.end
            pieces.append(Segment(start, end, None if long[index] and place == 0 else previous))
            previous, start = len(pieces) - 1, end
        last.append(previous)
    return SegmentTable(tuple(pieces))


def _tokens_before(table: SegmentTable) -> list[int]:
    """Of each segment the tokens of its ancestors."""
    return [sum(ancestor.end - ancestor.start for ancestor in table.ancestors(index)) for index in range(len(table.segments))]


def _is_long(table: SegmentTable, before: list[int], group_tokens: int) -> list[bool]:
    """Of each segment whether an example that begins with the same root is longer than a group."""
    roots: list[int] = []
    found: set[int] = set()
    for index, segment in enumerate(table.segments):
        roots.append(index if segment.parent is None else roots[segment.parent])
        if before[index] + segment.end - segment.start > group_tokens:
            found.add(roots[index])
    return [root in found for root in roots]


def install_shift(model: nn.Module, group_tokens: int, attention: Attention) -> str:
    """Let a model that takes segments (`attention`) attend in shifted groups in training mode. Returns why it cannot; "" if it can.

    In evaluation mode, and so in held-out metrics and in generation, attention stays whole.
    """
    core = unwrap(model)
    if not attention.packed:
        return attention.reason
    if "chunked_attention" in (getattr(core.config.get_text_config(), "layer_types", None) or ()):
        return f"{type(core).__name__} has layers that attend in chunks already"
    find_decoder(core).register_forward_pre_hook(functools.partial(_shift, group_tokens=group_tokens), with_kwargs=True)
    return ""


def _shift(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, group_tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the decoder. The tables are an argument of the layers, which gradient checkpointing replays."""
    table = kwargs.get("segments")
    if not module.training or table is None:
        return None
    return args, {**kwargs, "segments": shift_segments(table, group_tokens)}
