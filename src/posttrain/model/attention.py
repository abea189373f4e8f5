"""Attention over packed rows: each segment sees its ancestors in full and itself causally.

Registered with transformers under the name `posttrain_segments`. A model's forward then takes `segments=SegmentTable` and computes a
packed row (B = 1) without a T×T mask. Without that keyword (generation, a KV cache, padded batches) it is plain SDPA with its usual mask.

Prefix sharing (a prompt and its branches in one row): arXiv 2410.20305.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from posttrain.types import Segment, SegmentTable

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "posttrain_segments"

# An attention of another kind than these keeps state from token to token (state-space, linear, convolution) or mixes them otherwise.
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class Misfit(ValueError):
    """The model asks of its attention what segments cannot give. `enable_segments` turns it into the padded fallback."""


class Locality(NamedTuple):
    """How far back a layer looks: `window_tokens` (itself included) or within blocks of `chunk_tokens`. None: all the way."""

    window_tokens: int | None = None
    chunk_tokens: int | None = None

    def cuts(self, n_visible: int) -> bool:
        """Whether a sequence of `n_visible` tokens loses any pair to it."""
        limit = self.window_tokens or self.chunk_tokens
        return limit is not None and n_visible > limit

    def mask(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """Visible pairs, (n_queries, n_keys) of bool. The queries are the last of the keys (causal, bottom-right)."""
        query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
        key = torch.arange(n_keys, device=device)[None, :]
        visible = key <= query
        if self.window_tokens is not None:
            visible &= key > query - self.window_tokens
        if self.chunk_tokens is not None:
            visible &= key // self.chunk_tokens == query // self.chunk_tokens
        return visible


def layer_locality(module: nn.Module, sliding_window: int | None) -> Locality:
    """The locality of one attention layer, as transformers builds its mask.

    Where the configuration lists `layer_types` they decide; elsewhere the keyword that the layer passes does (Mistral, Phi-3, Starcoder2).
    """
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not layer_types or index is None:
        return Locality(window_tokens=sliding_window)
    kind = layer_types[index]
    if kind == _SLIDING:
        return Locality(window_tokens=sliding_window or getattr(config, "sliding_window", None))
    if kind == _CHUNKED:
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


def segment_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: SegmentTable | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: (B, T, H, D) and no weights. `dropout` is 0 outside training."""
    if segments is None:
        if attention_mask is not None and attention_mask.shape[-2:] == _NO_MASK_SHAPE != (query_BHTD.shape[2], key_BHTD.shape[2]):
            raise Misfit("its layers do not hand the segment table on to attention")
        return sdpa_attention_forward(
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise Misfit(f"its attention uses {name}")
    locality = layer_locality(module, kwargs.get("sliding_window"))
    if query_BHTD.is_cuda and not dropout:
        attend = _varlen_function(query_BHTD, key_BHTD, value_BHTD)
        longest = max(sum(end - start for start, end in visible_runs(segments, i)) for i in range(len(segments.segments)))
        if attend is not None and (locality.chunk_tokens is None or not locality.cuts(longest)):
            return _attend_varlen(attend, query_BHTD, key_BHTD, value_BHTD, segments, scaling, locality), None
    return _attend_each(query_BHTD, key_BHTD, value_BHTD, segments, scaling, locality, dropout), None


def _attend_each(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    table: SegmentTable,
    scaling: float | None,
    locality: Locality,
    dropout: float,
) -> Tensor:
    """One SDPA call per segment. Returns (B, T, H, D)."""
    gqa = query_BHTD.shape[1] != key_BHTD.shape[1]
    outputs_BTHD = []
    for index, segment in enumerate(table.segments):
        runs = visible_runs(table, index)
        query = query_BHTD[:, :, segment.start : segment.end]
        key, value = (torch.cat([x[:, :, start:end] for start, end in runs], 2) for x in (key_BHTD, value_BHTD))
        n_queries, n_keys = query.shape[2], key.shape[2]
        mask = locality.mask(n_queries, n_keys, query.device) if n_queries < n_keys or locality.cuts(n_keys) else None
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        outputs_BTHD.append(output.transpose(1, 2))
    return torch.cat(outputs_BTHD, 1)


def gather_plan(table: SegmentTable) -> tuple[list[int] | None, list[int], list[int]]:
    """What the variable-length kernel needs: the index of every key (None: the row itself) and the cumulated query and key lengths."""
    index: list[int] = []
    ends_query, ends_key = [0], [0]
    for i, segment in enumerate(table.segments):
        for start, end in visible_runs(table, i):
            index.extend(range(start, end))
        ends_query.append(segment.end)
        ends_key.append(len(index))
    return (None if ends_key == ends_query else index), ends_query, ends_key


def _attend_varlen(
    attend: Callable[..., Tensor],
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    table: SegmentTable,
    scaling: float | None,
    locality: Locality,
) -> Tensor:
    """One variable-length flash call (causal, aligned bottom-right). Returns (1, T, H, D)."""
    index, ends_query, ends_key = gather_plan(table)
    query, key, value = (x[0].transpose(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
    device = query.device
    cu_query = torch.tensor(ends_query, dtype=torch.int32, device=device)
    cu_key = cu_query
    if index is not None:
        cu_key = torch.tensor(ends_key, dtype=torch.int32, device=device)
        gather = torch.tensor(index, device=device)
        key, value = key.index_select(0, gather), value.index_select(0, gather)
    max_query, max_key = (max(b - a for a, b in zip(ends[:-1], ends[1:], strict=True)) for ends in (ends_query, ends_key))
    left = -1 if locality.window_tokens is None else locality.window_tokens - 1  # the kernel does not count the token itself
    return attend(query, key, value, cu_query, cu_key, max_query, max_key, scale=scaling, window_size=(left, 0))[None]


def _varlen_function(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> Callable[..., Tensor] | None:
    """`varlen_attn` of torch, or None where it is missing or does not take these tensors."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch < 2.10, or built without flash attention
        return None
    known = inspect.signature(varlen_attn).parameters
    half = all(x.dtype in (torch.bfloat16, torch.float16) for x in (query_BHTD, key_BHTD, value_BHTD))
    head_dim = query_BHTD.shape[-1]
    if "window_size" not in known or not half or head_dim > 256 or head_dim % 8 or value_BHTD.shape[-1] != head_dim:
        return None
    if query_BHTD.shape[1] == key_BHTD.shape[1]:
        return varlen_attn
    if "enable_gqa" in known:
        return lambda *args, **kwargs: varlen_attn(*args, enable_gqa=True, **kwargs)
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]

    def repeated(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return varlen_attn(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), *args, **kwargs)

    return repeated


# Given to the decoder in place of a mask: transformers hands a 4-D mask on as it is, and so neither builds one nor guesses at packing.
_NO_MASK_SHAPE = (0, 0)


def _skip_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the decoder: with segments, no mask is to be built."""
    if kwargs.get("segments") is None:
        return None
    if kwargs.get("attention_mask") is not None:
        raise ValueError("a packed row has no padding: give segments or attention_mask, not both")
    anchor = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    device = anchor.device if isinstance(anchor, Tensor) else None
    return args, {**kwargs, "attention_mask": torch.ones((1, 1, *_NO_MASK_SHAPE), dtype=torch.bool, device=device)}


def register() -> None:
    """Make the attention known to transformers under `NAME`. Safe to call again."""
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


__all__ = ["NAME", "Locality", "Misfit", "Segment", "gather_plan", "layer_locality", "register", "segment_attention", "visible_runs"]
