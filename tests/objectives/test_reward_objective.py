"""The reward model's loss: Bradley–Terry by hand, margin, centring, where scores are read, what evaluation reports about them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from posttrain.data.pack import split
from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart, collate_pairs_padded
from posttrain.model.reward import SequenceScores
from posttrain.objectives.reward import CALIBRATION_BINS, Reward
from posttrain.training.sums import Sums, averages
from posttrain.types import Loss, PackedBatch

COLLATIONS = [collate_pairs, collate_pairs_apart, collate_pairs_padded]
# (score of the chosen answer, of the rejected one, margin, tokens of the chosen answer, of the rejected one)
Case = tuple[float, float, float, int, int]
CASES: list[Case] = [
    (1.5, -0.5, 0.0, 5, 2), (-2.0, 0.75, 0.5, 3, 3), (0.25, 0.25, 1.0, 1, 4), (3.0, -4.0, 2.5, 2, 1), (-0.5, -1.0, 0.0, 2, 6),
    (0.5, 2.0, 0.0, 7, 6),
]  # fmt: skip


class Scorer(nn.Module):
    """A model whose scores are given by pair, read off the token where it is asked: the last token of each answer is its own."""

    def __init__(self, scores: Sequence[float], router_loss: float | None = None):
        super().__init__()
        self.score_by_token = nn.Parameter(torch.tensor([math.nan, *scores]))  # token 0 and all others of a row say NaN
        self.router = None if router_loss is None else nn.Parameter(torch.tensor(router_loss))

    def forward(self, input_ids: Tensor, score_at_S: Tensor, **_: Any) -> SequenceScores:
        return SequenceScores(self.score_by_token[input_ids.flatten()[score_at_S]], self.router)


def problem(cases: Sequence[Case], weights: Sequence[float] | None = None) -> tuple[Scorer, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for index, (_, _, margin, n_chosen, n_rejected) in enumerate(cases):
        lengths = {"chosen_ids": n_chosen, "rejected_ids": n_rejected}
        answers = {name: [0] * (n - 1) + [2 * index + 1 + k] for k, (name, n) in enumerate(lengths.items())}
        weight = 1 if weights is None else weights[index]
        rows.append({"prompt_ids": [0] * (index % 3 + 1), **answers, "margin": margin, "weight": weight})
    return Scorer([score for case in cases for score in case[:2]]), rows


def run(
    objective: Reward, cases: Sequence[Case], collate: Callable[[Any], PackedBatch] = collate_pairs
) -> tuple[float, list[float], Loss]:
    """Total, gradient by score, and all that the objective returns."""
    model, rows = problem(cases)
    loss = objective(model, collate(rows))
    loss.total.backward()
    assert model.score_by_token.grad is not None
    return float(loss.total.detach()), model.score_by_token.grad[1:].tolist(), loss


def by_hand(cases: Sequence[Case], center: float) -> float:
    """Σ −log P(chosen beats rejected by the margin) + c (sum of scores)², with Bradley–Terry's P as a ratio of strengths."""
    return sum(
        -math.log(math.exp(w - margin) / (math.exp(w - margin) + math.exp(r))) + center * (w + r) ** 2
        for w, r, margin, *_ in cases
    )


def value(loss: Loss, name: str) -> float | None:
    total, count = (float(x) for x in loss.metrics[name])
    return total / count if count else None


@pytest.mark.parametrize("collate", COLLATIONS)
@pytest.mark.parametrize("center", [0.0, 0.01, 0.5])
def test_values_and_gradients(center: float, collate: Callable[[Any], PackedBatch]) -> None:
    """Scores are read at each answer's last token, in every collation: anywhere else the model says NaN."""
    total, gradient, _ = run(Reward(center), CASES, collate)
    assert total == pytest.approx(by_hand(CASES, center), rel=1e-6)
    step = 1e-5
    for index, k in itertools.product(range(len(CASES)), (0, 1)):
        ends = []
        for sign in (1, -1):
            moved = list(CASES[index])
            moved[k] += sign * step
            ends.append(by_hand([*CASES[:index], tuple(moved), *CASES[index + 1 :]], center))  # type: ignore[list-item]
        assert gradient[2 * index + k] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-6)


def test_a_margin_asks_for_more() -> None:
    """ln 2 where the scores differ by just the margin; the chosen answer is pushed up and the rejected one down, more if it is larger."""
    for margin in (0.0, 0.5, 3.0):
        total, gradient, _ = run(Reward(), [(1.0 + margin, 1.0, margin, 2, 2)])
        assert total == pytest.approx(math.log(2), rel=1e-6)
        assert gradient == pytest.approx([-0.5, 0.5], rel=1e-6)
    results = [run(Reward(), [(1.0, 0.5, margin, 2, 2)]) for margin in (0.0, 1.0, 2.0)]
    assert all(a[0] < b[0] and a[1][0] > b[1][0] and a[1][1] < b[1][1] for a, b in itertools.pairwise(results))


