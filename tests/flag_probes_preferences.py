"""Probes of the flags that only preference pairs have: of rm, of dpo, of both, and of `show` for them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flag_probes import Lab, Run, probe
from flag_probes_data import ledger, shown

ALONE = {"per_device_train_batch_size": 1}  # a logged metric is then that of one pair


def long_pairs(lab: Lab) -> dict[str, Any]:
    """Pairs whose prompts have two exchanges before the question."""
    rows = [json.loads(line) for line in lab.pairs.read_text().splitlines()]
    before = [{"from": who, "value": "the quick brown fox"} for who in ("human", "gpt")] * 2
    longer = [{**row, "conversations": [*before, *row["conversations"]]} for row in rows]
    return {"train_file_dir": lab.jsonl(f"{lab.count}-long.jsonl", longer)}


def longest(run: Run, answers: bool) -> int:
    """The longest prompt or the longest answer that was computed."""
    segments = [s for batch in run.batches for s in batch.segments.segments]  # type: ignore[union-attr]
    return max(s.end - s.start for s in segments if (s.parent is not None) is answers)


# --- both -----------------------------------------------------------------------------------------------------------------


@probe("train", "max_source_length")
def max_source_length(lab: Lab) -> None:
    rows = long_pairs(lab)
    for whole, cut in (
        (lab.rm(**rows), lab.rm(**rows, max_source_length=60)),
        (lab.dpo(**rows), lab.dpo(**rows, max_source_length=60)),
    ):
        assert longest(whole, answers=False) > 60 >= longest(cut, answers=False)
        assert (ledger(whole)["truncated_rows"], ledger(cut)["truncated_rows"]) == (0, 17)


@probe("train", "max_target_length")
def max_target_length(lab: Lab) -> None:
    for whole, cut in ((lab.rm(), lab.rm(max_target_length=5)), (lab.dpo(), lab.dpo(max_target_length=5))):
        assert longest(whole, answers=True) > 5 >= longest(cut, answers=True)


@probe("train", "prefix_sharing")
def prefix_sharing(lab: Lab) -> None:
    for shared, apart in ((lab.rm(), lab.rm(prefix_sharing=False)), (lab.dpo(), lab.dpo(prefix_sharing=False))):
        assert all(any(s.parent is not None for s in batch.segments.segments) for batch in shared.batches)  # type: ignore[union-attr]
        assert all(s.parent is None for batch in apart.batches for s in batch.segments.segments)  # type: ignore[union-attr]
        assert len(shared.tokens()) < len(apart.tokens())
        assert shared.logged("loss") == pytest.approx(apart.logged("loss"), abs=1e-5)


# --- rm -------------------------------------------------------------------------------------------------------------------


@probe("train", "center_rewards_coefficient")
def center_rewards_coefficient(lab: Lab) -> None:
    plain, centred = lab.rm(**ALONE), lab.rm(**ALONE, center_rewards_coefficient=2)
    score = plain.logged("score_chosen")[0] + plain.logged("score_rejected")[0]
    assert abs(score) > 0.01
    assert centred.logged("loss")[0] - plain.logged("loss")[0] == pytest.approx(2 * score**2, rel=1e-3)


# --- dpo ------------------------------------------------------------------------------------------------------------------


@probe("train", "loss_type")
def loss_type(lab: Lab) -> None:
    first = {name: lab.dpo(loss_type=name).logged("loss")[0] for name in ("sigmoid", "hinge", "ipo", "robust", "simpo", "orpo")}
    assert [first[name] for name in ("sigmoid", "hinge", "ipo", "robust")] == pytest.approx([math.log(2), 1, 25, math.log(2)])
    assert len({round(value, 5) for value in first.values()}) == 5  # robust without smoothing is sigmoid
    assert [bool(lab.dpo(loss_type=name).logged("kl_nats")) for name in ("sigmoid", "simpo", "orpo")] == [True, False, False]


@probe("train", "beta")
def beta(lab: Lab) -> None:
    one, double, simpo = lab.dpo(), lab.dpo(beta=0.2), lab.dpo(loss_type="simpo", **ALONE)
    assert double.logged("grad_norm")[0] == pytest.approx(2 * one.logged("grad_norm")[0], rel=1e-3)  # at equal policies ∝ β
    reward = simpo.logged("reward_chosen")[0] / -simpo.logged("nll_chosen_nats")[0]
    assert (reward, one.read("run.json")["config"]["beta"]) == (pytest.approx(2.0), 0.1)  # the defaults


@probe("train", "label_smoothing")
def label_smoothing(lab: Lab) -> None:
    one, smooth = lab.dpo(), lab.dpo(label_smoothing=0.25)
    assert smooth.logged("grad_norm")[0] == pytest.approx(one.logged("grad_norm")[0] / 2, rel=1e-3)  # × (1 − 2ε)
    robust = lab.dpo(loss_type="robust", label_smoothing=0.25)
    assert robust.logged("grad_norm")[0] == pytest.approx(2 * one.logged("grad_norm")[0], rel=1e-3)  # / (1 − 2ε)
    assert robust.logged("loss")[2] != one.logged("loss")[2]


@probe("train", "sft_weight")
def sft_weight(lab: Lab) -> None:
    run = lab.dpo(sft_weight=0.5)
    assert run.logged("loss")[0] == pytest.approx(math.log(2) + 0.5 * run.logged("nll_chosen_nats")[0], rel=1e-5)


@probe("train", "simpo_gamma")
def simpo_gamma(lab: Lab) -> None:
    for gamma, run in ((1.0, lab.dpo(loss_type="simpo", **ALONE)), (3.0, lab.dpo(loss_type="simpo", **ALONE, simpo_gamma=3))):
        logit = run.logged("reward_margin")[0] - gamma
        assert run.logged("loss")[0] == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-4)


# --- show -----------------------------------------------------------------------------------------------------------------


def lengths(lab: Lab, part: str, **flags: Any) -> int:
    """The longest prompt or answer that `show` prints."""
    rows = [row for stage in ("rm", "dpo") for row in shown(lab.good("show", stage=stage, **long_pairs(lab), **flags))]
    assert len(rows) == 34
    return max(len(row[f"{part}_ids"]) for row in rows)


@probe("show", "max_source_length")
def show_max_source_length(lab: Lab) -> None:
    assert lengths(lab, "prompt") > 60 >= lengths(lab, "prompt", max_source_length=60)


@probe("show", "max_target_length")
def show_max_target_length(lab: Lab) -> None:
    assert lengths(lab, "chosen") > 5 >= lengths(lab, "chosen", max_target_length=5)
