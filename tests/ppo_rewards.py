"""Rewards of the PPO tests: `--reward_func tests/ppo_rewards.py:name`."""

from __future__ import annotations

from collections.abc import Sequence


def vowels(answers: Sequence[str]) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in answer) / max(len(answer), 1) for answer in answers]


def constant(answers: Sequence[str]) -> list[float]:
    """The same for every answer: nothing to learn."""
    return [0.5 for _ in answers]


def has_gold(answers: Sequence[str], gold: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """Whether the answer has the letter that its prompt's row calls gold; every row has another line number."""
    assert len(set(columns["line"])) > 1
    return [float(letter in answer) for answer, letter in zip(answers, gold, strict=True)]


def raises(answers: Sequence[str]) -> list[float]:
    """A mistake of the user's."""
    return [float(answer[99]) for answer in answers]


def short(answers: Sequence[str]) -> list[float]:
    """A score too few."""
    return [0.0] * (len(answers) - 1)


def none_of(answers: Sequence[str]) -> list[float]:
    """Not numbers."""
    return [float("nan") for _ in answers]