def test_centring_pulls_the_sum_to_zero_and_nothing_else() -> None:
    """Bradley–Terry alone does not mind a shift of all scores; the centring term is 0 at r_w = −r_l and pulls both scores alike."""
    shifted = [(w + 3, r + 3, *rest) for w, r, *rest in CASES]
    assert run(Reward(), shifted)[0] == pytest.approx(run(Reward(), CASES)[0], rel=1e-5)  # type: ignore[arg-type]
    assert run(Reward(0.1), shifted)[0] > run(Reward(0.1), CASES)[0] + 1  # type: ignore[arg-type]
    for w, r in ((2.0, -2.0), (1.5, 0.5), (-1.0, -3.0)):
        plain, centred = run(Reward(), [(w, r, 0.0, 1, 1)]), run(Reward(0.25), [(w, r, 0.0, 1, 1)])
        assert centred[0] - plain[0] == pytest.approx(0.25 * (w + r) ** 2, abs=1e-5)
        pulls = [b - a for a, b in zip(plain[1], centred[1], strict=True)]
        assert pulls == pytest.approx([0.5 * (w + r)] * 2, abs=1e-5)


@pytest.mark.parametrize("gap", [-80.0, -20.0, 20.0, 80.0])
def test_far_apart_scores_stay_finite(gap: float) -> None:
    total, gradient, _ = run(Reward(), [(gap, 0.0, 0.0, 1, 1)])
    assert total == pytest.approx(math.log1p(math.exp(-abs(gap))) + max(-gap, 0), abs=1e-6)
    assert gradient == pytest.approx([-1.0, 1.0] if gap < 0 else [0.0, 0.0], abs=1e-6)


# ---------------------------------------------------------------- metrics


def test_metrics() -> None:
    _, _, loss = run(Reward(), CASES)
    gaps = [w - r for w, r, *_ in CASES]
    right = [gap > 0 for gap in gaps]
    longer = [a for a, (*_, n, m) in zip(right, CASES, strict=True) if n > m]
    shorter = [a for a, (*_, n, m) in zip(right, CASES, strict=True) if n < m]
    assert (len(longer), len(shorter)) == (3, 2)
    assert {name: value(loss, name) for name in loss.metrics if not name.startswith("_")} == pytest.approx(
        {
            "accuracy": sum(right) / 6,
            "accuracy_chosen_longer": sum(longer) / 3,
            "accuracy_chosen_shorter": sum(shorter) / 2,
            "margin": sum(gaps) / 6,
            "score_chosen": sum(w for w, *_ in CASES) / 6,
            "score_rejected": sum(r for _, r, *_ in CASES) / 6,
        }
    )
    assert not any(total.requires_grad for total, _ in loss.metrics.values())


def test_a_tie_counts_as_wrong() -> None:
    _, _, loss = run(Reward(), [(0.5, 0.5, 0.0, 2, 1), (0.5, 0.5, 0.0, 1, 2)])
    assert [value(loss, f"accuracy{which}") for which in ("", "_chosen_longer", "_chosen_shorter")] == [0, 0, 0]


def test_a_model_that_likes_length_shows() -> None:
    """Its accuracy is 1 where the chosen answer is the longer one and 0 where it is the shorter one; equal lengths are in neither."""
    lengths = [(5, 2), (2, 5), (7, 1), (3, 3), (1, 4), (4, 1)]
    _, _, loss = run(Reward(), [(float(n), float(m), 0.0, n, m) for n, m in lengths])
    assert (value(loss, "accuracy_chosen_longer"), value(loss, "accuracy_chosen_shorter")) == (1, 0)
    assert [float(loss.metrics[f"accuracy_chosen_{which}"][1]) for which in ("longer", "shorter")] == [3, 2]
    _, _, loss = run(Reward(), [(2.0, 1.0, 0.0, 3, 3)])
    assert value(loss, "accuracy_chosen_longer") is value(loss, "accuracy_chosen_shorter") is None


def calibration(cases: Sequence[Case]) -> float:
    """Expected calibration error, directly: by bin of confidence, |share right − mean confidence|, weighted by the bin's share."""
    gap = np.array([w - r for w, r, *_ in cases], dtype=np.float64)
    confidence, right = 1 / (1 + np.exp(-np.abs(gap))), gap > 0
    edges = np.linspace(0.5, 1, CALIBRATION_BINS + 1)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def evaluated(objective: Reward, model: Scorer, batches: Sequence[PackedBatch]) -> dict[str, float]:
    """What an evaluation over these micro-batches reports, by the trainer's own sums."""
    sums = Sums(lambda tensor: tensor)
    for batch in batches:
        for name, (total, count) in objective(model, batch).metrics.items():
            sums.add(name, total, count)
    totals = sums.totals()
    return averages(totals) | objective.derived(totals)


GAP = st.floats(-6, 6).filter(lambda gap: all(abs(abs(gap) - math.log((10 + k) / (10 - k))) > 1e-3 for k in range(1, 10)))


