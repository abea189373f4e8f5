"""Continue a batch of sequences token by token: one forward a token over kept keys and values; rows that have stopped leave the batch."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.model.attention import NAME, unwrap
from posttrain.types import Segment, SegmentTable, UserError

ROOM_TOKENS = 64  # a layer's cache grows by so many tokens at a time
# Rows that have stopped leave when they are this share of the batch, which costs a copy of the cache of those that stay. On the
# embedded model any share up to 1/8 takes the same time; 1/2 takes 8 % more, never leaving 23 % more.
LEAVE_SHARE = 0.125

Choose = Callable[[Tensor, Tensor], Tensor]


class RoomyLayer(DynamicLayer):
    """A layer's keys and values at the beginning of longer buffers: a token more is written, where `DynamicLayer` copies all of them."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._rooms or end > self._rooms[0].shape[-2]:
            self._rooms = [_with_room(self.keys, key_states, end), _with_room(self.values, value_states, end)]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, in new buffers."""
        super().reorder_cache(beam_idx)
        self._rooms = []


def _with_room(kept: Tensor, new: Tensor, end: int) -> Tensor:
    """A buffer for `end` tokens and some more, that begins with what was kept."""
    room = new.new_empty(*new.shape[:2], end + ROOM_TOKENS, new.shape[-1])
    if kept.numel():
        room[:, :, : kept.shape[-2]] = kept
    return room


def left_pad(prompts: Sequence[list[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, T). A 1 in the mask is a real token, whatever its id."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], dtype=torch.long)
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long)
    return ids_BT.to(device), mask_BT.to(device)


def can_continue(model: nn.Module) -> bool:
    """Whether the model's forward keeps keys and values in the cache of transformers that `Continuation` hands it."""
    core = unwrap(model)
    return "past_key_values" in inspect.signature(core.forward).parameters and core._supports_default_dynamic_cache()


