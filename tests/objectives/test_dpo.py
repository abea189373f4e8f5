"""Preference losses: values and gradients against the papers' own forms, the properties that each loss has, sums that no cut changes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pair_rows import Bigram, random_pairs
from posttrain.data.pack import split
from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart, collate_pairs_padded
from posttrain.model.logprobs import TokenLogprobs
from posttrain.objectives.dpo import DpoLoss, Preference
from posttrain.types import Loss, PackedBatch

LOSSES = list(DpoLoss)
REFERENCED = [loss for loss in LOSSES if loss.needs_reference]
# Log-probabilities of the tokens of (chosen, rejected) answers, and of the reference: one pair.
Answers = tuple[Sequence[float], Sequence[float]]
PAIRS: list[tuple[Answers, Answers]] = [
    (([-1.0, -0.5, -2.0], [-0.25, -3.0]), ([-1.5, -0.25, -1.0], [-0.5, -1.0])),
    (([-0.125], [-2.0, -0.5, -0.25, -4.0]), ([-3.0], [-2.5, -0.75, -0.5, -3.0])),
    (([-5.0, -4.0], [-0.5]), ([-1.0, -0.5], [-2.5])),
]


class Given(nn.Module):
    """A model whose log-probabilities are given."""

    def __init__(self, logprobs: Sequence[float], router_loss: float | None = None):
        super().__init__()
        self.logprobs_N = nn.Parameter(torch.tensor(list(logprobs)))
        self.router = None if router_loss is None else nn.Parameter(torch.tensor(router_loss))

    def forward(self, predict_N: Tensor, targets_N: Tensor, **_: Any) -> TokenLogprobs:
        assert len(predict_N) == len(targets_N) == len(self.logprobs_N)
        return TokenLogprobs(self.logprobs_N * 1, router_loss=self.router)


def problem(pairs: Sequence[tuple[Answers, Answers]], weights: Sequence[float] | None = None) -> tuple[Given, PackedBatch]:
    """A model that says these log-probabilities and the batch that has these references."""
    rows = []
    for index, (_, reference) in enumerate(pairs):
        row: dict[str, Any] = {"prompt_ids": [1, 2], "margin": 0.0, "weight": 1 if weights is None else weights[index]}
        for name, part in zip(("chosen", "rejected"), reference, strict=True):
            row |= {f"{name}_ids": [3] * len(part), f"reference_{name}": list(part)}
        rows.append(row)
    return Given([x for policy, _ in pairs for answer in policy for x in answer]), collate_pairs(rows)


def run(objective: Preference, pairs: Sequence[tuple[Answers, Answers]]) -> tuple[float, list[float], Loss]:
    """Total, gradient by token, and all that the objective returns."""
    model, batch = problem(pairs)
    loss = objective(model, batch)
    loss.total.backward()
    assert model.logprobs_N.grad is not None
    return total_of(loss), model.logprobs_N.grad.tolist(), loss


def total_of(loss: Loss) -> float:
    return float(loss.total.detach())


def one(objective: Preference, delta: float, tokens: tuple[int, int] = (1, 1)) -> tuple[float, float, float]:
    """(loss, its slope by a chosen token, by a rejected token) of a pair whose log-ratios differ by `delta` a chosen token."""
    (w, r) = tokens
    total, gradient, _ = run(objective, [(([delta - 4.0] * w, [-4.0] * r), ([-4.0] * w, [-4.0] * r))])
    return total, gradient[0], gradient[-1]


def by_hand(objective: Preference, pairs: Sequence[tuple[Answers, Answers]]) -> float:
    """Σ of the losses as their papers write them, with probabilities, in float64."""
    return sum(_one_by_hand(objective, *policy, *reference) for policy, reference in pairs)


def _one_by_hand(o: Preference, w: Sequence[float], r: Sequence[float], ref_w: Sequence[float], ref_r: Sequence[float]) -> float:
    beta, eps = o.beta, o.label_smoothing
    sft = o.sft_weight * -sum(w) / len(w)
    if o.loss is DpoLoss.ORPO:  # odds of the geometric mean probability
        p_w, p_r = math.exp(sum(w)) ** (1 / len(w)), math.exp(sum(r)) ** (1 / len(r))
        ratio = (p_w / (1 - p_w)) / (p_r / (1 - p_r))
        return -math.log(p_w) - beta * math.log(ratio / (1 + ratio)) + sft
    if o.loss is DpoLoss.SIMPO:  # rewards of β per token, a target margin γ
        z = math.exp(beta * sum(w) / len(w) - beta * sum(r) / len(r) - o.simpo_gamma)
        right = z / (1 + z)
        return -(1 - eps) * math.log(right) - eps * math.log(1 - right) + sft
    reward_w = beta * (sum(w) - sum(ref_w))
    reward_r = beta * (sum(r) - sum(ref_r))
    if o.loss is DpoLoss.HINGE:
        return max(0.0, 1 - (reward_w - reward_r)) + sft
    if o.loss is DpoLoss.IPO:
        gap = (sum(w) - sum(ref_w)) / len(w) - (sum(r) - sum(ref_r)) / len(r)
        return (gap - 0.5 / beta) ** 2 + sft
    right = math.exp(reward_w) / (math.exp(reward_w) + math.exp(reward_r))  # Bradley–Terry
    as_labelled, flipped = -math.log(right), -math.log(1 - right)
    if o.loss is DpoLoss.ROBUST:
        return ((1 - eps) * as_labelled - eps * flipped) / (1 - 2 * eps) + sft
    return (1 - eps) * as_labelled + eps * flipped + sft


SETTINGS = [
    Preference(loss, beta, eps, sft, gamma)
    for loss, beta, eps, sft, gamma in itertools.product(LOSSES, (0.1, 0.7), (0.0, 0.2), (0.0, 0.5), (0.5, 1.0))
    if (not eps or loss.takes_smoothing) and (gamma == 1.0 or loss is DpoLoss.SIMPO)
]


@pytest.mark.parametrize("objective", SETTINGS, ids=str)
def test_values_and_gradients(objective: Preference) -> None:
    total, gradient, _ = run(objective, PAIRS)
    assert total == pytest.approx(by_hand(objective, PAIRS), rel=2e-6)
    assert gradient == pytest.approx(slopes(objective, PAIRS), rel=1e-4, abs=1e-6)


def slopes(objective: Preference, pairs: Sequence[tuple[Answers, Answers]], step: float = 1e-5) -> list[float]:
    """Derivatives of the hand-written sum by each log-probability, as central differences in float64."""
    found = []
    for p, (policy, reference) in enumerate(pairs):
        for k, t in [(side, at) for side in (0, 1) for at in range(len(policy[side]))]:
            ends = []
            for sign in (1, -1):
                moved = [list(policy[0]), list(policy[1])]
                moved[k][t] += sign * step
                ends.append(by_hand(objective, [*pairs[:p], ((moved[0], moved[1]), reference), *pairs[p + 1 :]]))
            found.append((ends[0] - ends[1]) / (2 * step))
    return found


# ---------------------------------------------------------------- what each loss is


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("loss", [DpoLoss.SIGMOID, DpoLoss.ROBUST])
def test_ln_2_where_policy_is_reference(loss: DpoLoss, epsilon: float) -> None:
    same = [(policy, policy) for policy, _ in PAIRS]
    total, gradient, _ = run(Preference(loss, 0.3, epsilon), same)
    assert total == pytest.approx(len(PAIRS) * math.log(2), rel=1e-6)
    assert gradient[0] == pytest.approx(-0.3 / 2 * (1 - 2 * epsilon) ** (1 if loss is DpoLoss.SIGMOID else -1), rel=1e-5)


@given(st.lists(st.tuples(*[st.lists(st.floats(-8, -0.01), min_size=1, max_size=4)] * 2), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_step_raises_the_chosen_and_lowers_the_rejected(policies: list[tuple[list[float], list[float]]]) -> None:
    """The gradient is never of the wrong sign, from whatever policy; for IPO as long as the gap is below its target."""
    reference = [tuple([-4.0] * len(answer) for answer in policy) for policy in policies]
    pairs = list(zip(policies, reference, strict=True))
    for loss in LOSSES:
        _, gradient, _ = run(Preference(loss, 0.05 if loss is DpoLoss.IPO else 0.2), pairs)
        chosen = [k == 0 for policy in policies for k in (0, 1) for _ in policy[k]]
        assert all(slope <= 0 if is_chosen else slope >= 0 for slope, is_chosen in zip(gradient, chosen, strict=True)), loss
        assert any(gradient) or loss is DpoLoss.HINGE


def test_hinge_is_zero_beyond_its_margin() -> None:
    objective = Preference(DpoLoss.HINGE, beta=0.5)
    assert one(objective, 2.001) == (0, 0, 0)
    assert one(objective, 1.0) == pytest.approx((0.5, -0.5, 0.5))
    assert one(objective, -2.0) == pytest.approx((2.0, -0.5, 0.5))


@pytest.mark.parametrize("tokens", [(1, 1), (4, 2)])
def test_ipo_is_least_at_its_target(tokens: tuple[int, int]) -> None:
    """The mean log-ratios differ by 1/(2β), whatever the lengths: there loss and gradient vanish, and point back from either side."""
    objective = Preference(DpoLoss.IPO, beta=0.25)
    assert one(objective, 2.0, tokens) == pytest.approx((0, 0, 0), abs=1e-6)
    below, above = one(objective, 1.5, tokens), one(objective, 2.5, tokens)
    assert below[0] == pytest.approx(0.25, rel=1e-5)
    assert above[0] == pytest.approx(0.25, rel=1e-5)
    assert below[1] == pytest.approx(-1 / tokens[0], rel=1e-5)
    assert above[1] == pytest.approx(1 / tokens[0], rel=1e-5)
    assert above[2] == pytest.approx(-1 / tokens[1], rel=1e-5)


def test_smoothed_sigmoid_is_least_where_the_model_is_as_sure_as_the_labels() -> None:
    """Conservative DPO: σ(βΔ) = 1 − ε at the minimum, where the loss is the labels' entropy."""
    objective = Preference(DpoLoss.SIGMOID, 0.5, 0.1)
    best = math.log(0.9 / 0.1) / 0.5
    loss, slope, _ = one(objective, best)
    assert slope == pytest.approx(0, abs=1e-6)
    assert loss == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-5)
    assert one(objective, best - 1)[1] < 0 < one(objective, best + 1)[1]


