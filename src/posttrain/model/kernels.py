"""The attention function for packed rows: each segment sees its ancestors in full and itself causally. No T×T mask is ever built.

On the CPU blocks of queries (`block_attention`); on CUDA one `torch.nn.attention.varlen` call with keys and values gathered per segment;
elsewhere one SDPA call per segment. Prefix sharing (a prompt and its branches in one row): arXiv 2410.20305.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from posttrain.model.block_attention import BlockAttention, plan_blocks
from posttrain.model.segments import Locality, MisfitError, ShiftedSegments, layer_locality, visible_runs
from posttrain.types import SegmentTable

if TYPE_CHECKING:
    from collections.abc import Callable

# Given to the decoder in place of a mask: transformers hands a 4-D mask on as it is, and so neither builds one nor looks at the positions.
NO_MASK_SHAPE = (1, 1, 0, 0)


class View(NamedTuple):
    """What one segment [start, end) sees: `runs` of tokens, in order, its own last; `mask` is None where plain causal attention does."""

    start: int
    end: int
    runs: list[tuple[int, int]]
    mask: Tensor | None


# A model asks for the same plan in every layer; four entries, for layers that alternate full and sliding, and shifted halves of heads.
@functools.lru_cache(maxsize=4)
def views(table: SegmentTable, locality: Locality, device: torch.device) -> list[View]:
    """The views of all segments of a row."""
    plan = []
    with torch.inference_mode(False):  # a mask made in evaluation must serve in training too
        for index, segment in enumerate(table.segments):
            runs = visible_runs(table, index)
            n_queries, n_keys = segment.end - segment.start, sum(end - start for start, end in runs)
            masked = n_queries < n_keys or locality.cuts(n_keys)
            mask = locality.visible(range(n_keys - n_queries, n_keys), range(n_keys), device) if masked else None
            plan.append(View(segment.start, segment.end, runs, mask))
    return plan


class Gather(NamedTuple):
    """What the variable-length kernel is given: for every key its token in the row (None: the row itself), cumulated lengths, longest."""

    tokens: Tensor | None
    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int


@functools.lru_cache(maxsize=2)
def gather(table: SegmentTable, device: torch.device) -> Gather:
    """Keys and values of every segment one after another: ancestors, then its own (the kernel aligns causality bottom-right)."""
    index: list[int] = []
    ends_query, ends_key = [0], [0]
    for i, segment in enumerate(table.segments):
        for start, end in visible_runs(table, i):
            index.extend(range(start, end))
        ends_query.append(segment.end)
        ends_key.append(len(index))
    max_query, max_key = (max(b - a for a, b in itertools.pairwise(ends)) for ends in (ends_query, ends_key))
    with torch.inference_mode(False):
        cu_query, cu_key = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (ends_query, ends_key))
        same = ends_key == ends_query
        return Gather(None if same else torch.tensor(index, device=device), cu_query, cu_key, max_query, max_key)


def segment_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: (B, T, H, D) and no weights.

    With `segments=SegmentTable` among the keywords it is segment attention (ShiftedSegments: each half of the heads by its table),
    else plain SDPA with the mask given. `dropout` is 0 outside training. Raises MisfitError for what it cannot do.
    """
    table: SegmentTable | ShiftedSegments | None = kwargs.pop("segments", None)
    if table is None:
        if attention_mask is not None and attention_mask.shape == NO_MASK_SHAPE:
            raise MisfitError("its layers do not hand the segment table on to attention")
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise MisfitError(f"its attention uses {name}")
    if isinstance(table, ShiftedSegments):
        halves = halve_heads(query_BHTD, key_BHTD, value_BHTD)
        outputs = [_attend(module, *half, own, kwargs) for half, own in zip(halves, (table.straight, table.shifted), strict=True)]
        return torch.cat(outputs, 2), None
    return _attend(module, query_BHTD, key_BHTD, value_BHTD, table, kwargs), None


