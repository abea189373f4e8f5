"""The nouns of the project. Each has one meaning everywhere.

Axis legend (suffixes of tensor names; a scalar has none):

    B  rows of a batch              T  tokens of a row (packed: all tokens of the batch, B = 1)
    N  predicted tokens of a batch  S  sequences of a batch (a chat, a document, one branch of a pair)
    P  preference pairs             R  response tokens of a rollout
    V  vocabulary                   D  hidden size               H  attention heads

This file imports no torch at run time, so that `posttrain --help` stays fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Role = Literal["system", "user", "assistant", "tool"]
Stage = Literal["pt", "sft", "rm", "ppo", "dpo"]
Half = Literal["policy", "value"]  # of what PPO trains


class UserError(Exception):
    """A mistake of the user's: reaches the terminal as one line, exit code 2. Anything else is our bug and keeps its traceback."""


class RowError(UserError):
    """A row that cannot be used. `source` is "file:line", `field` the offending key, `reason` what is wrong and what to do."""

    def __init__(self, source: str, field: str, reason: str):
        super().__init__(f"{source}:{field}: {reason}")
        self.source, self.field, self.reason = source, field, reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        """Survives the way between processes, which rebuilds an error from its `args`."""
        return type(self), (self.source, self.field, self.reason)


@dataclass(frozen=True)
class ToolCall:
    """One call of a function by the assistant. `arguments` is the parsed object, never a JSON string."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `trained=False` keeps an assistant turn as context only (OpenAI's `weight: 0`)."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool = True


@dataclass(frozen=True)
class Text:
    """A document for continued pretraining. `source` is "file:line" here and below."""

    text: str
    source: str


@dataclass(frozen=True)
class Chat:
    """A conversation to be learned. `tools` are JSON-schema function descriptions in OpenAI's form."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's next turn (rollouts, generation)."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    # The raw row: columns beside the dialogue, for reward functions. No part of what the prompt is.
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred answer. `margin`: by how much the reward should differ at least (RM)."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    margin: float = 0.0


Example = Text | Chat | Prompt | Pair


@dataclass(frozen=True)
class Segment:
    """A run of tokens [start, end) of a packed row that attends causally to itself and in full to its ancestors."""

    start: int
    end: int
    parent: int | None = None  # index of the parent segment in the table; parents come first


@dataclass(frozen=True)
class SegmentTable:
    """The segments of one packed row: disjoint, ascending, covering it. Host integers, so that no kernel launch waits for the device."""

    segments: tuple[Segment, ...]

    def ancestors(self, index: int) -> list[Segment]:
        """The ancestors of a segment, outermost first: what it sees in full before its own tokens."""
        chain: list[Segment] = []
        parent = self.segments[index].parent
        while parent is not None:
            chain.append(self.segments[parent])
            parent = self.segments[parent].parent
        return chain[::-1]

    def leaves(self) -> list[int]:
        """The segments that nothing continues: each ends one sequence, in order (a document, a chat, one branch of a pair)."""
        parents = {segment.parent for segment in self.segments}
        return [index for index in range(len(self.segments)) if index not in parents]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Packed: a single row (B = 1) of segments, no padding. Padded: B rows and a mask, no segments."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor  # restart at every root segment; a branch goes on where its parent ends
    predict_N: Tensor  # flat index into B·T of the position whose output predicts target n
    targets_N: Tensor  # the token to be predicted
    sequence_N: Tensor  # the sequence (0 … n_sequences - 1) that target n belongs to, ascending
    n_sequences: int
    n_tokens: int  # real tokens, padding not counted
    segments: SegmentTable | None = None
    attention_mask_BT: Tensor | None = None  # 1 = real token; only when padded
    # Per-stage columns. Their names end in their axis: _N (targets), _S (sequences) or _P (pairs: sequences 2p, 2p + 1).
    extras: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {"extras": {k: v.to(device, non_blocking=non_blocking) for k, v in self.extras.items()}}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if hasattr(value, "to"):
                moved[f.name] = value.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (called by the DataLoader's pinning thread)."""
        pinned: dict[str, Any] = {"extras": {k: v.pin_memory() for k, v in self.extras.items()}}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if hasattr(value, "pin_memory"):
                pinned[f.name] = value.pin_memory()
        return dataclasses.replace(self, **pinned)

    def last_S(self) -> Tensor:  # noqa: N802 - an axis suffix
        """Flat index into B·T of the last token of every sequence."""
        if self.segments is not None:
            ends = [self.segments.segments[leaf].end - 1 for leaf in self.segments.leaves()]
            return self.input_ids_BT.new_tensor(ends)
        assert self.attention_mask_BT is not None
        n_rows, longest = self.input_ids_BT.shape
        starts = self.input_ids_BT.new_tensor([row * longest for row in range(n_rows)])
        return starts + self.attention_mask_BT.sum(1) - 1

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward that describe the rows."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT, "use_cache": False}
        if self.segments is not None:
            inputs["segments"] = self.segments
        if self.attention_mask_BT is not None:
            inputs["attention_mask"] = self.attention_mask_BT
        return inputs


@dataclass(frozen=True)
class Loss:
    """What an objective returns: sums, so that the update does not depend on how a step is cut into micro-batches and ranks."""

    total: Tensor  # scalar SUM over the micro-batch; the trainer divides by the weight of the whole optimizer step
    # name -> (sum, count), detached. A name that begins with _ is for `Objective.derived` only and is not reported itself.
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """A stage's loss. Pure: its state lives in the trainer, the loop and the run folder."""

    def weight(self, batch: PackedBatch) -> Tensor:
        """What the micro-batch adds to the optimizer step's denominator (tokens or pairs), a scalar."""
        ...

    def __call__(self, model: nn.Module, batch: PackedBatch) -> Loss:
        """The loss of one micro-batch."""
        ...

    def derived(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Metrics of an evaluation that are not averages, from the (sum, count) of all its micro-batches: perplexity, say."""
        ...
