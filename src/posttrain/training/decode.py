"""Continue a batch of sequences token by token: one forward a token over kept keys and values, rows that have stopped leave the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.model.attention import unwrap

# Leaving costs one copy of the rows that stay, which a step costs as well, and saves their share of every step to come.
LEAVE_SHARE = 0.125

ROOM_TOKENS = 64  # a layer's cache grows by so many tokens at a time

Choose = Callable[[Tensor, Tensor], Tensor]


def fits(core: PreTrainedModel) -> bool:
    """Whether the model's forward keeps keys and values in transformers' cache."""
    return "past_key_values" in inspect.signature(core.forward).parameters and core._supports_default_dynamic_cache()


def left_pad(prompts: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, T); 1 in the mask is a real token, whatever its id."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], dtype=torch.long)
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long)
    return ids_BT.to(device), mask_BT.to(device)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values at the beginning of longer buffers: a token more is written, where `DynamicLayer` copies all of them."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self._rooms or end > self._rooms[0].shape[-2]:
            self._rooms = [_with_room(self.keys, key_states, end), _with_room(self.values, value_states, end)]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in new buffers."""
        super().reorder_cache(beam_idx)
        self._rooms = []


def _with_room(kept: Tensor, new: Tensor, end: int) -> Tensor:
    """A buffer for `end` tokens and some more, that begins with what was kept."""
    room = new.new_empty(*new.shape[:2], end + ROOM_TOKENS, new.shape[-1])
    if kept.numel():
        room[:, :, : kept.shape[-2]] = kept
    return room


class Continuation:
    """Sequences that are being continued, one a row: their cache, their mask and the position of their next token."""

    def __init__(self, model: nn.Module, prompts: Sequence[list[int]], pad_id: int, room_tokens: int) -> None:
        """`room_tokens`: how many tokens will be appended at most."""
        core = unwrap(model)
        accepted = inspect.signature(core.forward).parameters
        self._model = model
        self._takes_positions = "position_ids" in accepted  # ALiBi counts them from the mask
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = DynamicCache(config=core.config)
        self._cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self._cache.layers]
        self._ids_BT, mask_BT = left_pad(prompts, pad_id, core.device)
        self._mask_BT = torch.nn.functional.pad(mask_BT, (0, room_tokens), value=1)
        self._next_B = mask_BT.sum(1)
        self._width = mask_BT.shape[1]

    def prefill(self) -> Tensor:
        """Logits (B, V) of the first new token, in float32."""
        mask_BT = self._mask_BT[:, : self._width]
        return self._forward(self._ids_BT, (mask_BT.cumsum(1) - 1).clamp(min=0))

    def append(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) of the token after `tokens_B`, in float32."""
        positions_BT = self._next_B[:, None]
        self._width += 1
        self._next_B = self._next_B + 1
        return self._forward(tokens_B[:, None], positions_BT)

    def take(self, rows_B: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken more than once."""
        self._cache.reorder_cache(rows_B)  # the one selection that every kind of layer has
        self._mask_BT, self._next_B = self._mask_BT[rows_B], self._next_B[rows_B]

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        positions = {"position_ids": positions_BT} if self._takes_positions else {}
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BT[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
            **positions,
            **self._last_only,
        )
        logits_BV: Tensor = output.logits[:, -1].float()
        return logits_BV


def chooser(temperature: float, top_k: int, top_p: float) -> Choose:
    """Logits (B, V) and uniform numbers (B) in [0, 1) → tokens (B). Temperature 0 takes the largest logit.

    Inverse transform sampling: the first token at which the cumulated probability exceeds u. In float64, u·total < total for every
    u < 1, so that a token of probability 0 is never chosen.
    """
    if temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1)
    warpers: list[Any] = [] if temperature == 1 else [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k > 0 else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def choose(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        for warp in warpers:
            logits_BV = warp(None, logits_BV)
        cumulated_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cumulated_BV, (uniform_B * cumulated_BV[:, -1])[:, None], right=True)[:, 0]

    return choose


def decode(
    batch: Continuation, copies: Tensor | None, uniform_BR: Tensor, stop_ids: Tensor, choose: Choose
) -> tuple[Tensor, Tensor]:
    n_rows, longest = uniform_BR.shape
    tokens_BR = torch.zeros((n_rows, longest), dtype=torch.long, device=uniform_BR.device)
    length_B = torch.zeros(n_rows, dtype=torch.long, device=uniform_BR.device)
    stopped_B = torch.zeros(n_rows, dtype=torch.bool, device=uniform_BR.device)
    logits_BV = batch.prefill()
    if copies is not None:
        batch.take(copies)
        logits_BV = logits_BV[copies]
    rows_B = torch.arange(n_rows, device=uniform_BR.device)
    for step in range(longest):
        next_B = choose(logits_BV, uniform_BR[rows_B, step])
        tokens_BR[rows_B, step] = next_B
        length_B[rows_B] += (~stopped_B[rows_B]).long()
        stopped_B[rows_B] |= torch.isin(next_B, stop_ids)
        going = (~stopped_B[rows_B]).nonzero()[:, 0]
        if len(going) == 0 or step + 1 == longest:
            break
        if len(rows_B) - len(going) >= LEAVE_SHARE * len(rows_B):
            batch.take(going)
            rows_B, next_B = rows_B[going], next_B[going]
        logits_BV = batch.append(next_B)
    return tokens_BR, length_B
