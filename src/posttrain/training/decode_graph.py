"""The same continuation with nothing left to the host: a token for all rows is one recorded CUDA graph, replayed.

A decoder's step is over a thousand small kernels, and launching them one by one takes far longer than running them. Here caches, masks
and results lie in buffers of a fixed size and every number that changes from token to token lies on the device, so that the step can be
recorded once for all batches of a rollout. Rows that have stopped stay in the batch: a row less would not make a step cheaper.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from posttrain.model.attention import NAME, unwrap
from posttrain.training.decode import Choose, Continuation, RoomyLayer, check_numbers

logger = logging.getLogger(__name__)

LOOK_EVERY = 8  # tokens between two looks at whether all rows have stopped: a look waits for the device
WARM_UP_STEPS = 2
ALIGNED = 8  # attention kernels want masks of a multiple of this
# Positions of these depend on the longest position so far, which the host would have to know.
HOST_ROPE = {"dynamic", "longrope"}
DEVICES = ("cuda",)  # the step itself runs anywhere, which tests use


class FixedLayer(DynamicLayer):
    """A layer's keys and values in buffers (B, H, L, D); what a token adds goes to the place `cursor` (1) that all layers share."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys_like: Tensor, values_like: Tensor, n_rows: int, room_tokens: int, cursor: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (x.new_zeros(n_rows, x.shape[1], room_tokens, x.shape[-1]) for x in (keys_like, values_like))
        self._cursor = cursor
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, 1, D) and return the whole buffers: the mask knows how far they are filled."""
        self.keys.index_copy_(2, self._cursor, key_states)
        self.values.index_copy_(2, self._cursor, value_states)
        return self.keys, self.values


def can_record(model: nn.Module, batch: Continuation) -> bool:
    """Whether the model's step can be recorded: plain layers whole on one CUDA device, with our attention, which takes the mask as it is."""
    core = unwrap(model)
    rope = getattr(core.config.get_text_config(), "rope_parameters", None) or {}
    ours = core.config._attn_implementation == NAME and batch.takes_positions_and_wanted
    plain = ours and all(type(layer) is RoomyLayer for layer in batch.layers)
    sharded = any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    )
    return core.device.type in DEVICES and plain and not sharded and rope.get("rope_type") not in HOST_ROPE


