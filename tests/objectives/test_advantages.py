"""Rewards, whitening and advantages, against definitions written out here."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from posttrain.objectives.advantages import explained_variance, gae, last_tokens, shaped_scores, token_rewards, whiten
from ppo_cases import sequence_ids


def alone(x: Tensor) -> Tensor:
    return x


def ranks(parts: list[Tensor], ask: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """What each of several ranks gets: their sums, one per collective in order, are found by a run per collective."""
    known: list[Tensor] = []
    while True:
        sent: list[list[Tensor]] = []
        results = []
        for x_N in parts:
            calls: list[Tensor] = []

            def reduce(x: Tensor, calls: list[Tensor] = calls) -> Tensor:
                calls.append(x)
                return known[len(calls) - 1] if len(calls) <= len(known) else x

            results.append(ask(x_N, reduce))
            sent.append(calls)
        if len(known) == len(sent[0]):
            return results
        known.append(torch.stack([calls[len(known)] for calls in sent]).sum(0))


def by_definition(
    rewards: list[float], values: list[float], after: float, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One sequence: A_t = Σ_l (γλ)^l δ_{t+l}, each sum written out."""
    following = [*values[1:], after]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, following, strict=True)]
    n = len(deltas)
    advantages = [math.fsum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def random_case(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    rewards_N, values_N = torch.randn(2, n, generator=generator, dtype=torch.float64).to(dtype)
    return rewards_N, values_N, torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    gamma=st.sampled_from([1.0, 0.9, 0.5]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    data=st.data(),
)
def test_gae_is_its_definition(lengths: list[int], seed: int, gamma: float, lam: float, data: st.DataObject) -> None:
    stopped = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    rewards_N, values_N, last_S = random_case(lengths, seed)
    got = gae(rewards_N, values_N, sequence_ids(lengths), torch.tensor(stopped), last_S, gamma=gamma, lam=lam)
    advantages: list[float] = []
    returns: list[float] = []
    start = 0
    for s, length in enumerate(lengths):
        own = slice(start, start + length)
        after = 0.0 if stopped[s] else last_S[s].item()
        a, r = by_definition(rewards_N[own].tolist(), values_N[own].tolist(), after, gamma, lam)
        advantages, returns, start = advantages + a, returns + r, start + length
    torch.testing.assert_close(got[0], torch.tensor(advantages, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], torch.tensor(returns, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gae_by_hand_with_the_defaults() -> None:
    """Two tokens, score 1 at the stop, γ = 1, λ = 0.95: δ = (0.5, 0.3), A = (0.5 + 0.95·0.3, 0.3)."""
    case = torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.7]), torch.tensor([0, 0]), torch.tensor([True]), torch.tensor([9.0])
    advantages_N, returns_N = gae(*case)
    torch.testing.assert_close(advantages_N, torch.tensor([0.785, 0.3]))
    torch.testing.assert_close(returns_N, torch.tensor([0.985, 1.0]))


def test_gae_in_single_precision_keeps_single_precision() -> None:
    """A long sequence with γλ = 1, where errors would add up: as exact as one rounding of the result."""
    rewards_N, values_N, last_S = random_case([3000], 3, torch.float32)
    ids_N, stopped_S = sequence_ids([3000]), torch.tensor([False])
    got_N = gae(rewards_N, values_N, ids_N, stopped_S, last_S, gamma=1.0, lam=1.0)[0]
    exact_N = gae(rewards_N.double(), values_N.double(), ids_N, stopped_S, last_S.double(), gamma=1.0, lam=1.0)[0]
    assert got_N.dtype == torch.float32
    torch.testing.assert_close(got_N, exact_N.float(), rtol=0, atol=0)


def test_sequences_do_not_see_each_other() -> None:
    """Alone or after another sequence, however it is: the same numbers, NaN of a neighbour included."""
    lengths = [5, 3, 8]
    rewards_N, values_N, last_S = random_case(lengths, 1)
    rewards_N[:5] = math.nan
    stopped_S = torch.tensor([True, False, True])
    whole = gae(rewards_N, values_N, sequence_ids(lengths), stopped_S, last_S)
    own = slice(5, 8)
    single = gae(rewards_N[own], values_N[own], sequence_ids([3]), stopped_S[1:2], last_S[1:2])
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a[own], b, rtol=0, atol=1e-15)
        assert a[8:].isfinite().all()


def test_termination_ignores_the_last_value_and_truncation_does_not() -> None:
    """A cut sequence is a stopped one whose last reward is greater by γ·V; for a stopped one V may be anything."""
    rewards_N, values_N, last_S = random_case([4, 6], 2)
    ids_N, gamma = sequence_ids([4, 6]), 0.9
    cut = gae(rewards_N, values_N, ids_N, torch.tensor([True, False]), last_S, gamma=gamma)
    paid_N = rewards_N.clone()
    paid_N[9] += gamma * last_S[1]
    ended = gae(paid_N, values_N, ids_N, torch.tensor([True, True]), torch.full((2,), math.nan), gamma=gamma)
    torch.testing.assert_close(cut, ended)
    plain = gae(rewards_N, values_N, ids_N, torch.tensor([True, True]), last_S, gamma=gamma)
    assert not torch.allclose(cut[0][4:], plain[0][4:])
    torch.testing.assert_close(cut[0][:4], plain[0][:4])


def test_cutting_a_sequence_where_its_return_is_known_changes_nothing() -> None:
    """λ = 1: a response cut anywhere, with the rest's return as the value after the cut, has the advantages of the whole."""
    rewards_N, values_N, _ = random_case([9], 4)
    whole_N = gae(rewards_N, values_N, sequence_ids([9]), torch.tensor([True]), torch.zeros(1), lam=1.0, gamma=0.9)[0]
    for cut in range(1, 9):
        rest = gae(
            rewards_N[cut:], values_N[cut:], sequence_ids([9 - cut]), torch.tensor([True]), torch.zeros(1), lam=1.0, gamma=0.9
        )
        head = gae(rewards_N[:cut], values_N[:cut], sequence_ids([cut]), torch.tensor([False]), rest[1][:1], lam=1.0, gamma=0.9)
        torch.testing.assert_close(torch.cat([head[0], rest[0]]), whole_N)


def test_gae_gives_no_gradient() -> None:
    values_N = torch.ones(3, requires_grad=True)
    case = torch.ones(3), values_N, sequence_ids([3]), torch.tensor([False]), torch.ones(1, requires_grad=True)
    assert not any(x_N.requires_grad for x_N in gae(*case))


def test_last_tokens() -> None:
    assert last_tokens(torch.tensor([0, 0, 1, 3, 3])).tolist() == [False, True, True, False, True]
    assert last_tokens(torch.tensor([], dtype=torch.long)).tolist() == []


def test_the_score_stands_at_the_last_token_and_the_penalty_at_every_one() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0, -3.0])
    reference_N = torch.tensor([-1.5, -1.0, -3.0])
    rewards_N = token_rewards(torch.tensor([10.0, 20.0]), logprobs_N, reference_N, torch.tensor([0, 0, 1]), kl_coef=0.1)
    torch.testing.assert_close(rewards_N, torch.tensor([-0.05, 0.1 + 10.0, 20.0]))


