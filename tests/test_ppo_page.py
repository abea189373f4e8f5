"""The learning run of examples/: what its figures and verdicts say, on rows made by hand. Nothing is trained here."""

from __future__ import annotations

from typing import Any

import pytest
from ppo_page import Summary, curve, end_mean, nearest, page, summarise, verdicts
from ppo_smollm2 import PPO, VARIANTS, as_words, asked_before, parse, ppo_words

GOOD = "In short: Rest.\n\nWhat to do:\n- Sleep.\n- Drink.\n\nSee a doctor if: it lasts."


def row(output: str, score: float | None, reason: str = "stop", **more: Any) -> dict[str, Any]:
    scored = {} if score is None else {"score": score}
    asked = {"messages": [{"role": "user", "content": "why?"}]}
    return {"output": output, "n_tokens": len(output.split()), "stop_reason": reason, **asked, **scored, **more}


def test_summary() -> None:
    found = summarise([row(GOOD, 3.0), row("Just rest", 1.0), row("and so on", 2.0, "length"), row("", None)])
    assert found.answers == 4
    assert found.empty == 1
    assert found.mean == pytest.approx(2.0)
    assert found.std == pytest.approx((2 / 3) ** 0.5)  # of the three that have a score
    assert found.style == 0.25  # an empty answer counts as one that does not keep it
    assert found.stopped == 0.75
    assert found.tokens == pytest.approx((len(GOOD.split()) + 2 + 3 + 0) / 4)


def summary(mean: float, std: float = 2.0, style: float = 0.5) -> Summary:
    return Summary(40, 0, mean, std, style, 1.0, 90.0)


@pytest.mark.parametrize(
    ("after", "kl", "holds"),
    [
        (summary(3.0), 5.0, [True, True, True]),
        (summary(2.99), 5.0, [False, True, True]),  # by 1.99 where 2 are asked for
        (summary(3.0, std=5.0), 5.0, [True, True, True]),  # the SFT model's deviation counts, not that of PPO's answers
        (summary(3.0, style=0.49), 5.0, [True, False, True]),
        (summary(3.0), 10.01, [True, True, False]),
        (summary(3.0), None, [True, True, False]),  # what was not measured does not hold
    ],
)
def test_verdicts(after: Summary, kl: float | None, holds: list[bool]) -> None:
    assert [held for _, _, held in verdicts(summary(1.0), after, kl, 10.0)] == holds


def test_scores_that_do_not_vary_prove_nothing() -> None:
    assert not verdicts(summary(1.0, std=0.0), summary(3.0), 1.0, 10.0)[0][2]


def test_answers_without_any_score_prove_nothing() -> None:
    mute = summarise([row("", None), row(" ", None)])
    assert mute.empty == 2
    assert mute.mean != mute.mean  # not a number
    assert not verdicts(summary(1.0), mute, 1.0, 10.0)[0][2]
    assert not verdicts(mute, summary(1.0), 1.0, 10.0)[0][2]


def test_nearest_prefers_fewer_steps() -> None:
    assert nearest({4: 0.1, 8: 0.4, 12: 0.9}, 0.3) == 8
    assert nearest({8: 0.4, 4: 0.2}, 0.3) == 4


LOG = [{"step": 0, "eval_score": -1.0}] + [
    {"step": step, "score": float(step), "score_std": 1.0, "kl_nats": 2.0 * step, "kl_coef": 0.1, "explained_variance": 0.5,
     "entropy_nats": 1.5, "stop_rate": 1.0, "response_tokens": 80.0} for step in range(1, 21)
] + [{"step": 20, "eval_score": 7.5}]  # fmt: skip


def test_end_of_a_run() -> None:
    assert end_mean(LOG, "kl_nats") == pytest.approx(31.0)  # of rollouts 11 to 20
    assert end_mean(LOG, "eval_score") == pytest.approx(3.25)
    assert end_mean(LOG, "no such metric") is None


def test_curve() -> None:
    lines = curve(LOG, every=5).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["1", "5", "10", "15", "20"]
    assert lines[-1].endswith("| 7.5 |")
    assert lines[-2].endswith("|  |")


def test_page_says_what_does_not_hold() -> None:
    rows = [
        row(output, score, model=name, mode=mode)
        for name, output, score in (("sft", "Just rest", -2.5), ("ppo-adapter", GOOD, 4.25))
        for mode in ("greedy", "sampled")
    ]
    figures = {"answers": 1, "empty": 0, "mean": 1.0, "std": 2.0, "style": 0.25, "stopped": 1.0, "tokens": 9.0}
    checks = verdicts(summary(1.0), summary(2.0), 4.0, 10.0)
    report = {
        "model": "tiny", "command": "python x.py", "device": "a card", "minutes": 7.0, "every": 5, "rm_accuracy": 0.975,
        "answers": {name: {mode: figures for mode in ("greedy", "sampled")} for name in ("sft", "ppo-adapter")},
        "runs": {"adapter": {"ended": "time", "rollouts": 20, "score": 15.5, "kl_nats": 31.0, "explained_variance": 0.5,
                             "seconds": 6.0, "log": LOG, "verdicts": {"greedy": checks, "sampled": checks}}},
        "sft": {4: 0.1, 8: 0.4}, "commands": {"rm": "posttrain rm --x y"},
    }  # fmt: skip
    text = page(report, rows)
    assert text.count("DOES NOT HOLD") == 2
    assert text.count("| holds |") == 4
    assert "Ended by: time; 20 rollouts." in text
    assert "40% after 8 steps" in text
    assert "posttrain rm --x y" in text
    assert "98%" in text
    assert GOOD in text
    assert "-2.50" in text


def test_held_out_questions_are_not_prompts() -> None:
    asked = [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}]
    assert asked_before(asked, asked) == ["Why?"]
    assert asked_before(asked, [{"conversations": [{"from": "human", "value": "How?"}]}]) == []


def test_flags_of_a_variant() -> None:
    assert as_words({"a": 1, "b": None, "c": True}) == ["--a", "1", "--c", "True"]
    chosen = parse([])
    words = {name: [str(word) for word in ppo_words("base", name, chosen)] for name in VARIANTS}
    assert "trunk" in words["trunk"]
    assert "trunk" not in words["adapter"]
    assert "--adap_kl_ctrl" in words["adapter"]
    assert "--adap_kl_ctrl" not in words["fixed"]
    assert words["adapter"][words["adapter"].index("--temperature") + 1] == str(PPO["temperature"])


def test_quick_changes_defaults_and_a_flag_still_wins() -> None:
    assert parse(["--quick"]).rollouts < parse([]).rollouts
    assert parse(["--quick", "--rollouts", "7"]).rollouts == 7
