"""Bradley–Terry reward model: the chosen answer's score should exceed the rejected one's.

    loss = −log σ(r_w − r_l − m) + c · (r_w + r_l)²

m is the row's margin (arXiv 2307.09288 eq. 2), c the weight of the centring term, which keeps scores near 0 (arXiv 2312.09244 eq. 2).
Scores are read at the last token of an answer, its stop token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.types import Loss, PackedBatch

CALIBRATION_BINS = 10  # of the confidence from 0.5 to 1


@dataclass(frozen=True)
class Reward:
    """The objective of the rm stage. Weight unit: pairs."""

    center_weight: float = 0.0

    def weight(self, batch: PackedBatch) -> Tensor:
        """The number of pairs."""
        return batch.extras["weight_P"].sum()

    def __call__(self, model: nn.Module, batch: PackedBatch) -> Loss:
        """Σ of the pairs' losses. Metrics: accuracy, also by which answer is longer; margin; scores; sums for the calibration."""
        output = model(**batch.model_inputs(), score_at_S=batch.last_S())
        chosen_P, rejected_P = output.scores_S[0::2], output.scores_S[1::2]
        margin_P, weight_P = chosen_P - rejected_P, batch.extras["weight_P"]
        loss_P = F.softplus(-(margin_P - batch.extras["margin_P"])) + self.center_weight * (chosen_P + rejected_P) ** 2
        total = (loss_P * weight_P).sum()
        metrics = _metrics(chosen_P.detach(), rejected_P.detach(), batch)
        if output.router_loss is not None:
            weight = self.weight(batch)
            metrics["router_loss"] = (output.router_loss.detach() * weight, weight)
            total = total + output.router_loss * weight
        return Loss(total, metrics)

    def derived(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """calibration_error: the expected calibration error (arXiv 1706.04599 eq. 3) of σ(margin) as the probability of being right."""
        bins = [totals[f"_confidence_{index}"] for index in range(CALIBRATION_BINS)]
        pairs = sum(count for _, count in bins)
        return {"calibration_error": sum(abs(gap) for gap, _ in bins) / max(pairs, 1)}


def _metrics(chosen_P: Tensor, rejected_P: Tensor, batch: PackedBatch) -> dict[str, tuple[Tensor, Tensor]]:
    margin_P, weight_P = chosen_P - rejected_P, batch.extras["weight_P"]
    right_P = (margin_P > 0).float()
    tokens_S = torch.bincount(batch.sequence_N, minlength=batch.n_sequences)
    longer_P, shorter_P = (tokens_S[0::2] > tokens_S[1::2]) * weight_P, (tokens_S[0::2] < tokens_S[1::2]) * weight_P
    confidence_P = torch.sigmoid(margin_P.abs())
    bin_P = ((confidence_P - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    metrics = {
        "accuracy": ((right_P * weight_P).sum(), weight_P.sum()),
        "accuracy_chosen_longer": ((right_P * longer_P).sum(), longer_P.sum()),
        "accuracy_chosen_shorter": ((right_P * shorter_P).sum(), shorter_P.sum()),
        "margin": ((margin_P * weight_P).sum(), weight_P.sum()),
        "score_chosen": ((chosen_P * weight_P).sum(), weight_P.sum()),
        "score_rejected": ((rejected_P * weight_P).sum(), weight_P.sum()),
    }
    for index in range(CALIBRATION_BINS):
        in_bin_P = (bin_P == index) * weight_P
        metrics[f"_confidence_{index}"] = (((right_P - confidence_P) * in_bin_P).sum(), in_bin_P.sum())
    return metrics