@given(st.floats(-6, 6), st.floats(0.01, 0.49), st.floats(0.05, 2))
@settings(max_examples=60, deadline=None)
def test_robust_is_unbiased_under_flipped_labels(delta: float, epsilon: float, beta: float) -> None:
    """Labels flipped with probability ε: the expected robust loss is the sigmoid loss of the true label; so are its slopes."""
    robust, clean = Preference(DpoLoss.ROBUST, beta, epsilon), Preference(DpoLoss.SIGMOID, beta)
    true, flipped, wanted = one(robust, delta), one(robust, -delta), one(clean, delta)
    scale = 1 / (1 - 2 * epsilon)
    assert (1 - epsilon) * true[0] + epsilon * flipped[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-5 * scale)
    assert (1 - epsilon) * true[1] - epsilon * flipped[1] == pytest.approx(wanted[1], rel=1e-5, abs=1e-5 * scale)


def test_robust_without_noise_is_sigmoid() -> None:
    for beta in (0.1, 0.9):
        assert run(Preference(DpoLoss.ROBUST, beta), PAIRS)[:2] == run(Preference(DpoLoss.SIGMOID, beta), PAIRS)[:2]


@pytest.mark.parametrize("loss", LOSSES)
def test_needs_reference(loss: DpoLoss) -> None:
    """What needs none neither asks for it nor looks at it; what needs one depends on it."""
    objective = Preference(loss)
    model, batch = problem(PAIRS)
    plain = objective(model, batch)
    other = dataclasses.replace(batch, extras={**batch.extras, "reference_N": batch.extras["reference_N"] * 2})
    without = dataclasses.replace(batch, extras={k: v for k, v in batch.extras.items() if k != "reference_N"})
    assert (total_of(objective(model, other)) != total_of(plain)) == loss.needs_reference
    assert ("kl_nats" in plain.metrics) == loss.needs_reference
    if loss.needs_reference:
        with pytest.raises(KeyError, match="reference_N"):
            objective(model, without)
    else:
        assert total_of(objective(model, without)) == total_of(plain)
    assert {x.value for x in LOSSES if x.needs_reference} == {"sigmoid", "hinge", "ipo", "robust"}