@given(st.lists(st.tuples(GAP, st.floats(-2, 2)), min_size=1, max_size=40), st.integers(1, 7), st.sampled_from(COLLATIONS))
@settings(max_examples=80, deadline=None)
def test_calibration_error(scores: list[tuple[float, float]], batch_pairs: int, collate: Callable[[Any], PackedBatch]) -> None:
    """Over several micro-batches it is that of all pairs at once: it is no average of the micro-batches' errors."""
    cases: list[Case] = [(float(np.float32(gap / 2 + mid)), float(np.float32(mid - gap / 2)), 0.0, 1, 1) for gap, mid in scores]
    model, rows = problem(cases)
    batches = [collate(rows[i : i + batch_pairs]) for i in range(0, len(rows), batch_pairs)]
    reported = evaluated(Reward(), model, batches)
    assert reported["calibration_error"] == pytest.approx(calibration(cases), abs=1e-6)
    assert not any(name.startswith("_") for name in reported)
    assert {"accuracy", "margin", "score_chosen", "score_rejected"} <= set(reported)


def test_calibration_of_an_honest_and_a_boastful_model() -> None:
    """Sure to 7/8 and right seven times in eight: no error; sure to 99 % and right as often as a coin: an error of 49 %."""
    honest = [(math.log(7) * (-1 if i == 0 else 1), 0.0, 0.0, 1, 1) for i in range(8)]
    boastful = [(math.log(99) * (-1) ** i, 0.0, 0.0, 1, 1) for i in range(10)]
    certain = [(60.0 * (-1) ** i, 0.0, 0.0, 1, 1) for i in range(10)]  # a confidence of 1 to the last bit is in the last bin
    for cases, expected in ((honest, 0.0), (boastful, 0.49), (certain, 0.5)):
        model, rows = problem(cases)
        assert evaluated(Reward(), model, [collate_pairs(rows)])["calibration_error"] == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- sums and weights


@pytest.mark.parametrize("collate", COLLATIONS)
def test_sums_do_not_depend_on_the_cut(collate: Callable[[Any], PackedBatch]) -> None:
    """Whole, cut anywhere, pair by pair, in another order, with fillers: the same total, gradient, weight and metric sums."""
    objective = Reward(0.1)
    _, rows = problem(CASES)
    filler = {**rows[3], "weight": 0}
    ways = [[collate_pairs(rows)], [collate([row]) for row in rows], [collate(rows[::-1])]]
    ways += [[collate([filler, *rows]), collate([filler])]] + [split(collate(rows), n) for n in (1, 8, 14, 20)]
    expected = None
    for way in ways:
        model, _ = problem(CASES)
        found: dict[str, Tensor] = {}
        for part in way:
            loss = objective(model, part)
            loss.total.backward()
            sums = {"total": (loss.total.detach(), objective.weight(part)), **loss.metrics}
            found = {name: found.get(name, torch.zeros(2)) + torch.stack(pair) for name, pair in sums.items()}
        gradient = model.score_by_token.grad
        assert gradient is not None
        expected = expected or (found, gradient)
        assert found.keys() == expected[0].keys()
        for name, pair in found.items():
            torch.testing.assert_close(pair, expected[0][name], rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    assert float(expected[0]["total"][1]) == len(CASES)  # type: ignore[index]


def test_a_pair_of_weight_zero_changes_nothing() -> None:
    objective = Reward(0.3)
    model, rows = problem(CASES, weights=[1, 0, 1, 1, 0, 1])
    result = objective(model, collate_pairs(rows))
    result.total.backward()
    total, gradient, alone = run(objective, [CASES[i] for i in (0, 2, 3, 5)])
    assert float(objective.weight(collate_pairs(rows))) == 4
    assert float(result.total.detach()) == pytest.approx(total, rel=1e-6)
    assert model.score_by_token.grad is not None
    found = model.score_by_token.grad[1:].unflatten(0, (-1, 2))
    assert found[[1, 4]].tolist() == [[0, 0], [0, 0]]
    assert found[[0, 2, 3, 5]].flatten().tolist() == pytest.approx(gradient, rel=1e-6)
    for name, pair in alone.metrics.items():
        torch.testing.assert_close(torch.stack(result.metrics[name]), torch.stack(pair), msg=name)


def test_fillers_alone_are_no_evaluation_fault() -> None:
    """A rank that got fillers only: sums of nothing, and no division by zero."""
    model, rows = problem(CASES, weights=[0] * len(CASES))
    assert evaluated(Reward(), model, [collate_pairs(rows)]) == {"calibration_error": 0}


def test_the_router_loss_of_experts_weighs_like_the_pairs() -> None:
    model, rows = problem(CASES, weights=[1, 0, 1, 1, 1, 1])
    plain = float(Reward()(model, collate_pairs(rows)).total.detach())
    model.router = nn.Parameter(torch.tensor(0.25))
    result = Reward()(model, collate_pairs(rows))
    result.total.backward()
    assert float(result.total.detach()) == pytest.approx(plain + 5 * 0.25, rel=1e-6)
    assert float(model.router.grad) == 5  # type: ignore[arg-type]
    assert [float(x) for x in result.metrics["router_loss"]] == [1.25, 5]