class Continuation:
    """Sequences that are being continued, one a row: their cache, their mask and the position of their next token."""

    def __init__(self, model: nn.Module, prompts: Sequence[list[int]], pad_id: int, room_tokens: int) -> None:
        """`room_tokens`: how many tokens will be appended at most."""
        core = unwrap(model)
        accepted = inspect.signature(core.forward).parameters
        self._model = model
        self._takes_positions = "position_ids" in accepted  # without rotary or learned positions (ALiBi) the mask tells them
        self._takes_wanted = "logits_to_keep" in accepted
        self._last = torch.tensor([-1], device=core.device)
        self._cache = DynamicCache(config=core.config)
        self._cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self._cache.layers]
        plain = all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in self._cache.layers)
        self._packs = plain and core.config._attn_implementation == NAME
        self._ids_BT, mask_BT = left_pad(prompts, pad_id, core.device)
        self._mask_BT = F.pad(mask_BT, (0, room_tokens), value=1)
        self._width = mask_BT.shape[1]
        self._next_B = mask_BT.sum(1)
        self.forward_passes = 0
        self.forward_tokens = 0  # with padding and with rows that have stopped: what was computed

    @property
    def layers(self) -> list[Any]:
        """The cache of every layer."""
        return self._cache.layers

    @property
    def mask_BT(self) -> Tensor:  # noqa: N802 - axis suffixes
        """1 for what has been computed of a row, 0 before its prompt."""
        return self._mask_BT[:, : self._width]

    @property
    def takes_positions_and_wanted(self) -> bool:
        """Whether the model's forward has both keywords."""
        return self._takes_positions and self._takes_wanted

    def count(self, n_rows: int) -> None:
        """A step that was taken elsewhere, for so many rows."""
        self.forward_passes += 1
        self.forward_tokens += n_rows

    def release(self) -> None:
        """Let go of the cache, that was copied elsewhere."""
        self._cache.layers = []

    def prefill(self) -> Tensor:
        """Logits (B, V) of the first new token, in float32."""
        mask_BT = self.mask_BT
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        if self._packs:
            return self._prefill_packed(mask_BT.bool(), positions_BT)
        return self._logits(self._ids_BT, self._last, self._cache, attention_mask=mask_BT, **self._positions(positions_BT))[:, 0]

    def append(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) of the token after `tokens_B`, in float32."""
        positions = self._positions(self._next_B[:, None])
        self._next_B = self._next_B + 1
        self._width += 1
        return self._logits(tokens_B[:, None], self._last, self._cache, attention_mask=self.mask_BT, **positions)[:, 0]

    def take(self, rows_B: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken more than once."""
        self._cache.reorder_cache(rows_B)  # the one selection of rows that every kind of layer has
        self._mask_BT, self._next_B = self._mask_BT[rows_B], self._next_B[rows_B]

    def _positions(self, positions_BT: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions_BT} if self._takes_positions else {}

    def _prefill_packed(self, mask_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The prompts as segments of one row: nothing is computed for padding. Their keys and values then go where rows have them."""
        ends = list(itertools.accumulate(mask_BT.sum(1).tolist()))
        table = SegmentTable(tuple(Segment(a, b) for a, b in itertools.pairwise([0, *ends])))
        last = torch.tensor(ends, device=mask_BT.device) - 1
        packed = DynamicCache()
        row = {"position_ids": positions_BT[mask_BT][None], "segments": table}
        logits_BV = self._logits(self._ids_BT[mask_BT][None], last, packed, **row)[0]
        # The token of the row at each place; before a prompt any will do, for the mask hides it.
        token_BT = (mask_BT.flatten().cumsum(0) - 1).clamp(min=0).view_as(mask_BT)
        for layer, from_row in zip(self._cache.layers, packed.layers, strict=True):
            layer.update(*(states[0][:, token_BT].transpose(0, 1) for states in (from_row.keys, from_row.values)))
        return logits_BV

    def _logits(self, ids_BT: Tensor, wanted: Tensor, cache: DynamicCache, **inputs: Any) -> Tensor:
        """Logits (B, wanted, V) at the positions `wanted`, in float32.

        Their index copies them. A slice of the last ones (`logits_to_keep=1`) is not contiguous, and with a frozen head torch then
        multiplies row by row with as many copies of the vocabulary's matrix as there are rows.
        """
        self.forward_passes += 1
        self.forward_tokens += ids_BT.numel()
        if self._takes_wanted:
            inputs["logits_to_keep"] = wanted
        logits_BTV: Tensor = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, **inputs).logits
        return (logits_BTV if self._takes_wanted else logits_BTV[:, wanted]).float()


def chooser(temperature: float, top_k: int, top_p: float) -> Choose:
    """Logits (B, V) and uniform numbers (B) in [0, 1) → tokens (B). Temperature 0 takes the largest logit.

    Inverse transform sampling: the first token at which the cumulated probability exceeds u. In floating point u·total < total for
    u ≤ 1 - 2⁻⁵³, so that a token of probability 0 is never chosen.
    """
    if temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1)
    warpers: list[Any] = [] if temperature == 1 else [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k > 0 else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def choose(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        for warp in warpers:
            logits_BV = warp(None, logits_BV)
        cumulated_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
        threshold_B = uniform_B * cumulated_BV[:, -1]
        found_B = torch.searchsorted(cumulated_BV, threshold_B[:, None], right=True)[:, 0]
        return found_B.clamp(
            max=logits_BV.shape[-1] - 1
        )  # logits that are no numbers are found out below, not by a device assert

    return choose


def prefilled(batch: Continuation, n_rows: int) -> Tensor:
    """Logits (B, V) of the first new token of `n_rows` rows, prompt-major: every prompt is computed once and its row then repeated."""
    logits_BV = batch.prefill()
    if n_rows == len(logits_BV):
        return logits_BV
    prompt_B = torch.arange(n_rows, device=logits_BV.device) // (n_rows // len(logits_BV))
    batch.take(prompt_B)
    return logits_BV[prompt_B]


def check_numbers(logits_BV: Tensor) -> None:
    """Raises UserError when logits are no numbers."""
    if bool(logits_BV.isnan().any()):
        raise UserError("the model's logits are not numbers any more: training has diverged, lower --learning_rate")


def decode(
    batch: Continuation, logits_BV: Tensor, uniform_BR: Tensor, stop_ids: Sequence[int], choose: Choose
) -> list[list[int]]:
    """New tokens of every row of a prefilled batch, through its first stop token or R of them; `logits_BV` are the first token's.

    Raises UserError when the model's logits are no numbers.
    """
    n_rows, longest = uniform_BR.shape
    device = uniform_BR.device
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    tokens_BR = torch.zeros((n_rows, longest), dtype=torch.long, device=device)
    length_B = torch.zeros(n_rows, dtype=torch.long, device=device)
    stopped_B = torch.zeros(n_rows, dtype=torch.bool, device=device)
    rows_B = torch.arange(n_rows, device=device)  # the rows still in the batch
    for step in range(longest):
        next_B = choose(logits_BV, uniform_BR[rows_B, step])
        tokens_BR[rows_B, step] = next_B
        length_B[rows_B] += (~stopped_B[rows_B]).long()
        stopped_B[rows_B] |= torch.isin(next_B, stops)
        going_B = (~stopped_B[rows_B]).nonzero()[:, 0]
        if len(going_B) == 0 or step + 1 == longest:
            break
        if len(rows_B) - len(going_B) >= LEAVE_SHARE * len(rows_B):
            batch.take(going_B)
            rows_B, next_B = rows_B[going_B], next_B[going_B]
        logits_BV = batch.append(next_B)
    check_numbers(logits_BV)
    return [row[:length] for row, length in zip(tokens_BR.tolist(), length_B.tolist(), strict=True)]
