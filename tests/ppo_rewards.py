"""Rewards of the PPO tests: `--reward_func tests/ppo_rewards.py:name`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def vowels(answers: Sequence[str]) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in answer) / max(len(answer), 1) for answer in answers]


def constant(answers: Sequence[str]) -> list[float]:
    """The same for every answer: nothing to learn."""
    return [0.5 for _ in answers]


def asked_letter(prompts: Sequence[list[dict[str, Any]]], answers: Sequence[str]) -> list[float]:
    """The share of letters that are the prompt's last letter."""
    return [
        answer.count(prompt[-1]["content"][-1]) / max(len(answer), 1) for prompt, answer in zip(prompts, answers, strict=True)
    ]
