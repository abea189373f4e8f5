"""Preference pairs → micro-batches: a prompt and its two answers as branches, so that the prompt is computed once (arXiv 2410.20305).

A row, here, is what `tokenize_pairs.py` makes of a pair: {"prompt_ids", "chosen_ids", "rejected_ids", "margin", "source"} and, for DPO,
{"reference_chosen", "reference_rejected"} (log-probs of the answers' tokens). Sequence 2p is the chosen answer of pair p, 2p + 1 the
rejected one; every token of an answer is a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain.data.pack import Row
from posttrain.types import PackedBatch, Segment, SegmentTable

ANSWERS = ("chosen_ids", "rejected_ids")
REFERENCES = ("reference_chosen", "reference_rejected")


def collate_pairs(rows: Sequence[Row]) -> PackedBatch:
    """One row (1, T) of P × (prompt, chosen, rejected): both answers see the prompt, neither sees the other.

    Both first tokens are predicted at the prompt's last position. T = Σ prompt + chosen + rejected.
    """
    ids: list[Any] = []
    positions, predict, targets = [], [], []
    segments: list[Segment] = []
    start = 0
    for row in rows:
        prompt = np.asarray(row["prompt_ids"], dtype=np.int64)
        root, prompt_end = len(segments), start + len(prompt)
        segments.append(Segment(start, prompt_end))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        start = prompt_end
        for name in ANSWERS:
            answer = np.asarray(row[name], dtype=np.int64)
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
        n_sequences=2 * len(rows),
        n_tokens=start,
        segments=SegmentTable(tuple(segments)),
        extras=_extras(rows),
    )


def collate_pairs_apart(rows: Sequence[Row]) -> PackedBatch:
    """One row (1, T) of 2P whole sequences: the prompt is computed twice. What prefix sharing is measured against."""
    sequences = _whole(rows)
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
        extras=_extras(rows),
    )


def collate_pairs_padded(rows: Sequence[Row]) -> PackedBatch:
    """2P rows (2P, T) of prompt + answer, padded on the right, for models that cannot take segments."""
    sequences = _whole(rows)
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
        extras=_extras(rows),
    )


def _whole(rows: Sequence[Row]) -> list[tuple[Any, Any]]:
    """(prompt, answer) of every sequence."""
    return [tuple(np.asarray(row[part], dtype=np.int64) for part in ("prompt_ids", name)) for row in rows for name in ANSWERS]  # type: ignore[misc]


def _sequences(targets: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(targets)), [len(answer) for answer in targets]))


def _extras(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """weight_P (0: a row that only fills up a rank), margin_P, and reference_N where the rows have it."""
    extras = {
        "weight_P": torch.tensor([float(row.get("weight", 1)) for row in rows]),
        "margin_P": torch.tensor([float(row["margin"]) for row in rows]),
    }
    if REFERENCES[0] in rows[0]:
        columns = [np.asarray(row[name], dtype=np.float32) for row in rows for name in REFERENCES]
        extras["reference_N"] = torch.from_numpy(np.concatenate(columns))
    return extras
