"""PPO learns: the toy task of examples/ppo_tiny.py, from chance to nearly every letter right, through the command line."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import ppo_tiny

from posttrain.cli import main


def test_a_random_model_learns_to_say_what_it_is_asked_for(tmp_path: Path) -> None:
    assert main(ppo_tiny.command_line(tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines]
    assert len(scores) == 100
    assert statistics.fmean(scores[:3]) < 0.15  # chance is about 1/30; a random model says some letters more often
    assert statistics.fmean(scores[-10:]) >= 0.9
    table = ppo_tiny.curve(tmp_path / "run").splitlines()
    assert len(table) == 2 + 11
    assert table[-1].startswith(f"| 100 | {scores[-1]:.3f} |")


def test_the_reward_is_the_share_of_the_letter() -> None:
    asked = [[{"role": "user", "content": f"say {letter}"}] for letter in "abca"]
    assert ppo_tiny.asked_letter(asked, ["aaaa", "ab", "abd", ""]) == [1, 0.5, 0, 0]
