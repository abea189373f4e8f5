"""Direct preference optimization and its relatives: log-probs of two answers to one prompt → a loss per pair.

With y_w, y_l the chosen and the rejected answer, s(y) = Σ_t [log π(y_t) − log π_ref(y_t)] (no reference: log π alone), s̄ its mean
over the answer's tokens, Δ = s(y_w) − s(y_l), Δ̄ = s̄(y_w) − s̄(y_l) and ε the label smoothing:

    sigmoid  −(1−ε) log σ(βΔ) − ε log σ(−βΔ)                       arXiv 2305.18290 eq. 7; with ε: conservative DPO
    hinge    max(0, 1 − βΔ)                                        arXiv 2305.10425 (SLiC)
    ipo      (Δ̄ − 1/(2β))²                                         arXiv 2310.12036 eq. 17, per token as its authors ran it
    robust   (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε)            arXiv 2403.00409 eq. 2
    simpo    −(1−ε) log σ(βΔ̄ − γ) − ε log σ(−(βΔ̄ − γ))             arXiv 2405.14734 eq. 6, no reference
    orpo     −mean_t log π(y_w) − β log σ(log odds(y_w) − log odds(y_l)), log odds(y) = s̄ − log(1 − exp s̄)    arXiv 2403.07691

The weight unit is the pair, so `sft_weight` adds the mean −log π over the tokens of each pair's chosen answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.types import Loss, PackedBatch


class DpoLoss(Enum):
    """Which loss. The properties say what it needs."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    ROBUST = "robust"
    SIMPO = "simpo"
    ORPO = "orpo"

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the log-probs of the policy before training."""
        return self not in (DpoLoss.SIMPO, DpoLoss.ORPO)

    @property
    def averages_length(self) -> bool:
        """Whether it compares means over an answer's tokens, not sums."""
        return self in (DpoLoss.IPO, DpoLoss.SIMPO, DpoLoss.ORPO)

    @property
    def takes_smoothing(self) -> bool:
        """Whether label smoothing is defined for it."""
        return self in (DpoLoss.SIGMOID, DpoLoss.ROBUST, DpoLoss.SIMPO)

    @property
    def default_beta(self) -> float:
        """What the papers use: means over tokens are smaller than sums."""
        return 2.0 if self is DpoLoss.SIMPO else 0.1


@dataclass(frozen=True)
class Preference:
    """The objective of the dpo stage. Weight unit: pairs."""

    loss: DpoLoss = DpoLoss.SIGMOID
    beta: float = 0.1
    label_smoothing: float = 0.0  # ε: the share of pairs whose label is taken to be wrong
    sft_weight: float = 0.0
    simpo_gamma: float = 1.0  # the margin that SimPO asks for

    def weight(self, batch: PackedBatch) -> Tensor:
        """The number of pairs."""
        return batch.extras["weight_P"].sum()

    def __call__(self, model: nn.Module, batch: PackedBatch) -> Loss:
        """Σ of the pairs' losses. Metrics in units of reward (β × log-ratio) or nats."""
        output = model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
        logprobs_N: Tensor = output.logprobs_N
        weight_P, weight = batch.extras["weight_P"], self.weight(batch)
        reference_N = batch.extras["reference_N"] if self.loss.needs_reference else torch.zeros_like(logprobs_N)
        count_S = torch.bincount(batch.sequence_N, minlength=batch.n_sequences)
        score_S = _per_sequence(logprobs_N - reference_N, batch)
        if self.loss.averages_length:
            score_S = score_S / count_S
        loss_P = self._pair_loss(score_S[0::2], score_S[1::2])
        logprob_S = _per_sequence(logprobs_N, batch)
        nll_S = -logprob_S / count_S
        nll_P = nll_S[0::2]
        if self.loss is DpoLoss.ORPO:
            loss_P = loss_P + nll_P
        total = ((loss_P + self.sft_weight * nll_P) * weight_P).sum()
        metrics = self._metrics((score_S.detach(), logprob_S.detach(), nll_S.detach()), weight_P)
        if self.loss.needs_reference:
            # k3 (Schulman 2020) of KL(reference ‖ policy) per token, with the data's answers in place of the reference's samples.
            log_ratio_N = (logprobs_N - reference_N).detach()
            token_weight_N = weight_P[batch.sequence_N // 2]
            k3_N = torch.expm1(log_ratio_N) - log_ratio_N
            metrics["kl_nats"] = ((k3_N * token_weight_N).sum(), token_weight_N.sum())
        if output.router_loss is not None:
            metrics["router_loss"] = (output.router_loss.detach() * weight, weight)
            total = total + output.router_loss * weight
        return Loss(total, metrics)

    def _pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """The loss of each pair from the scores of its answers (sums, or means where the loss averages)."""
        if self.loss is DpoLoss.ORPO:
            return -self.beta * F.logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))
        delta_P = chosen_P - rejected_P
        if self.loss is DpoLoss.HINGE:
            return torch.relu(1 - self.beta * delta_P)
        if self.loss is DpoLoss.IPO:
            return (delta_P - 1 / (2 * self.beta)) ** 2
        logit_P = self.beta * delta_P - (self.simpo_gamma if self.loss is DpoLoss.SIMPO else 0.0)
        right_P, wrong_P = -F.logsigmoid(logit_P), -F.logsigmoid(-logit_P)
        if self.loss is DpoLoss.ROBUST:
            return ((1 - self.label_smoothing) * right_P - self.label_smoothing * wrong_P) / (1 - 2 * self.label_smoothing)
        return (1 - self.label_smoothing) * right_P + self.label_smoothing * wrong_P

    def _metrics(self, measured: tuple[Tensor, Tensor, Tensor], weight_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        score_S, logprob_S, nll_S = measured
        reward_S = self.beta * score_S
        margin_P = reward_S[0::2] - reward_S[1::2]
        values_P = {
            "accuracy": (margin_P > 0).float(),
            "reward_margin": margin_P,
            "reward_chosen": reward_S[0::2],
            "reward_rejected": reward_S[1::2],
            "logprob_chosen_nats": logprob_S[0::2],
            "logprob_rejected_nats": logprob_S[1::2],
            "nll_chosen_nats": nll_S[0::2],
            # Whether the policy by itself finds the chosen answer likelier, per token: comparable before and after training.
            "policy_accuracy": (nll_S[0::2] < nll_S[1::2]).float(),
        }
        return {name: ((value_P * weight_P).sum(), weight_P.sum()) for name, value_P in values_P.items()}

    def derived(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:  # noqa: ARG002 - the protocol's
        """Nothing: all metrics are averages."""
        return {}


def _per_sequence(value_N: Tensor, batch: PackedBatch) -> Tensor:
    """Sums over the targets of each sequence, (S)."""
    return value_N.new_zeros(batch.n_sequences).index_add(0, batch.sequence_N, value_N)


def _log_odds(mean_logprob_S: Tensor) -> Tensor:
    """log(p / (1 − p)) of the geometric mean probability p of an answer's tokens."""
    # 1 − p by expm1: an answer known by heart (p near 1) leaves 1 − exp(…) few digits in float32. The clamp keeps p = 1 finite.
    return mean_logprob_S - torch.log(-torch.expm1(mean_logprob_S.clamp(max=-1e-6)))
