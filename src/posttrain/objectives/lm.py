"""Next-token likelihood: the objective of continued pretraining and of supervised fine-tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from posttrain.types import Loss, PackedBatch


class LanguageModel:
    """Cross-entropy, Σ over targets of −log p(target | what it may see), in nats. Weight unit: target tokens.

    A mixture-of-experts model's router loss (arXiv 2101.03961, eq. 4) is a mean over tokens; it enters multiplied by the
    micro-batch's weight, so that dividing by the step's weight gives the weighted mean over micro-batches.
    """

    def weight(self, batch: PackedBatch) -> Tensor:
        """The number of target tokens."""
        return torch.tensor(batch.targets_N.numel(), device=batch.targets_N.device)

    def __call__(self, model: nn.Module, batch: PackedBatch) -> Loss:
        """Sum of the targets' negative log-probs. Metric: nll_nats, without the router loss."""
        output = model(**batch.model_inputs(), predict_N=batch.predict_N, targets_N=batch.targets_N)
        nll = -output.logprobs_N.sum()
        count = self.weight(batch)
        metrics = {"nll_nats": (nll.detach(), count)}
        if output.router_loss is None:
            return Loss(nll, metrics)
        metrics["router_loss"] = (output.router_loss.detach() * count, count)
        return Loss(nll + output.router_loss * count, metrics)

    def derived(self, totals: dict[str, tuple[float, float]]) -> dict[str, float]:
        """perplexity = exp(mean negative log-prob)."""
        total, count = totals["nll_nats"]
        return {"perplexity": math.exp(min(total / max(count, 1), 700.0))}