def halve_heads(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The first and the second half of the query heads, each with its key heads; where a key head serves both, one for every query head."""
    n_heads, n_groups = query_BHTD.shape[1], key_BHTD.shape[1]
    half = n_heads // 2
    if half * n_groups % n_heads:
        key_BHTD, value_BHTD = (x.repeat_interleave(n_heads // n_groups, 1) for x in (key_BHTD, value_BHTD))
        n_groups = n_heads
    cut = half * n_groups // n_heads
    parts = [(x[:, :n], x[:, n:]) for x, n in ((query_BHTD, half), (key_BHTD, cut), (value_BHTD, cut))]
    return [(parts[0][i], parts[1][i], parts[2][i]) for i in range(2)]


def _attend(
    module: nn.Module, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, table: SegmentTable, options: dict[str, Any]
) -> Tensor:
    """Segment attention by the kernel that takes the tensors. `options`: keywords of the attention function. Returns (B, T, H, D)."""
    locality = layer_locality(module, options.get("sliding_window"))
    scaling, dropout = options.get("scaling"), options.get("dropout", 0.0)
    place = query_BHTD.device.type
    if torch.is_autocast_enabled(place):  # as SDPA does; rotary positions in float32 leave the projections' type
        query_BHTD, key_BHTD, value_BHTD = (x.to(torch.get_autocast_dtype(place)) for x in (query_BHTD, key_BHTD, value_BHTD))
    if query_BHTD.is_cuda and not dropout:
        plan = gather(table, query_BHTD.device)
        attend = _varlen_function(query_BHTD, key_BHTD, value_BHTD, options.get("flash"))
        if attend is not None and (locality.chunk_tokens is None or not locality.cuts(plan.max_key)):
            return attend_varlen(attend, query_BHTD, key_BHTD, value_BHTD, plan, scaling, locality.window_tokens)
    if place == "cpu" and not dropout:
        scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
        plans = plan_blocks(table, locality, query_BHTD.dtype)
        with torch.autocast("cpu", enabled=False):
            output: Tensor = BlockAttention.apply(query_BHTD, key_BHTD, value_BHTD, plans, scale)
            return output
    plan_views = views(table, locality, query_BHTD.device)
    return attend_each(query_BHTD, key_BHTD, value_BHTD, plan_views, scaling, dropout)


def attend_each(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, plan: list[View], scaling: float | None, dropout: float
) -> Tensor:
    """One SDPA call per segment. Returns (B, T, H, D)."""
    gqa = query_BHTD.shape[1] != key_BHTD.shape[1]
    outputs_BTHD = []
    for view in plan:
        query = query_BHTD[:, :, view.start : view.end]
        key, value = (torch.cat([x[:, :, start:end] for start, end in view.runs], 2) for x in (key_BHTD, value_BHTD))
        output = F.scaled_dot_product_attention(
            query, key, value, view.mask, dropout, is_causal=view.mask is None, scale=scaling, enable_gqa=gqa
        )
        outputs_BTHD.append(output.transpose(1, 2))
    return torch.cat(outputs_BTHD, 1)


def attend_varlen(
    attend: Callable[..., Tensor],
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    plan: Gather,
    scaling: float | None,
    window_tokens: int | None,
) -> Tensor:
    """One variable-length flash call for the row. Returns (1, T, H, D)."""
    query, key, value = (x[0].transpose(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
    if plan.tokens is not None:
        key, value = key.index_select(0, plan.tokens), value.index_select(0, plan.tokens)
    left = -1 if window_tokens is None else window_tokens - 1  # the kernel does not count the token itself
    lengths = (plan.cu_query, plan.cu_key, plan.max_query, plan.max_key)
    return attend(query, key, value, *lengths, scale=scaling, window_size=(left, 0))[None]


def flash_takes(width: int, dtype: torch.dtype) -> bool:
    """Whether flash kernels take heads of a width in a type."""
    return dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0


def _varlen_function(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, package: Callable[..., Tensor] | None
) -> Callable[..., Tensor] | None:
    """The variable-length kernel: the package's if one was chosen, else torch's; None where it is missing or does not take these tensors."""
    width = query_BHTD.shape[-1]
    if value_BHTD.shape[-1] != width or not all(flash_takes(width, x.dtype) for x in (query_BHTD, key_BHTD, value_BHTD)):
        return None
    if package is not None:
        return package
    try:
        from torch.nn.attention import varlen
    except ImportError:  # an older torch
        return None
    varlen_attn: Callable[..., Any] = varlen.varlen_attn
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    if groups == 1:
        return varlen_attn
    if "enable_gqa" in known:
        return functools.partial(varlen_attn, enable_gqa=True)

    def repeated(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return varlen_attn(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), *args, **kwargs)

    return repeated
