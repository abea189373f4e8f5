"""The parts of the benchmarks that decide what a figure means, without TRL and without a model of any size."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by name, as a script in its folder would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = [file.stem for file in BENCHMARKS.glob("*.py")]
    yield lambda name: __import__(name)
    for name in own:
        sys.modules.pop(name, None)


def test_a_step_is_credited_with_its_own_batch_though_the_loader_reads_ahead(benchmarks: Any) -> None:
    common = benchmarks("common")
    clock = common.StepClock()
    collate = common.counted(list, clock, len)
    batches = [[0] * 7, [0] * 5, [0] * 3]
    collate(batches[0])
    for upcoming in [*batches[1:], None]:  # the next batch is collated before the step ends
        if upcoming is not None:
            collate(upcoming)
        clock.end_step()
    assert clock.units == [7, 5, 3]
    clock.ends = [10.0, 12.0, 14.0]
    assert clock.units_per_second() == (5 + 3) / 4


def test_synthetic_pairs_have_the_ratio_and_one_length(benchmarks: Any) -> None:
    dpo, pairs = benchmarks("dpo"), benchmarks("pairs")
    for ratio in (0.3, 1.0, 3.0):
        for row in dpo.synthetic_pairs(ratio):
            assert pairs.longest_sequence(row) == dpo.SYNTHETIC_TOKENS
            assert len(row["prompt_ids"]) / len(row["chosen_ids"]) == pytest.approx(ratio, rel=0.02)
            assert row["chosen_ids"] != row["rejected_ids"]


def test_contenders_start_alike_whatever_wraps_their_modules(benchmarks: Any) -> None:
    def wrapped(prefix: str, depth: int) -> nn.Module:
        layer: nn.Module = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})})
        model = nn.ModuleDict({"layers": nn.ModuleList([layer]), "score": nn.ModuleDict({"head": nn.Linear(6, 1, bias=False)})})
        for _ in range(depth):
            model = nn.ModuleDict({prefix: model})
        return model

    one, other = wrapped("base_model", 1), wrapped("model", 3)
    for model in (one, other):
        benchmarks("pairs").same_start(model)
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert len(pairs) == 2
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in pairs)


def test_the_report_compares_with_the_better_mode_in_each_respect(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def result(end_to_end: float, per_second: float, peak_bytes: float) -> dict[str, Any]:
        exact = {"losses": [0.7, 0.6], "margins": [0.0, 0.1]}
        return {"end_to_end": end_to_end, "per_second": per_second, "peak_bytes": peak_bytes, "losses": [0.7], "float32": exact}

    results = {"ours": result(3.0, 4.0, 40.0), "trl": result(1.0, 1.0, 100.0), "trl_precompute": result(0.9, 2.5, 120.0)}
    results["trl"]["float32"] = {"losses": [0.7, 0.65], "margins": [0.0, 0.1]}
    ratios = benchmarks("pairs").report(results, {"end_to_end": 2.5, "per_second": 2.0})
    assert {key: (ratios[key]["beside"], ratios[key]["reached"]) for key in ("end_to_end", "per_second", "peak_bytes")} == {
        "end_to_end": ("trl", True),
        "per_second": ("trl_precompute", False),
        "peak_bytes": ("trl", True),
    }
    assert ratios["gaps to trl"]["fp32 losses, largest"] == pytest.approx(0.05)
    assert capsys.readouterr().out.count("MISSED") == 1


def test_texts_have_exactly_the_tokens_that_are_wanted(benchmarks: Any) -> None:
    ppo = benchmarks("ppo")

    def tokens(text: str) -> int:
        return 5 + sum(2 if word == "long" else 1 for word in text.split())  # a template's own, and a word of two

    for seed in range(20):
        assert tokens(ppo.words_of(["a", "long", "b"], 30, tokens, random.Random(seed))) == 30
    with pytest.raises(ValueError, match="less than what stands around"):
        ppo.words_of(["a"], 4, tokens, random.Random(0))


def test_every_second_of_a_ppo_step_is_in_one_part(benchmarks: Any) -> None:
    times = iter([0.0, 10.0, 17.0, 30.0, 40.0, 45.0, 60.0])
    timeline = benchmarks("ppo_trl").Timeline(lambda: next(times))
    for scored in (2.0, 1.0):
        timeline.generated()
        timeline.scored(scored / 2)  # two micro-batches are scored, and each is trained on in each of two epochs
        timeline.scored(scored / 2)
        for _ in range(4):
            timeline.training()
        timeline.end_step()
    assert timeline.steps == [
        {"rollout": 10.0, "score": 2.0, "measure": 5.0, "update": 13.0},
        {"rollout": 10.0, "score": 1.0, "measure": 4.0, "update": 15.0},
    ]


def test_the_ppo_report_judges_speed_and_memory_apart(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def result(per_second: float, peak_bytes: float, update: float) -> dict[str, Any]:
        warm = {"rollout": 1.0, "score": 1.0, "measure": 1.0, "update": update}
        return {"per_second": per_second, "peak_bytes": peak_bytes, "seconds": [dict.fromkeys(warm, 99.0), warm]}

    results = {
        "trl": result(0.2, 100.0, 9.0), "ours": result(0.32, 62.0, 4.0), "ours_trunk": result(0.38, 50.0, 2.0),
        "ours_group": result(0.64, 50.0, 1.0), "ours_sft": {"peak_bytes": 50.0},
    }  # fmt: skip
    ratios = benchmarks("ppo").report(results)
    assert {what: found["reached"] for what, found in ratios.items() if found.get("to_reach")} == {
        "ours / trl, episodes/s": True,
        "ours / trl, peak memory": False,
        "ours_trunk / trl, episodes/s": False,
        "ours_trunk / trl, peak memory": True,
        "ours / ours_sft, peak memory": True,
    }
    assert ratios["ours / ours_sft, peak memory"]["ratio"] == pytest.approx(1.24)
    assert ratios["prefix_sharing_by_part"]["update"] == 4.0
    assert capsys.readouterr().out.count("MISSED") == 2
    assert "ours / trl, episodes/s" not in benchmarks("ppo").report({"ours": results["ours"]})
