"""Divergence between two policies: estimates from samples, and the controllers of its weight in PPO's reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
MAX_ERROR = 0.2  # the controller's relative error is clipped to ± this (arXiv 1909.08593, §2.2)


def kl_estimate(logprobs_N: Tensor, other_N: Tensor, kind: Estimator) -> Tensor:
    """Per-token estimate of KL(p‖q) in nats, from tokens drawn from p. Source: Schulman, "Approximating KL Divergence", 2020.

    With d = log q − log p:  k1 = −d (unbiased, any sign);  k2 = d²/2 (biased, ≥ 0);  k3 = eᵈ − 1 − d (unbiased, ≥ 0).
    As a *loss*, k3 does not have the gradient of its mean: E_p[∇k3] is the gradient of KL(q‖p), with q fixed.

    logprobs_N: log p of the tokens; other_N: log q of the same tokens; both (N).
    """
    difference_N = other_N - logprobs_N
    if kind == "k1":
        return -difference_N
    if kind == "k2":
        return difference_N.square() / 2
    return torch.expm1(difference_N) - difference_N


class KlController(Protocol):
    """The weight β of the KL penalty: reward = score − β·KL. Its state belongs to a checkpoint."""

    coef: float

    def update(self, kl: float, n_steps: int) -> None:
        """Take in the mean KL of `n_steps` sequences."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        ...


@dataclass
class FixedKl:
    """A constant β."""

    coef: float

    def update(self, kl: float, n_steps: int) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, float]:
        """β, so that a checkpoint tells what it was trained with."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with the saved β."""
        self.coef = state["coef"]


@dataclass
class AdaptiveKl:
    """A β that steers the KL to a target: β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon). Source: arXiv 1909.08593, §2.2.

    n/horizon counts as 1 at most, so that a rollout larger than five horizons cannot turn β negative.
    target: in the unit of the KL given to `update` (nats per sequence).  horizon: in sequences, the unit of `n_steps`.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.horizon > 0):
            raise ValueError(f"target {self.target} and horizon {self.horizon} must be above 0")

    def update(self, kl: float, n_steps: int) -> None:
        """One step of the controller. A KL that is not finite changes nothing: to stop the run is the guards' work."""
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + error * min(n_steps / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """β alone: target and horizon are settings."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with the saved β."""
        self.coef = state["coef"]