@pytest.mark.parametrize("loss", LOSSES)
def test_averages_length(loss: DpoLoss) -> None:
    """Each token said twice leaves a loss over means as it was, and no other."""
    twice = [tuple(tuple([x for x in answer for _ in (0, 1)] for answer in side) for side in pair) for pair in PAIRS]
    objective = Preference(loss)
    change = abs(run(objective, twice)[0] - run(objective, PAIRS)[0])  # type: ignore[arg-type]
    assert (change < 1e-4) == loss.averages_length


@pytest.mark.parametrize("loss", LOSSES)
def test_takes_smoothing(loss: DpoLoss) -> None:
    totals = [run(Preference(loss, label_smoothing=epsilon), PAIRS)[0] for epsilon in (0.0, 0.2)]
    assert (totals[0] != totals[1]) == loss.takes_smoothing
    assert loss.default_beta == (2.0 if loss.value == "simpo" else 0.1)


@pytest.mark.parametrize("mean", [-1e-5, -1e-4, -1e-2, -0.5, -0.7, -3.0, -40.0])
def test_odds_of_very_likely_and_very_unlikely_answers(mean: float) -> None:
    """log(p / (1 − p)) and its slope 1 / (1 − p) keep their digits where 1 − p has few in float32 (an answer known by heart)."""
    objective = Preference(DpoLoss.ORPO, beta=0.5)
    total, gradient, _ = run(objective, [(([mean], [-1.0]), ([-1.0], [-1.0]))])
    x, other = float(torch.tensor(mean)), math.exp(-1.0)
    log_ratio = x - math.log(-math.expm1(x)) - math.log(other / (1 - other))
    assert total == pytest.approx(-x + 0.5 * (math.log1p(math.exp(-abs(log_ratio))) + max(-log_ratio, 0)), rel=1e-5)
    slope = -1 - 0.5 / (1 + math.exp(log_ratio)) / -math.expm1(x)
    assert gradient[0] == pytest.approx(slope, rel=1e-4)
    total, gradient, _ = run(objective, [(([0.0, 0.0], [-1.0]), ([-1.0, -1.0], [-1.0]))])  # certain to the last bit
    assert all(math.isfinite(x) for x in (total, *gradient))


