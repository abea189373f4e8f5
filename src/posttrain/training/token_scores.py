"""Scores of answers by a reward model that reads the policy's own tokens, and the bias that sets their mean to 0."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.pack_branches import Branches, collate_branches, collate_branches_padded
from posttrain.model.attention import evaluation
from posttrain.types import PackedBatch, UserError

BIAS_FILE = "reward.json"
BIAS_ROWS = 512  # the mean of so many scores is known to 1/20 of their standard deviation

Ids = Sequence[int]


@dataclass(frozen=True)
class Scorer:
    """Token sequences → scores, in micro-batches; answers to one prompt share it where the model takes segments.

    `score` is how a batch is scored; None: by the model itself, after `install_scores`. It reads the last token of each sequence.
    """

    model: nn.Module
    packed: bool
    batch_rows: int  # answers of a micro-batch
    batch_tokens: int = 0  # of a micro-batch, at least one answer; 0: no limit
    score: Callable[[PackedBatch], Tensor] | None = None

    def __call__(self, sequences: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Scores of (prompt ids, answer ids), in their order. No dropout, no gradient, no autocast."""
        collate = collate_branches if self.packed else collate_branches_padded
        device = next(self.model.parameters()).device
        order: list[int] = []
        found: list[Tensor] = []
        with evaluation(self.model):
            for indices in self._batches(sequences):
                batch = collate(_by_prompt([sequences[index] for index in indices])).to(device)
                found.append(self._score(batch))
                order += indices
        values = torch.cat(found).tolist() if found else []
        return [value for _, value in sorted(zip(order, values, strict=True))]

    def _score(self, batch: PackedBatch) -> Tensor:
        if self.score is not None:
            return self.score(batch)
        scores_S: Tensor = self.model(**batch.model_inputs(), score_at_S=batch.last_S()).scores_S
        return scores_S

    def _batches(self, sequences: Sequence[tuple[Ids, Ids]]) -> Iterator[list[int]]:
        """Packed: answers to the same prompt beside one another. Padded: like lengths together, longest first."""
        lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
        prompts = [tuple(prompt) for prompt, _ in sequences]
        first: dict[tuple[int, ...], int] = {}
        order = sorted(range(len(sequences)), key=lambda i: first.setdefault(prompts[i], i) if self.packed else -lengths[i])
        batch: list[int] = []
        tokens = 0
        for index in order:
            if self.packed:
                shared = len(prompts[index]) if batch and prompts[batch[-1]] == prompts[index] else 0
                total = tokens + lengths[index] - shared
            else:
                total = (len(batch) + 1) * lengths[batch[0] if batch else index]
            if batch and (len(batch) == self.batch_rows or total > self.batch_tokens > 0):
                yield batch
                batch, total = [], lengths[index]
            batch.append(index)
            tokens = total
        if batch:
            yield batch


def _by_prompt(sequences: Sequence[tuple[Ids, Ids]]) -> list[Branches]:
    """Neighbours with the same prompt as one group."""
    groups: list[tuple[Ids, list[Ids]]] = []
    for prompt, answer in sequences:
        if groups and list(groups[-1][0]) == list(prompt):
            groups[-1][1].append(answer)
        else:
            groups.append((prompt, [answer]))
    return list(groups)


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and standard deviation (n - 1) of the scores of so many rows."""

    mean: float
    std: float
    rows: int


def chosen_statistics(scorer: Scorer, rows: Any, max_rows: int = BIAS_ROWS) -> ScoreStatistics:
    """Of the chosen answers of preference pairs ({"prompt_ids", "chosen_ids"}), at most `max_rows` of them, evenly spaced.

    Every rank computes all of them, for a sharded model's forward is a collective. Raises UserError for scores that are no numbers.
    """
    n = min(max_rows, len(rows))
    picked = [rows[i * len(rows) // n] for i in range(n)]
    scores = scorer([(row["prompt_ids"], row["chosen_ids"]) for row in picked])
    for row, score in zip(picked, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(f"{row['source']}: the reward model scores its chosen answer {score}: training has diverged")
    return ScoreStatistics(statistics.fmean(scores), statistics.stdev(scores) if n > 1 else 0.0, n)


def write_bias(folder: str | Path, found: ScoreStatistics) -> None:
    """`reward.json` of a reward model's folder: what is added to its scores, so that their mean is 0 there (arXiv 2403.17031, detail 12)."""
    content = {"bias": -found.mean, "std": found.std, "rows": found.rows, "of": "chosen answers of the training pairs"}
    Path(folder, BIAS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_bias(folder: str | Path) -> float:
    """What is to be added to a reward model's scores; 0 where the folder says nothing. Raises UserError for a file that is broken."""
    file = Path(folder, BIAS_FILE)
    if not file.is_file():
        return 0.0
    try:
        bias = float(json.loads(file.read_text(encoding="utf-8"))["bias"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}:bias: expected a number; `posttrain rm` writes the file, without it the bias is 0") from error
    if not math.isfinite(bias):
        raise UserError(f"{file}:bias: is {bias}, expected a finite number")
    return bias
