"""The gradient audit: what should train has a gradient and moves; what should not, does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.types import UserError

AUDIT_STEPS = 3  # the first step has learning rate 0 under warm-up, and LoRA's A has a zero gradient until B has moved


def fingerprint(tensor: Tensor) -> tuple[float, float]:
    """Two sums that change when any element does (up to rounding); cheap, and no copy of the model."""
    values = own_part(tensor).detach().reshape(-1)
    values = values.view(torch.uint8) if not values.is_floating_point() else values
    chunks = values.split(1 << 22)
    total = sum(float(chunk.double().sum()) for chunk in chunks)
    weighted = sum(float((chunk.double() * torch.arange(1, len(chunk) + 1, device=chunk.device)).sum()) for chunk in chunks)
    return total, weighted


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor: its shard under ZeRO-3 and FSDP2, else all of it."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
    return part


class Audit:
    """Compares every parameter before training and after some steps. UserError names what is wrong.

    least_gradient: a trainable tensor must move only if an element of its gradient was above this in a step with a learning rate.
    None: every one must move.
    """

    def __init__(self, least_gradient: float | None = None) -> None:
        self.least_gradient = least_gradient
        self.before: dict[str, tuple[float, float]] = {}
        self.no_gradient: set[str] | None = None  # of the first step
        self.pulled: set[str] = set()  # had a gradient to speak of
        self.steps_with_rate = 0

    def begin(self, model: nn.Module) -> None:
        """Fingerprint every parameter."""
        self.before = {name: fingerprint(p) for name, p in model.named_parameters()}

    def before_step(
        self, model: nn.Module, rate: float, gradient: Callable[[nn.Parameter], Tensor | None] = attrgetter("grad")
    ) -> None:
        """Note the gradients that an optimizer step is about to use. `gradient`: that of a parameter."""
        if not self.before:
            return
        gradients = {name: gradient(p) for name, p in model.named_parameters() if p.requires_grad}
        if self.no_gradient is None:
            self.no_gradient = {name for name, gradient in gradients.items() if gradient is None}
        if rate > 0:
            self.steps_with_rate += 1
            if self.least_gradient is not None:
                largest = {
                    name: float(g.abs().max()) for name, g in gradients.items() if g is not None and name not in self.pulled
                }
                self.pulled |= {name for name, value in largest.items() if value > self.least_gradient}

    def compare(self, model: nn.Module, sharded: bool = False) -> str:
        """What moved since `begin`, in one line. `sharded`: gradients live in the engine's own buffers."""
        moved = {n for n, p in model.named_parameters() if fingerprint(p) != self.before[n]}
        moved = set().union(*gather_object([moved]))  # a tensor may have moved in the part that another process holds
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        frozen = set(self.before) - trainable
        self.before = {}
        if moved & frozen:
            raise UserError(f"gradient audit: {len(moved & frozen)} frozen tensors moved, the first is {min(moved & frozen)}")
        if self.no_gradient and not sharded:
            raise UserError(
                f"gradient audit: {len(self.no_gradient)} trainable tensors got no gradient, the first is"
                f" {min(self.no_gradient)}: it takes no part in the loss; leave it out of --target_modules / --modules_to_save"
            )
        still = trainable - moved if self.least_gradient is None else self.pulled - moved
        enough = self.steps_with_rate >= 2
        if still and enough:
            raise UserError(
                f"gradient audit: {len(still)} trainable tensors did not move, the first is {min(still)}: raise --learning_rate,"
                " or turn the check off with --audit False if steps are meant to be this small"
            )
        text = f"gradient audit: {len(moved)} of {len(trainable)} trainable tensors moved, {len(frozen)} frozen ones did not"
        return text if enough else f"{text} (only {self.steps_with_rate} step(s) had a learning rate above 0)"


class GradientAudit(TrainerCallback):
    """The audit of the shared trainer."""

    def __init__(self) -> None:
        self.audit = Audit()
        self.steps = 0
        self.summary = "gradient audit: not run"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fingerprint every parameter."""
        self.audit.begin(kwargs["model"])

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note trainable parameters without a gradient."""
        self.audit.before_step(kwargs["model"], kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the audit's last step, compare."""
        self.steps += 1
        if self.audit.before and self.steps == AUDIT_STEPS:
            self.summary = self.audit.compare(kwargs["model"], sharded=args.deepspeed is not None)
            if state.is_world_process_zero:
                print(self.summary, file=sys.stderr)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A run too short for the whole audit still checks that nothing frozen moved."""
        if self.audit.before:
            self.summary = self.audit.compare(kwargs["model"], sharded=args.deepspeed is not None)