def test_no_reference_means_no_penalty() -> None:
    logprobs_N, ids_N = torch.tensor([-1.0, -2.0]), torch.tensor([0, 0])
    assert token_rewards(torch.tensor([3.0]), logprobs_N, None, ids_N, kl_coef=0.0).tolist() == [0.0, 3.0]
    with pytest.raises(ValueError, match="needs reference log-probs"):
        token_rewards(torch.tensor([3.0]), logprobs_N, None, ids_N, kl_coef=0.1)


def test_the_penalty_of_a_sequence_is_unbiased_for_its_kl() -> None:
    """Two tokens drawn from a policy over three words: the expected sum of penalties is β·Σ of the exact divergences."""
    generator = torch.Generator().manual_seed(0)
    log_p_V, log_q_V = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    expected = 0.0
    for words in pairs:
        paid = token_rewards(torch.zeros(1), log_p_V[words], log_q_V[words], torch.tensor([0, 0]), kl_coef=0.3).sum()
        expected += float(log_p_V[words].sum().exp() * paid)
    exact = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    assert expected == pytest.approx(-0.3 * 2 * float(exact), abs=1e-12)


def test_scores_are_shaped_in_order() -> None:
    """Penalty where there is no stop token, then the baseline, then the clip."""
    scores_S, stopped_S = torch.tensor([2.0, 2.0, -9.0]), torch.tensor([True, False, True])
    assert shaped_scores(scores_S, stopped_S).tolist() == [2.0, 2.0, -9.0]
    assert shaped_scores(scores_S, stopped_S, missing_eos_penalty=1.0).tolist() == [2.0, 1.0, -9.0]
    every = shaped_scores(scores_S, stopped_S, missing_eos_penalty=1.0, reward_baseline=0.5, score_clip=1.0)
    assert every.tolist() == [1.0, 0.5, -1.0]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 40), shift=st.floats(-50, 50), scale=st.floats(0.1, 30), zero_mean=st.booleans())
