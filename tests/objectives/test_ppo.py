"""PPO's loss: clip branches by hand, gradients by hand and by autograd, sums that do not depend on the cut."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from posttrain.objectives.advantages import explained_variance
from posttrain.objectives.ppo import PpoLoss, PpoSettings, policy_terms, value_terms
from posttrain.types import PackedBatch, UserError
from ppo_cases import STATES, WORDS, Tabular, part, rollout

EVERYTHING = PpoSettings(dual_clip=1.5, entropy_coef=0.01, kl_loss_coef=0.05, temperature=0.7)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.1, 2.0, -2.2, -2.2, False),
        (1.5, 2.0, -2.4, 0.0, True),  # good and already more likely: no further
        (0.5, 2.0, -1.0, -1.0, False),  # good, became less likely: all the way back
        (0.5, -2.0, 1.6, 0.0, True),  # bad and already less likely: no further
        (1.5, -2.0, 3.0, 3.0, False),  # bad, became more likely: all the way back
    ],
)
def test_clip_branches(ratio: float, advantage: float, loss: float, slope: float, clipped: bool) -> None:
    """ε = 0.2; slope is the derivative by the log-prob."""
    logprobs_N = column(math.log(ratio) - 1).requires_grad_()
    terms = policy_terms(logprobs_N, column(-1.0), column(advantage), 0.2)
    terms.loss_N.sum().backward()
    assert float(terms.loss_N.detach()) == pytest.approx(loss)
    assert float(terms.ratio_N.detach()) == pytest.approx(ratio)
    assert bool(terms.clipped_N) is clipped
    assert logprobs_N.grad is not None
    assert float(logprobs_N.grad) == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (2.9, -2.0, 5.8, 5.8, False),
        (4.0, -2.0, 6.0, 0.0, True),  # capped at c·|A|
        (0.5, -2.0, 1.6, 0.0, True),  # the ordinary clip, as without
        (4.0, 2.0, -2.4, 0.0, True),  # a good token never meets the second clip
        (0.1, 2.0, -0.2, -0.2, False),
    ],
)
def test_dual_clip_branches(ratio: float, advantage: float, loss: float, slope: float, clipped: bool) -> None:
    logprobs_N = column(math.log(ratio) - 1).requires_grad_()
    terms = policy_terms(logprobs_N, column(-1.0), column(advantage), 0.2, dual_clip=3.0)
    terms.loss_N.sum().backward()
    assert float(terms.loss_N.detach()) == pytest.approx(loss)
    assert bool(terms.clipped_N) is clipped
    assert logprobs_N.grad is not None
    assert float(logprobs_N.grad) == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "clipped"),
    [
        (1.1, 2.0, 0.405, -0.9, False),
        (1.5, 2.0, 0.32, 0.0, True),  # moved up by more than 0.2 towards the return: no further in this rollout
        (0.5, 2.0, 1.125, -1.5, False),  # moved away: all the way back
        (1.5, 0.0, 1.125, 1.5, False),
        (0.5, 0.0, 0.32, 0.0, True),
    ],
)
def test_value_clip_branches(value: float, target: float, loss: float, slope: float, clipped: bool) -> None:
    """Old value 1, ε = 0.2."""
    values_N = column(value).requires_grad_()
    terms = value_terms(values_N, column(1.0), column(target), 0.2)
    terms.loss_N.sum().backward()
    assert float(terms.loss_N.detach()) == pytest.approx(loss)
    assert bool(terms.clipped_N) is clipped
    assert values_N.grad is not None
    assert float(values_N.grad) == pytest.approx(slope)


def test_values_without_a_clip() -> None:
    terms = value_terms(column(1.5, 9.0), column(1.0, 1.0), column(2.0, 2.0), None)
    assert terms.loss_N.tolist() == [0.125, 24.5]
    assert not terms.clipped_N.any()


def test_an_absurd_ratio_gives_no_nan() -> None:
    """exp would overflow, and the branch not taken would have the gradient 0·∞."""
    logprobs_N = torch.tensor([300.0, 300.0, -300.0], requires_grad=True)
    policy_terms(logprobs_N, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 0.2).loss_N.sum().backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.isfinite().all()


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    """By hand, for a softmax: ∂(−Σ A log π)/∂z_sv = −Σ_n A_n (1[v = target] − π_v) for the tokens n of state s."""
    model, batch = Tabular(), rollout([4, 6, 3], noise=0.0)
    loss = PpoLoss(PpoSettings(vf_coef=0.0))(model, batch)
    loss.total.backward()
    policy_SV = model.logits_SV.detach().softmax(-1)
    expected_SV = torch.zeros(STATES, WORDS, dtype=torch.float64)
    for n, advantage in enumerate(batch.extras["advantages_N"]):
        state = batch.input_ids_BT[0, n]
        expected_SV[state] += advantage * policy_SV[state]
        expected_SV[state, batch.targets_N[n]] -= advantage
    torch.testing.assert_close(model.logits_SV.grad, expected_SV)
    assert float(loss.total.detach()) == pytest.approx(-float(batch.extras["advantages_N"].sum()))
    for name, mean in {"ratio": 1.0, "approx_kl_nats": 0.0, "clip_fraction": 0.0, "value_clip_fraction": 0.0}.items():
        assert float(loss.metrics[name][0] / loss.metrics[name][1]) == pytest.approx(mean, abs=1e-12)


def test_the_value_gradient_by_hand() -> None:
    """At V = V_old: ∂/∂V = vf_coef·(V − R), summed over the tokens of a state; the policy is not touched where A = 0."""
    model, batch = Tabular(), rollout([5, 5], noise=0.0)
    batch.extras["advantages_N"].zero_()
    PpoLoss(PpoSettings(vf_coef=0.3))(model, batch).total.backward()
    states_N = batch.input_ids_BT[0]
    errors_N = model.values_S.detach()[states_N] - batch.extras["returns_N"]
    expected_S = torch.zeros(STATES, dtype=torch.float64).index_add(0, states_N, 0.3 * errors_N)
    torch.testing.assert_close(model.values_S.grad, expected_S)
    assert model.logits_SV.grad is not None
    assert not model.logits_SV.grad.any()


def test_gradients_against_finite_differences() -> None:
    """Every term at once, every parameter, clips and all."""
    model, batch, objective = Tabular(), rollout([5, 2, 7]), PpoLoss(EVERYTHING)
    objective(model, batch).total.backward()
    step = 1e-6
    for parameter in model.parameters():
        assert parameter.grad is not None
        flat = parameter.data.view(-1)
        for i, slope in enumerate(parameter.grad.flatten().tolist()):
            flat[i] += step
            above = objective(model, batch).total.item()
            flat[i] -= 2 * step
            below = objective(model, batch).total.item()
            flat[i] += step
            assert (above - below) / (2 * step) == pytest.approx(slope, abs=1e-6)


def test_total_is_the_sum_of_its_terms() -> None:
    """From the metrics, with each coefficient."""
    model, batch = Tabular(), rollout([4, 4])
    s = dataclasses.replace(EVERYTHING, temperature=1.0)
    loss = PpoLoss(s)(model, batch)
    sums = {name: float(total) for name, (total, _) in loss.metrics.items()}
    expected = sums["policy_loss"] + s.vf_coef * sums["value_loss"] - s.entropy_coef * sums["loss_entropy_nats"]
    assert float(loss.total.detach()) == pytest.approx(expected + s.kl_loss_coef * sums["kl_loss_nats"])
    assert {float(count) for _, count in loss.metrics.values()} == {8.0}
    assert int(PpoLoss(s).weight(batch)) == 8


def test_each_number_reaches_its_term() -> None:
    """Far from the old policy, so that every clip bites; the KL that is reported is that of the old policy from the new."""
    model, batch = Tabular(), rollout([30], noise=2.0)
    s = PpoSettings(cliprange=0.1, dual_clip=1.3, cliprange_value=0.05)
    loss = PpoLoss(s)(model, batch)
    now = model(batch.input_ids_BT, batch.predict_N, batch.targets_N, 1.0, True)
    extras = batch.extras
    log_ratio_N = now.logprobs_N.detach() - extras["old_logprobs_N"]
    expected = {
        "policy_loss": policy_terms(now.logprobs_N, extras["old_logprobs_N"], extras["advantages_N"], 0.1, 1.3).loss_N,
        "value_loss": value_terms(now.values_N, extras["old_values_N"], extras["returns_N"], 0.05).loss_N,
        "approx_kl_nats": log_ratio_N.exp() - 1 - log_ratio_N,
    }
    for name, x_N in expected.items():
        torch.testing.assert_close(loss.metrics[name][0], x_N.detach().sum())
    others: dict[str, Any] = {"cliprange": 0.2, "dual_clip": None, "cliprange_value": None}
    for name, other in others.items():
        changed = PpoLoss(dataclasses.replace(s, **{name: other}))(model, batch)
        assert not torch.allclose(changed.total, loss.total), name


def test_an_entropy_bonus_raises_entropy_and_a_kl_term_pulls_to_the_reference() -> None:
    model, batch = Tabular(), rollout([6], noise=0.0)
    batch.extras["advantages_N"].zero_()
    rise = descend(model, batch, PpoSettings(vf_coef=0.0, entropy_coef=0.1), "loss_entropy_nats")
    assert rise > 0
    batch = rollout([6], noise=0.5)
    batch.extras["advantages_N"].zero_()
    assert descend(Tabular(), batch, PpoSettings(vf_coef=0.0, kl_loss_coef=0.1), "kl_loss_nats") < 0


def descend(model: Tabular, batch: PackedBatch, numbers: PpoSettings, name: str) -> float:
    """By how much a metric changes over one small step of gradient descent."""
    objective = PpoLoss(numbers)
    loss = objective(model, batch)
    loss.total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.01 * parameter.grad)
    return float(objective(model, batch).metrics[name][0] - loss.metrics[name][0])


def test_the_temperature_divides_the_logits() -> None:
    model, batch = Tabular(), rollout([5])
    hot = Tabular()
    hot.logits_SV.data /= 0.7
    warm = PpoLoss(PpoSettings(temperature=0.7))(model, batch)
    torch.testing.assert_close(warm.total, PpoLoss(PpoSettings())(hot, batch).total)


def test_no_reference_is_needed_without_a_kl_term() -> None:
    batch = rollout([5])
    del batch.extras["reference_N"]
    assert "kl_loss_nats" not in PpoLoss()(Tabular(), batch).metrics


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), cuts=st.lists(st.integers(0, 30), max_size=4))
def test_a_step_may_be_cut_anywhere(lengths: list[int], cuts: list[int]) -> None:
    """Total, gradients, weight, every metric and the explained variance: the sums over the micro-batches, an empty one included."""
    batch, objective, n = rollout(lengths, seed=7), PpoLoss(EVERYTHING), sum(lengths)
    whole_model, cut_model = Tabular(), Tabular()
    whole = objective(whole_model, batch)
    whole.total.backward()
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    parts = [part(batch, a, b) for a, b in zip([0, *edges[:-1]], edges, strict=True)]
    losses = [objective(cut_model, p) for p in parts]
    torch.stack([x.total for x in losses]).sum().backward()
    torch.testing.assert_close(sum(x.total for x in losses), whole.total)
    for a, b in zip(whole_model.parameters(), cut_model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    totals = {name: (sum(float(x.metrics[name][0]) for x in losses), float(n)) for name in whole.metrics}
    for name, (total, count) in whole.metrics.items():
        assert totals[name] == pytest.approx((float(total), float(count)), abs=1e-9)
    assert sum(int(objective.weight(p)) for p in parts) == int(objective.weight(batch)) == n
    whole_totals = {name: (float(total), float(count)) for name, (total, count) in whole.metrics.items()}
    assert objective.derived(totals) == pytest.approx(objective.derived(whole_totals), abs=1e-9)


def test_derived_explained_variance() -> None:
    """That of the values as they are now; left out where the returns are all the same."""
    model, batch, objective = Tabular(), rollout([9]), PpoLoss()
    totals = {name: (float(total), float(count)) for name, (total, count) in objective(model, batch).metrics.items()}
    values_N = model.values_S.detach()[batch.input_ids_BT[0]]
    expected = explained_variance(batch.extras["returns_N"], values_N, lambda x: x)
    assert objective.derived(totals) == {"explained_variance": pytest.approx(expected)}
    batch.extras["returns_N"].fill_(0.1)
    totals = {name: (float(total), float(count)) for name, (total, count) in objective(model, batch).metrics.items()}
    assert objective.derived(totals) == {}


def test_metrics_carry_no_gradient() -> None:
    loss = PpoLoss(EVERYTHING)(Tabular(), rollout([3]))
    assert not any(x.requires_grad for pair in loss.metrics.values() for x in pair)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cliprange", 0.0), ("cliprange", 1.0), ("dual_clip", 1.0), ("cliprange_value", 0.0),
        ("vf_coef", -0.1), ("entropy_coef", -1.0), ("kl_loss_coef", -1.0), ("temperature", 0.0),
    ],
)  # fmt: skip
def test_impossible_numbers_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name} {value}"):
        PpoSettings(**{name: value})


def test_it_learns_a_bandit() -> None:
    """One state, the last word pays: a few rollouts with clipped updates make it likely, and no rollout moves it far."""
    model, objective, word = Tabular(), PpoLoss(PpoSettings(vf_coef=0.0)), WORDS - 1
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 0.05, eps=1e-5)
    for _ in range(40):
        batch = rollout([1] * 32, seed=int(torch.randint(10_000, (1,), generator=generator)), model=model, noise=0.0)
        batch.input_ids_BT.zero_()
        with torch.no_grad():
            log_V = model.logits_SV[0].log_softmax(-1)
        batch.targets_N.copy_(torch.multinomial(log_V.exp(), 32, replacement=True, generator=generator))
        batch.extras["old_logprobs_N"].copy_(log_V[batch.targets_N])
        batch.extras["advantages_N"].copy_((batch.targets_N == word).double() - log_V[word].exp())
        for _ in range(4):
            (objective(model, batch).total / objective.weight(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert float(model.logits_SV[0].detach().softmax(-1)[word]) > 0.95
