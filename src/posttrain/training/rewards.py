"""Where PPO's scores come from: a reward model, functions of the user's, or a weighted sum of several."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.training.episodes import Episode
from posttrain.training.token_scores import Scorer
from posttrain.types import UserError


class RewardSource(Protocol):
    """Gives every episode a score. `name` is what its scores are called in the metrics."""

    @property
    def name(self) -> str: ...

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """One finite score per episode, in their order."""
        ...


@dataclass(frozen=True)
class TokenReward:
    """A reward model with the policy's tokenizer and template: it reads the very ids that were sampled, and scores the last."""

    name: str
    scorer: Scorer
    bias: float = 0.0  # added to every score

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """Raises UserError for a score that is no number."""
        scores = self.scorer([(episode.prompt_ids, episode.answer_ids) for episode in episodes])
        return [score + self.bias for score in checked_scores(self.name, episodes, scores)]


@dataclass(frozen=True)
class Weighted:
    """The sum of weight · score over sources whose names differ."""

    sources: tuple[RewardSource, ...]
    weights: tuple[float, ...]
    name: str = "sum"

    def scores_by_source(self, episodes: Sequence[Episode]) -> tuple[list[float], dict[str, list[float]]]:
        """The weighted sums, and every source's own scores."""
        by_source = {source.name: source(episodes) for source in self.sources}
        rows = zip(*by_source.values(), strict=True)
        return [sum(w * s for w, s in zip(self.weights, row, strict=True)) for row in rows], by_source

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """The weighted sums."""
        return self.scores_by_source(episodes)[0]


def checked_scores(who: str, episodes: Sequence[Episode], scores: Sequence[Any]) -> list[float]:
    """The scores as floats. Raises UserError where they are not one finite number per episode."""
    if len(scores) != len(episodes):
        raise UserError(f"{who}: gave {len(scores)} scores for {len(episodes)} answers")
    for episode, score in zip(episodes, scores, strict=True):
        if not isinstance(score, numbers.Real):
            raise UserError(f"{who}: gave {str(score)[:40]!r} ({type(score).__name__}) for {episode.source}, not a number")
        if not math.isfinite(score):
            raise UserError(f"{who}: gave {score} for {episode.source}; a score must be a finite number")
    return [float(score) for score in scores]