def test_whitened_statistics(n: int, shift: float, scale: float, zero_mean: bool) -> None:
    x_N = shift + scale * torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y_N = whiten(x_N, zero_mean, alone)
    assert float(y_N.mean()) == pytest.approx(0.0 if zero_mean else float(x_N.mean()), abs=1e-9)
    assert float(y_N.std(unbiased=True)) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(y_N.argsort(), x_N.argsort())


def test_whitening_is_known_by_hand() -> None:
    """1, 3: mean 2, unbiased variance 2."""
    x_N = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(whiten(x_N, True, alone), torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    torch.testing.assert_close(whiten(x_N, False, alone), 2 + torch.tensor([-1.0, 1.0]) / math.sqrt(2))


def test_whitening_of_little() -> None:
    """One token, none, equal ones: no division by zero."""
    assert whiten(torch.tensor([3.0]), True, alone).tolist() == [0.0]
    assert whiten(torch.tensor([3.0]), False, alone).tolist() == [3.0]
    assert whiten(torch.tensor([]), True, alone).tolist() == []
    torch.testing.assert_close(whiten(torch.full((7,), 0.1), False, alone), torch.full((7,), 0.1))


def test_whitening_far_from_zero_does_not_cancel() -> None:
    x_N = torch.arange(5, dtype=torch.float64) + 1e9
    torch.testing.assert_close(whiten(x_N, True, alone), whiten(x_N - 1e9, True, alone))


@pytest.mark.parametrize("zero_mean", [True, False])
def test_whitening_over_ranks_is_that_of_all_tokens(zero_mean: bool) -> None:
    """Three ranks, one of them without a token."""
    x_N = torch.randn(11, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3
    shards = ranks([x_N[:4], x_N[4:4], x_N[4:]], lambda part_N, reduce: whiten(part_N, zero_mean, reduce))
    torch.testing.assert_close(torch.cat(shards), whiten(x_N, zero_mean, alone))


def test_explained_variance() -> None:
    returns_N = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(returns_N, returns_N, alone) == 1.0
    assert explained_variance(returns_N, returns_N + 5, alone) == pytest.approx(1.0)
    assert explained_variance(returns_N, torch.full((4,), 8.0), alone) == pytest.approx(0.0)
    assert explained_variance(returns_N, -returns_N, alone) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(torch.full((3,), 0.1), returns_N[:3], alone))
    assert math.isnan(explained_variance(returns_N[:0], returns_N[:0], alone))


def test_explained_variance_over_ranks() -> None:
    returns_N, values_N = torch.randn(2, 10, generator=torch.Generator().manual_seed(6))
    both_2N = torch.stack([returns_N, values_N])

    def ask(shard_2N: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.tensor(explained_variance(shard_2N[0], shard_2N[1], reduce))

    expected = 1 - float((returns_N - values_N).var() / returns_N.var())
    for got in ranks([both_2N[:, :3], both_2N[:, 3:]], ask):
        assert float(got) == pytest.approx(expected, rel=1e-5)
