"""Packing: nothing lost, nothing mixed, targets exactly where the trained tokens are."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_rows
from posttrain.data.pack import best_fit, collate, collate_padded, split


@given(st.lists(st.integers(1, 64), max_size=200))
@settings(max_examples=60, deadline=None)
def test_best_fit_keeps_every_row_once_and_within_capacity(lengths: list[int]) -> None:
    groups = best_fit(lengths, 64)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in g) <= 64 for g in groups)
    # Best fit never leaves two groups that would fit into one.
    sizes = sorted(sum(lengths[i] for i in g) for g in groups)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 64


def test_best_fit_known_case() -> None:
    # 6 goes alone, 5 + 3 fill a group exactly, 4 joins the fuller of the groups that have room.
    assert best_fit([3, 6, 5, 4], 8) == [[1], [2, 0], [3]]


def expected_targets(rows: list[dict]) -> list[tuple[int, int, int]]:
    """(sequence, index within it, token) of every trained token but a first one."""
    found = []
    for s, row in enumerate(rows):
        found += [(s, t, row["input_ids"][t]) for t in range(1, len(row["input_ids"])) if row["trained"][t]]
    return found


def test_collate_targets_and_positions() -> None:
    rows = random_rows(7)
    rows[3]["trained"][0] = 1  # a first token has nothing to be predicted from
    batch = collate(rows)
    assert batch.input_ids_BT.shape == (1, sum(len(r["input_ids"]) for r in rows)) == batch.position_ids_BT.shape
    assert batch.segments is not None
    starts = [s.start for s in batch.segments.segments]
    got = [
        (int(s), int(p) + 1 - starts[int(s)], int(t))
        for s, p, t in zip(batch.sequence_N, batch.predict_N, batch.targets_N, strict=True)
    ]
    assert got == expected_targets(rows)
    assert batch.position_ids_BT[0].tolist() == [t for r in rows for t in range(len(r["input_ids"]))]
    assert batch.n_tokens == batch.input_ids_BT.numel()


def test_padded_and_packed_hold_the_same_targets() -> None:
    rows = random_rows(5)
    padded, packed = collate_padded(rows), collate(rows)
    longest = padded.input_ids_BT.shape[1]
    got = [
        (int(s), int(p) % longest + 1, int(t))
        for s, p, t in zip(padded.sequence_N, padded.predict_N, padded.targets_N, strict=True)
    ]
    assert got == expected_targets(rows)
    assert torch.equal(padded.targets_N, packed.targets_N)
    assert padded.n_tokens == packed.n_tokens == int(padded.attention_mask_BT.sum())  # type: ignore[union-attr]


@given(st.integers(1, 12), st.integers(1, 150), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_split_is_the_same_batch_in_parts(n_rows: int, max_tokens: int, seed: int) -> None:
    rows = random_rows(n_rows, seed=seed)
    parts = split(collate(rows), max_tokens)
    assert all(p.n_tokens <= max_tokens or p.n_sequences == 1 for p in parts)
    # Next fit: a part and the first row of the next one do not fit together.
    for this, following in itertools.pairwise(parts):
        assert this.n_tokens + following.segments.segments[0].end > max_tokens  # type: ignore[union-attr]
    at = 0
    for part in parts:
        expected = collate(rows[at : at + part.n_sequences])
        at += part.n_sequences
        for name in ("input_ids_BT", "position_ids_BT", "predict_N", "targets_N", "sequence_N"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name
        assert part.segments == expected.segments
    assert at == n_rows
