"""PPO's clipped objective for policy and value (arXiv 1707.06347): one forward, sums over the response tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.objectives.advantages import explained_by_sums, variance_sums
from posttrain.objectives.kl import kl_estimate
from posttrain.types import Half, Loss, PackedBatch, UserError

MAX_LOG_RATIO = 20.0  # e²⁰ is far outside any clip range, and exp does not overflow: 0·∞ in the backward pass would be NaN
VARIANCE_SUMS = ("_return", "_return_squared", "_error", "_error_squared")


@dataclass(frozen=True)
class PpoSettings:
    """The numbers of the loss. None switches a clip off."""

    cliprange: float = 0.2  # ε: the ratio counts within 1 ± ε (arXiv 1707.06347, eq. 7)
    dual_clip: float | None = None  # c > 1: tokens with A < 0 lose at most −c·A (arXiv 1912.09729, eq. 5)
    cliprange_value: float | None = 0.2  # the value counts within ± this of the old value
    vf_coef: float = 0.1  # weight of the value loss
    entropy_coef: float = 0.0  # weight of the entropy bonus
    kl_loss_coef: float = 0.0  # weight of the k3 divergence from the reference, beside the penalty in the reward
    temperature: float = 1.0  # of sampling; the old log-probs were computed with the same

    def __post_init__(self) -> None:
        if not 0 < self.cliprange < 1:
            raise UserError(f"--cliprange {self.cliprange}: must be between 0 and 1 (0.2 is usual)")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"--dual_clip {self.dual_clip}: must be above 1 (3 is usual)")
        if self.cliprange_value is not None and self.cliprange_value <= 0:
            raise UserError(f"--cliprange_value {self.cliprange_value}: must be above 0 (0.2 is usual)")
        for name in ("vf_coef", "entropy_coef", "kl_loss_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be below 0")
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature}: must be above 0")


class PolicyTerms(NamedTuple):
    """Per token: the loss, the ratio, and whether a clip stops its gradient."""

    loss_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor


class ValueTerms(NamedTuple):
    """Per token: the loss, and whether the clipped value is the one that counts."""

    loss_N: Tensor
    clipped_N: Tensor


def policy_terms(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, cliprange: float, dual_clip: float | None = None
) -> PolicyTerms:
    """The clipped surrogate, negated: a loss, to be minimised. All shapes (N).

        r = exp(log π − log π_old)        L = max(−A·r, −A·clip(r, 1 − ε, 1 + ε))        with dual clip, where A < 0: min(L, −c·A)

    A > 0 (better than expected): minimising −A·r raises log π, until r = 1 + ε. A < 0: it lowers log π, until r = 1 − ε.
    At r = 1 the gradient is −A·∇log π.
    """
    ratio_N = (logprobs_N - old_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_N = -advantages_N * ratio_N
    bounded_N = -advantages_N * ratio_N.clamp(1 - cliprange, 1 + cliprange)
    loss_N, clipped_N = torch.maximum(plain_N, bounded_N), bounded_N > plain_N
    if dual_clip is not None:
        capped_N = (advantages_N < 0) & (loss_N > -dual_clip * advantages_N)
        loss_N, clipped_N = torch.where(capped_N, -dual_clip * advantages_N, loss_N), clipped_N | capped_N
    return PolicyTerms(loss_N, ratio_N, clipped_N)


def value_terms(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, cliprange_value: float | None = 0.2) -> ValueTerms:
    """L = ½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²): the worse of the two, so that V moves by ε a rollout. All shapes (N).

    Source: OpenAI baselines' ppo2; without a clip, L = ½·(V − R)².
    """
    error_N = (values_N - returns_N).square()
    if cliprange_value is None:
        return ValueTerms(error_N / 2, torch.zeros_like(error_N, dtype=torch.bool))
    bounded_N = old_values_N + (values_N - old_values_N).clamp(-cliprange_value, cliprange_value)
    bounded_error_N = (bounded_N - returns_N).square()
    return ValueTerms(torch.maximum(error_N, bounded_error_N) / 2, bounded_error_N > error_N)


@dataclass(frozen=True)
class PpoLoss:
    """Σ over response tokens of  policy + vf_coef·value − entropy_coef·H + kl_loss_coef·k3(π, π_ref). Weight unit: response tokens.

    The model's forward takes predict_N, targets_N, temperature, entropy, only and returns logprobs_N, entropy_N and values_N.
    batch.extras: old_logprobs_N, old_values_N, advantages_N, returns_N; reference_N where kl_loss_coef is not 0.
    """

    settings: PpoSettings = PpoSettings()

    def weight(self, batch: PackedBatch) -> Tensor:
        """The number of response tokens."""
        return torch.tensor(batch.targets_N.numel(), device=batch.targets_N.device)

    def __call__(self, model: nn.Module, batch: PackedBatch, only: Half | None = None) -> Loss:
        """The loss of a micro-batch, or `only` its policy's or value's part: they add up. Metrics are sums over tokens; approx_kl_nats is
        k3 of KL(π_old‖π), on tokens of π_old."""
        s = self.settings
        asked: dict[str, Any] = {"predict_N": batch.predict_N, "targets_N": batch.targets_N, "only": only}
        output = model(**batch.model_inputs(), **asked, temperature=s.temperature, entropy=s.entropy_coef > 0)
        halves = []
        if only != "value":
            halves.append(self._policy(output.logprobs_N, output.entropy_N, batch))
        if only != "policy":
            halves.append(self._value(output.values_N, batch))
        return Loss(sum(half.total for half in halves), {name: x for half in halves for name, x in half.metrics.items()})  # type: ignore[arg-type]

    def _policy(self, logprobs_N: Tensor, entropy_N: Tensor | None, batch: PackedBatch) -> Loss:
        s, extras, count = self.settings, batch.extras, self.weight(batch)
        old_logprobs_N = extras["old_logprobs_N"]
        policy = policy_terms(logprobs_N, old_logprobs_N, extras["advantages_N"], s.cliprange, s.dual_clip)
        total = policy.loss_N.sum()
        measured_N = {
            "policy_loss": policy.loss_N,
            "ratio": policy.ratio_N,
            "clip_fraction": policy.clipped_N,
            "approx_kl_nats": kl_estimate(old_logprobs_N, logprobs_N.detach(), "k3"),
        }
        if s.entropy_coef:
            assert entropy_N is not None
            measured_N["loss_entropy_nats"] = entropy_N
            total = total - s.entropy_coef * entropy_N.sum()
        if s.kl_loss_coef:
            divergence_N = kl_estimate(logprobs_N, extras["reference_N"], "k3")
            total = total + s.kl_loss_coef * divergence_N.sum()
            measured_N["kl_loss_nats"] = divergence_N
        return Loss(total, _sums(measured_N, count))

    def _value(self, values_N: Tensor, batch: PackedBatch) -> Loss:
        s, extras, count = self.settings, batch.extras, self.weight(batch)
        value = value_terms(values_N, extras["old_values_N"], extras["returns_N"], s.cliprange_value)
        metrics = _sums({"value_loss": value.loss_N, "value_clip_fraction": value.clipped_N}, count)
        sums = variance_sums(extras["returns_N"], values_N)
        metrics |= {name: (x, count) for name, x in zip(VARIANCE_SUMS, sums, strict=True)}
        return Loss(s.vf_coef * value.loss_N.sum(), metrics)

    def derived(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """explained_variance of the returns by the values; left out where the returns do not vary."""
        explained = explained_by_sums([totals[VARIANCE_SUMS[0]][1], *(totals[name][0] for name in VARIANCE_SUMS)])
        return {} if math.isnan(explained) else {"explained_variance": explained}


def _sums(measured_N: dict[str, Tensor], count: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (x_N.detach().sum(dtype=torch.float64), count) for name, x_N in measured_N.items()}
