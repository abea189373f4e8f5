"""A tiny softmax policy with values, and rollouts of it, for the tests of PPO's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.types import PackedBatch

STATES, WORDS = 7, 5


class Output(NamedTuple):
    logprobs_N: Tensor
    entropy_N: Tensor | None
    values_N: Tensor


class Tabular(nn.Module):
    """One row of logits and one value for each token id that may come before: gradients are easy to derive by hand."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits_SV = nn.Parameter(torch.randn(STATES, WORDS, generator=generator, dtype=torch.float64))
        self.values_S = nn.Parameter(torch.randn(STATES, generator=generator, dtype=torch.float64))

    def forward(
        self, input_ids: Tensor, predict_N: Tensor, targets_N: Tensor, temperature: float, entropy: bool, **inputs: Any
    ) -> Output:
        state_N = input_ids.flatten()[predict_N]
        log_NV = (self.logits_SV[state_N] / temperature).log_softmax(-1)
        entropy_N = -(log_NV.exp() * log_NV).sum(-1)
        return Output(log_NV.gather(1, targets_N[:, None]).squeeze(1), entropy_N if entropy else None, self.values_S[state_N])


def sequence_ids(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))


def rollout(lengths: Sequence[int], seed: int = 0, model: Tabular | None = None, noise: float = 0.3) -> PackedBatch:
    """A packed batch of responses with random columns; the old policy is `model` changed by `noise`."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    model = model or Tabular()
    states_N = torch.randint(STATES, (n,), generator=generator)
    targets_N = torch.randint(WORDS, (n,), generator=generator)
    with torch.no_grad():
        now = model(states_N[None], torch.arange(n), targets_N, 1.0, True)
    columns = {
        "old_logprobs_N": now.logprobs_N + noise * torch.randn(n, generator=generator, dtype=torch.float64),
        "old_values_N": now.values_N + noise * torch.randn(n, generator=generator, dtype=torch.float64),
        "advantages_N": torch.randn(n, generator=generator, dtype=torch.float64),
        "returns_N": torch.randn(n, generator=generator, dtype=torch.float64),
        "reference_N": now.logprobs_N + noise * torch.randn(n, generator=generator, dtype=torch.float64),
    }
    return PackedBatch(
        states_N[None], torch.arange(n)[None], torch.arange(n), targets_N, sequence_ids(lengths), len(lengths), n, extras=columns
    )


def part(batch: PackedBatch, start: int, end: int) -> PackedBatch:
    """The tokens [start, end) of a batch as a micro-batch of their own."""
    extras = {name: x_N[start:end] for name, x_N in batch.extras.items()}
    return PackedBatch(
        batch.input_ids_BT[:, start:end], batch.position_ids_BT[:, start:end], torch.arange(end - start),
        batch.targets_N[start:end], batch.sequence_N[start:end], batch.n_sequences, end - start, extras=extras,
    )  # fmt: skip
