"""Preference pairs → micro-batches: a prompt and its two answers as branches (pack_branches.py).

A row, here, is what `tokenize_pairs.py` makes of a pair: {"prompt_ids", "chosen_ids", "rejected_ids", "margin", "source"} and, for DPO,
{"reference_chosen", "reference_rejected"} (log-probs of the answers' tokens). Sequence 2p is the chosen answer of pair p, 2p + 1 the
rejected one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from posttrain.data.pack import Row
from posttrain.data.pack_branches import Branches, collate_apart, collate_branches, collate_branches_padded
from posttrain.types import PackedBatch

ANSWERS = ("chosen_ids", "rejected_ids")
REFERENCES = ("reference_chosen", "reference_rejected")


def collate_pairs(rows: Sequence[Row]) -> PackedBatch:
    """One row (1, T) of P × (prompt, chosen, rejected): both answers see the prompt, neither sees the other."""
    return dataclasses.replace(collate_branches(_branches(rows)), extras=_extras(rows))


def collate_pairs_apart(rows: Sequence[Row]) -> PackedBatch:
    """One row (1, T) of 2P whole sequences: the prompt is computed twice."""
    return dataclasses.replace(collate_apart(_branches(rows)), extras=_extras(rows))


def collate_pairs_padded(rows: Sequence[Row]) -> PackedBatch:
    """2P padded rows (2P, T) of prompt + answer, for models that cannot take segments."""
    return dataclasses.replace(collate_branches_padded(_branches(rows)), extras=_extras(rows))


def _branches(rows: Sequence[Row]) -> list[Branches]:
    return [(row["prompt_ids"], [row[name] for name in ANSWERS]) for row in rows]


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
