"""Whether a PPO run should go on: each guard looks at a step's metrics and says in one line why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DRIFTING = ("entropy_nats", "stop_rate", "response_tokens")  # metrics compared with the first steps


@dataclass(frozen=True)
class GuardSettings:
    """When to stop. None switches a guard off. The floors and the factor are relative to the mean of the first steps."""

    kl_target_nats: float | None = None  # of the KL to the reference, in the unit of the metric kl_nats
    kl_factor: float = 2.0  # stop above target × factor
    entropy_floor: float | None = 0.1  # stop below this share of the first steps' entropy: the policy has collapsed
    stop_rate_floor: float | None = 0.5  # stop below this share of the first steps' stop rate: the policy forgets to end
    length_factor: float | None = 4.0  # stop above × this, or below 1/this, of the first steps' response length
    first_steps: int = 5  # steps that make the reference point
    patience_steps: int = 3  # steps in a row that a guard must see; a value that is not finite stops at once

    def __post_init__(self) -> None:
        if self.first_steps < 1 or self.patience_steps < 1:
            raise ValueError("first_steps and patience_steps must be 1 or more")
        if self.length_factor is not None and self.length_factor <= 1:
            raise ValueError(f"length_factor {self.length_factor}: must be above 1")


class Guards:
    """The guards of one run. Reads of a step's metrics: kl_nats, entropy_nats, stop_rate, response_tokens; those that are there.

    All ranks must give the same (reduced) metrics, so that all stop together. Its state belongs to a checkpoint.
    """

    def __init__(self, settings: GuardSettings):
        self._settings = settings
        self._first: dict[str, list[float]] = {name: [] for name in DRIFTING}
        self._strikes: dict[str, int] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Take in the metrics of one step. A line that says why to stop, or None."""
        broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if broken:
            listed = ", ".join(f"{name} = {metrics[name]}" for name in broken)
            return f"stopped at step {step}: not a finite number: {listed}; try a lower --learning_rate or --max_grad_norm"
        reasons = objections(self._settings, metrics, self._reference_point())
        self._strikes = {name: self._strikes.get(name, 0) + 1 for name in reasons}
        for name, seen in self._first.items():
            if name in metrics and len(seen) < self._settings.first_steps:
                seen.append(metrics[name])
        for name, reason in reasons.items():
            if self._strikes[name] >= self._settings.patience_steps:
                return f"stopped at step {step}: {reason} ({self._strikes[name]} steps in a row)"
        return None

    def _reference_point(self) -> dict[str, float]:
        """Means of the first steps, of the metrics for which all of these are known."""
        whole = {name: seen for name, seen in self._first.items() if len(seen) == self._settings.first_steps}
        return {name: sum(seen) / len(seen) for name, seen in whole.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON-ready."""
        return {"first": {name: list(seen) for name, seen in self._first.items()}, "strikes": dict(self._strikes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._first = {name: list(state["first"][name]) for name in DRIFTING}
        self._strikes = dict(state["strikes"])


def objections(settings: GuardSettings, metrics: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """What speaks against one step: guard → sentence. `first`: the means of the first steps; a drift is judged where there is one."""
    found: dict[str, str] = {}
    if settings.kl_target_nats is not None and "kl_nats" in metrics:
        limit = settings.kl_target_nats * settings.kl_factor
        if metrics["kl_nats"] > limit:
            found["kl"] = (
                f"KL to the reference {metrics['kl_nats']:.3g} nats is above {limit:.3g} "
                f"(target {settings.kl_target_nats:.3g} × {settings.kl_factor:.3g})"
            )
    judged = {name: (metrics[name], first[name]) for name in DRIFTING if name in metrics and name in first}
    if "entropy_nats" in judged and settings.entropy_floor is not None:
        now, then = judged["entropy_nats"]
        if now < settings.entropy_floor * then:
            found["entropy"] = f"entropy collapsed to {now:.3g} nats a token from {then:.3g} in the first steps"
    if "stop_rate" in judged and settings.stop_rate_floor is not None:
        now, then = judged["stop_rate"]
        if now < settings.stop_rate_floor * then:
            found["stop_rate"] = f"only {now:.0%} of the responses end in a stop token, {then:.0%} in the first steps"
    if "response_tokens" in judged and settings.length_factor is not None:
        now, then = judged["response_tokens"]
        if now > settings.length_factor * then or now < then / settings.length_factor:
            found["length"] = f"responses have {now:.1f} tokens on average, {then:.1f} in the first steps"
    return found


def early_stop(approx_kl_nats: float, target_kl: float | None, factor: float = 1.5) -> str | None:
    """Why the rest of this rollout's updates should be left out: the policy has moved too far from the one that sampled. Or None.

    approx_kl_nats: mean per token of KL(π_old‖π) over an update, over all ranks.  target_kl: in the same unit, None for no limit.
    """
    if target_kl is None or not approx_kl_nats > factor * target_kl:
        return None
    limit = f"{factor * target_kl:.3g} ({factor:.3g} × --target_kl {target_kl:.3g})"
    return f"the policy moved by {approx_kl_nats:.3g} nats a token since the rollout, more than {limit}: its other updates are left out"
