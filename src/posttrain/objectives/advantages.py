"""From scores to advantages: PPO's pure arithmetic between the rollout and the update.

Everything lives on the flat axis N: all response tokens, sequence by sequence; sequence_N (ascending) says whose a token is.
Token n is an action; values_N[n] is the value of the state *before* it, read where token n is predicted. One Boolean per
sequence, stopped_S, says how it ended: True by a stop token (the last of its tokens), False cut at the response limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over the ranks; the identity where there is one


def last_tokens(sequence_N: Tensor) -> Tensor:
    """Boolean (N): the token is the last of its sequence."""
    ends_N = torch.ones_like(sequence_N, dtype=torch.bool)
    ends_N[:-1] = sequence_N[1:] != sequence_N[:-1]
    return ends_N


def shaped_scores(
    scores_S: Tensor,
    stopped_S: Tensor,
    *,
    missing_eos_penalty: float = 0.0,
    reward_baseline: float = 0.0,
    score_clip: float | None = None,
) -> Tensor:
    """What enters the reward in place of the raw score: clip(score − penalty·[not stopped] − baseline, ±score_clip). Shape (S)."""
    shaped_S = scores_S - missing_eos_penalty * (~stopped_S).to(scores_S.dtype) - reward_baseline
    return shaped_S if score_clip is None else shaped_S.clamp(-score_clip, score_clip)


def token_rewards(scores_S: Tensor, logprobs_N: Tensor, reference_N: Tensor | None, sequence_N: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: r_n = −β·(log π_n − log π_ref,n) + [n is the last of its sequence]·score. Shape (N).

    The penalty is the k1 estimate: its sum over a sequence is unbiased for the sequence's KL (arXiv 1909.08593, eq. 2).
    scores_S: from `shaped_scores`.  reference_N: None where there is no reference, for β = 0 only.
    """
    rewards_N = torch.where(last_tokens(sequence_N), scores_S[sequence_N].to(logprobs_N.dtype), 0.0)
    if reference_N is None:
        if kl_coef != 0:
            raise ValueError(f"a KL weight of {kl_coef} needs reference log-probs")
        return rewards_N
    return rewards_N - kl_coef * (logprobs_N - reference_N)


def whiten(x_N: Tensor, zero_mean: bool, reduce: Reduce) -> Tensor:
    """Standard deviation 1 over the tokens of all ranks; mean 0 (advantages) or the mean that it had (rewards). Shape (N).

    y = (x − μ)/√(σ² + 1e-8), plus μ unless `zero_mean`; σ² is the unbiased variance, 0 for fewer than two tokens.
    A collective: every rank calls it, one without tokens too. In two passes, in float64: no cancellation.
    """
    x64_N = x_N.detach().double()
    count, total = reduce(torch.stack([x64_N.new_tensor(float(x64_N.numel())), x64_N.sum()]))
    mean = total / count.clamp(min=1)
    centred_N = x64_N - mean
    variance = reduce(centred_N.square().sum()) / (count - 1).clamp(min=1)
    whitened_N = centred_N * torch.rsqrt(variance + 1e-8)
    return (whitened_N if zero_mean else whitened_N + mean).to(x_N.dtype)


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    sequence_N: Tensor,
    stopped_S: Tensor,
    last_values_S: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): advantages_N and returns_N, without gradient.

        δ_n = r_n + γ·V_{n+1} − V_n        A_n = Σ_l (γλ)^l δ_{n+l} = δ_n + γλ·A_{n+1}        return_n = A_n + V_n

    both within a sequence. After its last token, V_{n+1} is 0 where it stopped (termination) and last_values_S where it was cut
    (truncation): the value of the state that includes the last token, i.e. the value read at `PackedBatch.last_S()`; what
    last_values_S holds for a stopped sequence is not looked at.

    Computed by doubling: A ← A + c·(A, `step` tokens on), with c = (γλ)^step and step = 1, 2, 4 …: log₂ N operations on the
    whole axis, no padding, no step that waits for the device. Sums in float64.
    """
    values64_N, last64_S = values_N.detach().double(), last_values_S.detach().double()
    after_S = torch.where(stopped_S, 0.0, last64_S)
    next_N = torch.where(last_tokens(sequence_N), after_S[sequence_N], values64_N.roll(-1))
    advantages_N = rewards_N.detach().double() + gamma * next_N - values64_N
    factor, step = gamma * lam, 1
    while step < len(sequence_N):
        same = sequence_N[step:] == sequence_N[:-step]
        advantages_N[:-step] += factor * torch.where(same, advantages_N[step:], 0.0)
        factor, step = factor * factor, step * 2
    return advantages_N.to(values_N.dtype), (advantages_N + values64_N).to(values_N.dtype)


def explained_variance(returns_N: Tensor, values_N: Tensor, reduce: Reduce) -> float:
    """1 − Var(returns − values)/Var(returns) over the tokens of all ranks: 1 perfect, 0 no better than a constant. A collective.

    NaN where the returns do not vary.
    """
    sums = torch.stack([returns_N.new_tensor(float(returns_N.numel())).double(), *variance_sums(returns_N, values_N)])
    return explained_by_sums(reduce(sums).tolist())


def variance_sums(returns_N: Tensor, values_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ R, Σ R², Σ (R − V), Σ (R − V)² in float64: what explained variance is made of, and what may be added up."""
    returns64_N = returns_N.detach().double()
    errors_N = returns64_N - values_N.detach().double()
    return returns64_N.sum(), returns64_N.square().sum(), errors_N.sum(), errors_N.square().sum()


def explained_by_sums(sums: Sequence[float]) -> float:
    """Explained variance from the token count and the four `variance_sums`. NaN where the returns do not vary."""
    count, total, squares, error_total, error_squares = sums
    if count == 0:
        return math.nan
    spread = squares - total * total / count
    if spread <= 1e-12 * squares:  # rounding of a constant
        return math.nan
    return 1 - (error_squares - error_total * error_total / count) / spread