# ---------------------------------------------------------------- sums, weights, metrics


@pytest.mark.parametrize("objective", [Preference(loss, 0.3, sft_weight=0.25) for loss in LOSSES], ids=lambda o: o.loss.value)
@pytest.mark.parametrize("collate", [collate_pairs, collate_pairs_apart, collate_pairs_padded])
def test_sums_do_not_depend_on_the_cut(objective: Preference, collate: Callable[[Any], PackedBatch]) -> None:
    """Whole, cut anywhere, pair by pair, in another order, with fillers: the same total, gradient, weight and metric sums."""
    rows = random_pairs(7, seed=3)
    filler = {**rows[4], "weight": 0}
    batch = collate_pairs(rows)
    ways = [
        [batch],
        [collate([row]) for row in rows],
        [collate(rows[::-1])],
        [collate([rows[0], filler, *rows[1:]]), collate([filler])],
    ]
    ways += [split(collate(rows), max_tokens) for max_tokens in (1, 40, 70, 100)]
    expected = None
    for way in ways:
        model = Bigram()
        found: dict[str, Tensor] = {}
        for part in way:
            loss = objective(model, part)
            loss.total.backward()
            sums = {"total": (loss.total.detach(), objective.weight(part)), **loss.metrics}
            found = {name: found.get(name, torch.zeros(2)) + torch.stack(pair) for name, pair in sums.items()}
        gradient = model.table_VV.grad
        assert gradient is not None
        expected = expected or (found, gradient)
        assert found.keys() == expected[0].keys()
        for name, pair in found.items():
            torch.testing.assert_close(pair, expected[0][name], rtol=1e-5, atol=1e-4, msg=name)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)
    assert float(expected[0]["total"][1]) == 7  # type: ignore[index]
    assert all(float(pair[1]) == (7 if name != "kl_nats" else batch.targets_N.numel()) for name, pair in expected[0].items())  # type: ignore[index]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_of_weight_zero_changes_nothing(loss: DpoLoss) -> None:
    objective = Preference(loss, sft_weight=1.0)
    model, batch = problem(PAIRS, weights=[1, 0, 1])
    result = objective(model, batch)
    result.total.backward()
    alone = run(objective, [PAIRS[0], PAIRS[2]])
    assert float(objective.weight(batch)) == 2
    assert total_of(result) == pytest.approx(alone[0], rel=1e-6)
    gradient = model.logprobs_N.grad
    assert gradient is not None
    assert gradient[5:10].tolist() == [0] * 5
    assert [*gradient[:5].tolist(), *gradient[10:].tolist()] == pytest.approx(alone[1], rel=1e-6)
    for name, pair in alone[2].metrics.items():
        torch.testing.assert_close(torch.stack(result.metrics[name]), torch.stack(pair), msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_sft_weight_adds_the_chosen_answers_mean_nll(loss: DpoLoss) -> None:
    plain, more = run(Preference(loss), PAIRS), run(Preference(loss, sft_weight=0.75), PAIRS)
    nll = [-sum(policy[0]) / len(policy[0]) for policy, _ in PAIRS]
    assert more[0] - plain[0] == pytest.approx(0.75 * sum(nll), rel=1e-5)
    added = [b - a for a, b in zip(plain[1], more[1], strict=True)]
    chosen = [[-0.75 / len(w)] * len(w) + [0.0] * len(r) for (w, r), _ in PAIRS]
    assert added == pytest.approx(list(itertools.chain(*chosen)), abs=1e-6)
    assert [float(x) for x in more[2].metrics["nll_chosen_nats"]] == pytest.approx([sum(nll), 3])


@pytest.mark.parametrize("objective", [Preference(loss, 0.3, simpo_gamma=5.0) for loss in LOSSES], ids=lambda o: o.loss.value)
def test_metrics(objective: Preference) -> None:
    """Rewards are β times what the loss compares, without SimPO's margin; log-probabilities are sums over the answer."""
    metrics = {name: float(total) / float(count) for name, (total, count) in run(objective, PAIRS)[2].metrics.items()}
    assert all(not pair[0].requires_grad for pair in run(objective, PAIRS)[2].metrics.values())
    rewards = []
    for policy, reference in PAIRS:
        for said, known in zip(policy, reference, strict=True):
            score = sum(said) - (sum(known) if objective.loss.needs_reference else 0)
            rewards.append(0.3 * score / (len(said) if objective.loss.averages_length else 1))
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = [w - r for w, r in zip(chosen, rejected, strict=True)]
    assert 0 < sum(m > 0 for m in margins) < 3
    wanted = {
        "accuracy": sum(m > 0 for m in margins) / 3,
        "reward_margin": sum(margins) / 3,
        "reward_chosen": sum(chosen) / 3,
        "reward_rejected": sum(rejected) / 3,
        "logprob_chosen_nats": sum(sum(policy[0]) for policy, _ in PAIRS) / 3,
        "logprob_rejected_nats": sum(sum(policy[1]) for policy, _ in PAIRS) / 3,
        "nll_chosen_nats": -sum(sum(policy[0]) / len(policy[0]) for policy, _ in PAIRS) / 3,
        "policy_accuracy": sum(sum(w) / len(w) > sum(r) / len(r) for (w, r), _ in PAIRS) / 3,
    }
    if objective.loss.needs_reference:
        ratios = [a - b for pair in PAIRS for said, known in zip(*pair, strict=True) for a, b in zip(said, known, strict=True)]
        wanted["kl_nats"] = sum(math.exp(ratio) - 1 - ratio for ratio in ratios) / len(ratios)
    assert metrics == pytest.approx(wanted, rel=1e-5)
    assert objective.derived({}) == {}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tie_counts_as_wrong(loss: DpoLoss) -> None:
    tie = (([-1.0, -1.0], [-1.0, -1.0]), ([-2.0, -2.0], [-2.0, -2.0]))
    metrics = run(Preference(loss), [tie])[2].metrics
    assert [[float(x) for x in metrics[name]] for name in ("accuracy", "policy_accuracy")] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("loss", REFERENCED)
def test_kl_is_zero_at_equality_and_positive_elsewhere(loss: DpoLoss) -> None:
    for policy, _ in PAIRS:
        assert float(run(Preference(loss), [(policy, policy)])[2].metrics["kl_nats"][0]) == 0
        for shift in (-0.5, -0.01, 0.01, 0.5):
            moved = tuple([x + shift for x in answer] for answer in policy)
            assert float(run(Preference(loss), [(policy, moved)])[2].metrics["kl_nats"][0]) > 0  # type: ignore[list-item]


def test_kl_estimates_the_divergence() -> None:
    """Averaged over samples of the reference it is KL(reference ‖ policy), computed here by summing over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, generator=generator).log_softmax(-1) for _ in range(2))
    tokens = torch.multinomial(reference.exp(), 40_000, replacement=True, generator=generator)
    half = len(tokens) // 2
    policies, references = ([x[tokens[:half]].tolist(), x[tokens[half:]].tolist()] for x in (policy, reference))
    total, count = run(Preference(), [(tuple(policies), tuple(references))])[2].metrics["kl_nats"]  # type: ignore[arg-type]
    exact = float((reference.exp() * (reference - policy)).sum())
    assert float(total / count) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_router_loss_of_experts_weighs_like_the_pairs(loss: DpoLoss) -> None:
    """A mean of its own, so it is added once a pair: its share of a step does not depend on the cut."""
    model, batch = problem(PAIRS, weights=[1, 0, 1])
    plain = total_of(Preference(loss)(model, batch))
    model.router = nn.Parameter(torch.tensor(0.25))
    result = Preference(loss)(model, batch)
    assert total_of(result) == pytest.approx(plain + 2 * 0.25, rel=1e-6)
    result.total.backward()
    assert float(model.router.grad) == 2  # type: ignore[arg-type]
    assert [float(x) for x in result.metrics["router_loss"]] == [0.5, 2]
