"""Each guard says its line when it should, and nothing otherwise."""

from __future__ import annotations

import json
import math
import re

import pytest

from posttrain.objectives.guards import Guards, GuardSettings, early_stop

HEALTHY = {"kl_nats": 3.0, "entropy_nats": 2.0, "stop_rate": 0.8, "response_tokens": 40.0, "score": 0.1}
STRICT = GuardSettings(kl_target_nats=6.0, first_steps=2, patience_steps=2)


def lines(guards: Guards, steps: list[dict[str, float]], first: int = 1) -> list[str | None]:
    return [guards.check(first + i, HEALTHY | step) for i, step in enumerate(steps)]


def test_a_healthy_run_goes_on() -> None:
    wave = [{"kl_nats": 3 + 8 * (i % 2), "entropy_nats": 2 - 0.05 * i, "response_tokens": 40.0 + i} for i in range(30)]
    assert lines(Guards(STRICT), wave) == [None] * 30


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"kl_nats": 12.5}, r"step 4: KL to the reference 12\.5 nats is above 12 \(target 6 × 2\)"),
        ({"entropy_nats": 0.19}, r"step 4: entropy collapsed to 0\.19 nats a token from 2 in"),
        ({"stop_rate": 0.39}, r"step 4: only 39% of the responses end in a stop token, 80% in"),
        ({"response_tokens": 161.0}, r"step 4: responses have 161\.0 tokens on average, 40\.0 in"),
        ({"response_tokens": 9.9}, r"step 4: responses have 9\.9 tokens on average, 40\.0 in"),
    ],
)
def test_each_guard_needs_its_steps_in_a_row(bad: dict[str, float], said: str) -> None:
    said_lines = lines(Guards(STRICT), [{}, {}, bad, bad])
    assert said_lines[:3] == [None] * 3
    assert said_lines[3] is not None
    assert re.search(said, said_lines[3])
    assert "2 steps in a row" in said_lines[3]
    assert lines(Guards(STRICT), [{}, {}, bad, {}, bad, {}]) == [None] * 6


@pytest.mark.parametrize(
    "edge", [{"kl_nats": 12.0}, {"entropy_nats": 0.2}, {"stop_rate": 0.4}, {"response_tokens": 160.0}, {"response_tokens": 10.0}]
)
def test_the_edge_is_allowed(edge: dict[str, float]) -> None:
    assert lines(Guards(STRICT), [{}, {}, *[edge] * 5]) == [None] * 7


def test_the_reference_point_is_the_mean_of_the_first_steps_and_stays() -> None:
    """100 tokens is 2.5 × the first steps' 40, however the later steps went."""
    creeping = [{"response_tokens": x} for x in (30.0, 50.0, 80.0, 120.0, 150.0, 170.0, 170.0)]
    said = lines(Guards(STRICT), creeping)
    assert said[:-1] == [None] * 6
    assert said[-1] is not None
    assert "170.0 tokens on average, 40.0" in said[-1]


def test_the_kl_is_judged_from_the_first_step_on() -> None:
    said = lines(Guards(STRICT), [{"kl_nats": 50.0}, {"kl_nats": 50.0}])
    assert said[0] is None
    assert said[1] is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_at_once(value: float) -> None:
    line = Guards(GuardSettings()).check(1, HEALTHY | {"value_loss": value})
    assert line is not None
    assert "step 1" in line
    assert f"value_loss = {value}" in line


def test_guards_can_be_switched_off() -> None:
    off = GuardSettings(entropy_floor=None, stop_rate_floor=None, length_factor=None, first_steps=1, patience_steps=1)
    awful = {"kl_nats": 1e6, "entropy_nats": 0.0, "stop_rate": 0.0, "response_tokens": 1e5}
    assert lines(Guards(off), [{}, awful, awful]) == [None] * 3


def test_metrics_may_be_missing() -> None:
    guards = Guards(STRICT)
    assert [guards.check(i, {"score": 1.0}) for i in range(5)] == [None] * 5


def test_state_goes_on() -> None:
    """Saved between two bad steps, through JSON: the second one stops the resumed run too."""
    bad = {"entropy_nats": 0.01}
    first = Guards(STRICT)
    assert lines(first, [{}, {}, bad]) == [None] * 3
    saved = json.loads(json.dumps(first.state_dict()))
    second = Guards(STRICT)
    second.load_state_dict(saved)
    (line,) = lines(second, [bad], first=4)
    assert line is not None
    assert lines(first, [bad], first=4) == [line]


@pytest.mark.parametrize("wrong", [{"first_steps": 0}, {"patience_steps": 0}, {"length_factor": 1.0}])
def test_impossible_settings(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GuardSettings(**wrong)


def test_early_stop_of_the_updates() -> None:
    assert early_stop(0.15, 0.1) is None
    assert early_stop(10.0, None) is None
    line = early_stop(0.16, 0.1)
    assert line is not None
    assert "0.16 nats" in line
    assert "0.15 (1.5 × --target_kl 0.1)" in line