class FixedStep:
    """A step for as many rows as a batch has, `new_tokens` beyond their prompts; recorded when it is made, on CUDA."""

    def __init__(
        self, model: nn.Module, batch: Continuation, choose: Choose, stop_ids: Sequence[int], new_tokens: int, vocabulary: int
    ) -> None:  # fmt: skip
        """`batch`: the first batch, prefilled; buffers take their sizes, layout and type of it."""
        n_rows, width = batch.mask_BT.shape
        room_tokens = -(-(width + new_tokens) // ALIGNED) * ALIGNED
        core = unwrap(model)
        device = core.device
        self._model, self._choose = model, choose
        self._stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        self._last = torch.tensor([-1], device=device)
        self._cursor, self._step = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self._cache = DynamicCache(config=core.config)
        self._cache.layers = [
            FixedLayer(layer.keys, layer.values, n_rows, room_tokens, self._cursor) for layer in batch.layers
        ]  # fmt: skip
        self._mask_BL = batch.layers[0].keys.new_full((n_rows, 1, 1, room_tokens), -torch.inf)  # added to scores
        self._mask_BL[..., 0] = 0.0
        self._position_B1 = torch.zeros(n_rows, 1, dtype=torch.long, device=device)
        self._logits_BV = torch.zeros(n_rows, vocabulary, device=device)
        self._uniform_BR = torch.zeros(n_rows, new_tokens, dtype=torch.float64, device=device)
        self._tokens_BR = torch.zeros(n_rows, new_tokens, dtype=torch.long, device=device)
        self._length_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self._stopped_B = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self._graph = self._record() if device.type == "cuda" else None

    def takes(self, n_rows: int, width: int, new_tokens: int) -> bool:
        """Whether the buffers hold a batch of so many rows, prompt tokens and new tokens."""
        rows, longest = self._tokens_BR.shape
        return n_rows <= rows and width + new_tokens <= self._mask_BL.shape[-1] and new_tokens == longest

    def run(self, batch: Continuation, logits_BV: Tensor, uniform_BR: Tensor) -> list[list[int]]:
        """New tokens of every row of a prefilled batch, through its first stop token or R of them; `logits_BV` are the first token's."""
        self._load(batch, logits_BV, uniform_BR)
        n_rows, longest = uniform_BR.shape
        for step in range(longest):
            if self._graph is None:
                self._advance()
            else:
                self._graph.replay()
            batch.count(self._tokens_BR.shape[0])
            if (step + 1) % LOOK_EVERY == 0 and bool(self._stopped_B.all()):
                break
        check_numbers(self._logits_BV[:n_rows])
        lengths = self._length_B.tolist()
        return [row[:length] for row, length in zip(self._tokens_BR[:n_rows].tolist(), lengths, strict=False)]

    def _load(self, batch: Continuation, logits_BV: Tensor, uniform_BR: Tensor) -> None:
        """The batch into the first rows; the others count as stopped."""
        n_rows, width = batch.mask_BT.shape
        for layer, filled in zip(self._cache.layers, batch.layers, strict=True):
            layer.keys[:n_rows, :, :width] = filled.keys
            layer.values[:n_rows, :, :width] = filled.values
        batch.release()
        self._mask_BL.fill_(-torch.inf)
        self._mask_BL[n_rows:, ..., 0] = 0.0  # a row that sees nothing would be no number
        self._mask_BL[:n_rows, 0, 0, :width].masked_fill_(batch.mask_BT.bool(), 0.0)
        self._position_B1.fill_(0)
        self._position_B1[:n_rows, 0] = batch.mask_BT.sum(1)
        self._logits_BV[:n_rows] = logits_BV
        self._uniform_BR[:n_rows] = uniform_BR
        self._length_B.fill_(0)
        self._stopped_B.fill_(True)
        self._stopped_B[:n_rows] = False
        self._cursor.fill_(width)
        self._step.fill_(0)

    def _advance(self) -> None:
        """Choose a token for every row, note it, and compute the logits of the next. Reads and writes buffers alone."""
        next_B = self._choose(self._logits_BV, self._uniform_BR.index_select(1, self._step)[:, 0])
        self._tokens_BR.index_copy_(1, self._step, next_B[:, None])
        self._length_B.add_((~self._stopped_B).long())
        self._stopped_B.logical_or_((next_B[:, None] == self._stops).any(1))
        self._mask_BL.index_fill_(3, self._cursor, 0.0)
        output = self._model(
            input_ids=next_B[:, None], position_ids=self._position_B1, attention_mask=self._mask_BL, past_key_values=self._cache,
            use_cache=True, logits_to_keep=self._last,
        )  # fmt: skip
        self._logits_BV.copy_(output.logits[:, 0])
        for counter in (self._position_B1, self._cursor, self._step):
            counter.add_(1)

    def _record(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. What warming up leaves in the buffers is overwritten by the first batch, or masked."""
        outer = torch.cuda.current_stream()
        with torch.cuda.stream(outer):  # comes back to it also when recording fails
            side = torch.cuda.Stream()
            side.wait_stream(outer)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    self._advance()
                    self._step.fill_(0)
            outer.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._advance()
        return graph


class Recorder:
    """Keeps a rollout's recorded step from batch to batch; None where the model's cannot be recorded."""

    def __init__(self, model: nn.Module, choose: Choose, stop_ids: Sequence[int]) -> None:
        self._model, self.choose, self._stop_ids = model, choose, stop_ids
        self._step: FixedStep | None = None
        self._failed = False

    def step(self, batch: Continuation, vocabulary: int, new_tokens: int) -> FixedStep | None:
        """A step that holds the batch."""
        n_rows, width = batch.mask_BT.shape
        if self._failed or not can_record(self._model, batch):
            return None
        if self._step is None or not self._step.takes(n_rows, width, new_tokens):
            self._step = None  # its memory goes before the new one's comes
            try:
                self._step = FixedStep(self._model, batch, self.choose, self._stop_ids, new_tokens, vocabulary)
            except RuntimeError as error:  # what waits for the device; or no room for the longest answers of all rows
                self._failed = True
                reason = str(error).strip().splitlines()[0]
                logger.warning("answers are decoded launch by launch, slower: the model's step cannot be recorded (%s)", reason)
        return self._step
