"""What the forecast of a run's memory is made from, and what it consists of: numbers and items, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.types import Stage

# The proof that packing is exact; sampling answers; where the backward pass begins; the optimizer's step.
START, ROLLOUT, BACKWARD, STEP = "start", "rollout", "backward", "step"
TRAINING = (ROLLOUT, BACKWARD, STEP)
ALWAYS = (START, *TRAINING)
EngineKind = Literal["one", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Shape:
    """What a model is made of. Counts are of weights, not bytes; `adapter_weights` is 0 where all weights are trained."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of a mixture: of the experts that a token is sent to, together
    vocabulary: int
    weights: int
    linear_weights: int  # of the layers' linear maps and experts: what quantising takes
    attention_weights: int  # of all layers' attention
    layer_weights: int  # of one layer
    tied: bool
    adapter_weights: int = 0
    adapter_columns: int = 0  # ranks over the adapted maps of one layer: what an adapter keeps for a token


@dataclass(frozen=True)
class Load:
    """What one process computes at once."""

    tokens: int  # of a part: what is forwarded and kept for one backward pass
    targets: int  # of them with a log-prob
    parts: int  # of an optimizer step, on one process
    sequences: tuple[tuple[int, int], ...]  # (queries, keys before them) of every segment of a part
    checkpointing: bool = False
    lengths: int | None = None  # how many lengths of parts the run sees at most; None: very many


@dataclass(frozen=True)
class Rollout:
    """What PPO samples at once on one process."""

    rows: int
    tokens: int  # of a prompt and its answer
    kept_tokens: int = 0  # of one process's prompts and answers, whose states below the value's trained layers are kept


@dataclass(frozen=True)
class Engine:
    """Who holds what: `world` processes, and whether states or weights wait in the host's memory."""

    kind: EngineKind = "one"
    world: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False

    def share(self, sharded: bool) -> int:
        """Over how many processes something is spread."""
        return self.world if sharded else 1


@dataclass(frozen=True)
class Run:
    """All that the arithmetic needs. Types are bytes of one number."""

    stage: Stage
    shape: Shape
    load: Load
    engine: Engine
    weight_bytes: int  # as stored: 2 or 4
    compute_bytes: int  # of the products
    bits: int | None = None  # 4 or 8: the base's linear maps are quantised
    double: bool = False  # with scales in 8 bits
    optimizer: str = "adamw_torch"
    cpu: bool = False
    packed: bool = True
    fused: bool = False  # the CPU's fused functions (those of norms alone on a quantised base)
    liger: bool = False  # CUDA's, with liger-kernel installed
    rollout: Rollout | None = None  # ppo
    value_model: bool = True  # ppo: values by an adapter or a model of their own
    value_layers: int | None = None  # ppo: the layers that train for it, the last ones; None: all
    frozen_copies: int = 0  # ppo: whole models beside the trained one (all weights: the reference)
    frozen_adapters: int = 0  # ppo: reference, reward
    reward_weights: int = 0  # ppo: weights of a reward model in a folder of its own

    @property
    def lora(self) -> bool:
        """Whether the base is frozen."""
        return self.shape.adapter_weights > 0

    @property
    def trained_models(self) -> int:
        """How many sets of weights (adapters, or whole models) are trained, each with a pass of its own."""
        return 2 if self.stage == "ppo" and self.value_model else 1

    @property
    def graphs(self) -> int:
        """How many passes are kept for the backward pass at once. On one process policy and value take turns."""
        return 1 if self.engine.kind == "one" else self.trained_models

    @property
    def trained(self) -> int:
        """Trained weights."""
        shape = self.shape
        one = shape.adapter_weights or shape.weights
        if self.trained_models == 1:
            return one
        frozen = 0 if self.value_layers is None else shape.layers - self.value_layers
        below = frozen * shape.adapter_weights / shape.layers if self.lora else frozen * shape.layer_weights
        embedding = shape.vocabulary * shape.hidden if frozen and not self.lora else 0
        return 2 * one - int(below) - embedding


@dataclass(frozen=True)
class Item:
    """One line: what, how it comes about, bytes on the device, and in which phases. `host_bytes`: in the host's memory instead."""

    name: str
    how: str
    size_bytes: float
    phases: tuple[str, ...] = ALWAYS
    host_bytes: float = 0.0
