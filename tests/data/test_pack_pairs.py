"""Pairs in micro-batches: three collations show the model the same, and no cut loses, parts or mixes anything."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair_rows import contexts, random_pairs
from posttrain.data.pack import split
from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart, collate_pairs_padded
from posttrain.types import PackedBatch, Segment

COLLATIONS: list[Callable[[Any], PackedBatch]] = [collate_pairs, collate_pairs_apart, collate_pairs_padded]
ROWS = [
    {"prompt_ids": [11, 12, 13], "chosen_ids": [21, 22], "rejected_ids": [31], "margin": 0.5},
    {"prompt_ids": [14], "chosen_ids": [23], "rejected_ids": [32, 33, 34], "margin": 0.0, "weight": 0},
]
IDS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@st.composite
def pairs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to six pairs; few tokens, so that answers share beginnings; some are fillers; all or none have reference log-probs."""
    reference = draw(st.booleans())
    rows = []
    for index in range(draw(st.integers(1, 6))):
        row: dict[str, Any] = {name: draw(IDS) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        row |= {"margin": draw(st.sampled_from([0.0, 0.25, 2.0])), "source": f"fuzz:{index}"}
        if draw(st.booleans()):
            row["weight"] = draw(st.integers(0, 1))
        if reference:
            row |= {f"reference_{k}": [-index - t / 16 for t in range(len(row[f"{k}_ids"]))] for k in ("chosen", "rejected")}
        rows.append(row)
    return rows


def wanted(rows: list[dict[str, Any]]) -> list[list[tuple[tuple[int, ...], int]]]:
    """Of every sequence, chosen and rejected in turn: each token of the answer after all that stands before it."""
    sequences = [(row["prompt_ids"], row[name]) for row in rows for name in ("chosen_ids", "rejected_ids")]
    return [[((*prompt, *answer[:t]), token) for t, token in enumerate(answer)] for prompt, answer in sequences]


def test_the_prompt_once_and_two_branches() -> None:
    batch = collate_pairs(ROWS)
    assert batch.input_ids_BT.tolist() == [[11, 12, 13, 21, 22, 31, 14, 23, 32, 33, 34]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]]
    assert batch.segments is not None
    spans = [(0, 3, None), (3, 5, 0), (5, 6, 0), (6, 7, None), (7, 8, 3), (8, 11, 3)]
    assert batch.segments.segments == tuple(Segment(*span) for span in spans)
    assert batch.predict_N.tolist() == [2, 3, 2, 6, 6, 8, 9]  # a prompt's last position predicts both first tokens
    assert batch.targets_N.tolist() == [21, 22, 31, 23, 32, 33, 34]
    assert batch.sequence_N.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.extras["weight_P"].tolist() == [1, 0]
    assert batch.extras["margin_P"].tolist() == [0.5, 0]
    assert batch.last_S().tolist() == [4, 5, 7, 10]
    assert (batch.n_tokens, collate_pairs_apart(ROWS).n_tokens, collate_pairs_padded(ROWS).n_tokens) == (11, 15, 15)
    assert collate_pairs_padded(ROWS).input_ids_BT.tolist() == [
        [11, 12, 13, 21, 22], [11, 12, 13, 31, 0], [14, 23, 0, 0, 0], [14, 32, 33, 34, 0],
    ]  # fmt: skip


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_three_collations_of_the_same(rows: list[dict[str, Any]]) -> None:
    batches = [collate(rows) for collate in COLLATIONS]
    for batch in batches:
        assert contexts(batch) == wanted(rows)
        assert batch.n_sequences == 2 * len(rows)
        assert batch.input_ids_BT.flatten()[batch.last_S()].tolist() == [a[-1][1] for a in wanted(rows)]
        assert batch.extras["weight_P"].tolist() == [row.get("weight", 1) for row in rows]
        assert batch.extras["margin_P"].tolist() == [row["margin"] for row in rows]
        if "reference_chosen" in rows[0]:
            columns = [row[f"reference_{k}"] for row in rows for k in ("chosen", "rejected")]
            assert batch.extras["reference_N"].tolist() == list(itertools.chain(*columns))
    whole = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert [batch.n_tokens for batch in batches] == [whole - sum(len(row["prompt_ids"]) for row in rows), whole, whole]


@pytest.mark.parametrize("collate", COLLATIONS)
@given(rows=pairs(), max_tokens=st.integers(1, 160))
@settings(max_examples=150, deadline=None)
def test_a_cut_keeps_everything(collate: Callable[[Any], PackedBatch], rows: list[dict[str, Any]], max_tokens: int) -> None:
    """Sequences, extras and the sums over them are those of the whole batch; the two answers of a pair stay together."""
    batch = collate(rows)
    parts = split(batch, max_tokens)
    assert [sequence for part in parts for sequence in contexts(part)] == wanted(rows)
    for name, column in batch.extras.items():
        assert torch.equal(torch.cat([part.extras[name] for part in parts]), column), name
    weighted = []
    for one in (batch, *parts):
        assert one.n_sequences % 2 == 0
        assert len(one.extras["weight_P"]) == one.n_sequences // 2
        weight_N = one.extras["weight_P"][one.sequence_N // 2]
        values_N = torch.stack([weight_N, weight_N * one.targets_N, weight_N * one.extras.get("reference_N", weight_N)])
        weighted.append(values_N.double().sum(1))
    torch.testing.assert_close(sum(weighted[1:]), weighted[0])
    assert sum(part.n_tokens for part in parts) == batch.n_tokens
    if batch.segments is None:
        assert len(parts) == 1
        return
    assert all(part.n_tokens <= max_tokens or part.n_sequences == 2 for part in parts)
    first = 0
    for part, following in itertools.pairwise([*parts, None]):  # a part is what collating its rows gives, and it is full
        last = first + part.n_sequences // 2
        again = collate(rows[first:last])
        for f in dataclasses.fields(PackedBatch):
            got, expected = getattr(part, f.name), getattr(again, f.name)
            assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else f.name == "extras" or got == expected, f.name
        if following is not None:
            assert part.n_tokens + collate(rows[last : last + 1]).n_tokens > max_tokens
        first = last


def test_a_filler_beside_real_pairs_weighs_nothing() -> None:
    rows = random_pairs(3)
    batch = collate_pairs([*rows, {**rows[0], "weight": 0}])
    assert batch.extras["weight_P"].tolist() == [1, 1, 1, 0]
    assert batch.extras["reference_N"].numel() == batch.targets_N.numel()
