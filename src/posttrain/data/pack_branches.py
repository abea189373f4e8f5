"""Prompts with several answers → micro-batches: a prompt and its answers as branches, so that the prompt is computed once
(arXiv 2410.20305); or each answer with a prompt of its own, packed or padded.

Sequences are numbered prompt by prompt, answer by answer; every token of an answer is a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain.types import PackedBatch, Segment, SegmentTable

Branches = tuple[Any, Sequence[Any]]  # (prompt ids, the ids of each answer), as lists or arrays of integers


def collate_branches(groups: Sequence[Branches]) -> PackedBatch:
    """One row (1, T) of (prompt, answer, answer …): each answer sees the prompt and itself.

    The first tokens of all answers are predicted at the prompt's last position. T = Σ prompt + answers.
    """
    ids: list[Any] = []
    positions, predict, targets = [], [], []
    segments: list[Segment] = []
    start = 0
    for prompt_ids, answers in groups:
        prompt = np.asarray(prompt_ids, dtype=np.int64)
        root, prompt_end = len(segments), start + len(prompt)
        segments.append(Segment(start, prompt_end))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        start = prompt_end
        for answer_ids in answers:
            answer = np.asarray(answer_ids, dtype=np.int64)
            segments.append(Segment(start, start + len(answer), root))
            ids.append(answer)
            positions.append(len(prompt) + np.arange(len(answer)))
            predict.append(np.concatenate([[prompt_end - 1], start + np.arange(len(answer) - 1)]))
            targets.append(answer)
            start += len(answer)
    return PackedBatch(
        input_ids_BT=torch.from_numpy(np.concatenate(ids))[None],
        position_ids_BT=torch.from_numpy(np.concatenate(positions))[None],
        predict_N=torch.from_numpy(np.concatenate(predict)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        sequence_N=_sequences(targets),
        n_sequences=len(targets),
        n_tokens=start,
        segments=SegmentTable(tuple(segments)),
    )


def collate_apart(groups: Sequence[Branches]) -> PackedBatch:
    """One row (1, T) of whole sequences, each answer with its prompt. What prefix sharing is measured against."""
    sequences = _whole(groups)
    ends = np.cumsum([len(prompt) + len(answer) for prompt, answer in sequences])
    predict = [end - len(answer) - 1 + np.arange(len(answer)) for end, (_, answer) in zip(ends, sequences, strict=True)]
    targets = [answer for _, answer in sequences]
    starts = [0, *ends[:-1]]
    return PackedBatch(
        input_ids_BT=torch.from_numpy(np.concatenate([part for sequence in sequences for part in sequence]))[None],
        position_ids_BT=torch.from_numpy(np.concatenate([np.arange(e - s) for s, e in zip(starts, ends, strict=True)]))[None],
        predict_N=torch.from_numpy(np.concatenate(predict)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        sequence_N=_sequences(targets),
        n_sequences=len(sequences),
        n_tokens=int(ends[-1]),
        segments=SegmentTable(tuple(Segment(int(s), int(e)) for s, e in zip(starts, ends, strict=True))),
    )


def collate_branches_padded(groups: Sequence[Branches]) -> PackedBatch:
    """Rows (S, T) of prompt + answer, padded on the right, for models that cannot take segments."""
    sequences = _whole(groups)
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids_BT = np.zeros((len(sequences), longest), dtype=np.int64)
    mask_BT = np.zeros((len(sequences), longest), dtype=np.int64)
    predict = []
    for index, (prompt, answer) in enumerate(sequences):
        length = len(prompt) + len(answer)
        ids_BT[index, :length] = np.concatenate([prompt, answer])
        mask_BT[index, :length] = 1
        predict.append(index * longest + len(prompt) - 1 + np.arange(len(answer)))
    targets = [answer for _, answer in sequences]
    return PackedBatch(
        input_ids_BT=torch.from_numpy(ids_BT),
        position_ids_BT=torch.from_numpy((np.cumsum(mask_BT, 1) - 1) * mask_BT),
        predict_N=torch.from_numpy(np.concatenate(predict)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        sequence_N=_sequences(targets),
        n_sequences=len(sequences),
        n_tokens=int(mask_BT.sum()),
        attention_mask_BT=torch.from_numpy(mask_BT),
    )


def _whole(groups: Sequence[Branches]) -> list[tuple[Any, Any]]:
    """(prompt, answer) of every sequence, as arrays."""
    return [
        (np.asarray(prompt, dtype=np.int64), np.asarray(answer, dtype=np.int64))
        for prompt, answers in groups
        for answer in answers
    ]


def _sequences(targets: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(targets)), [len(answer) for answer in targets]))
