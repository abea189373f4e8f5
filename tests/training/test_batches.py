"""The order of rows: the same rows per step for every cut, equally many batches a rank."""

from __future__ import annotations

import pytest

from posttrain.training.batches import FILLER, Batches, Groups


def rows_of_steps(n_rows: int, batch: int, accumulation: int, world: int) -> list[set[int]]:
    ranks = [list(Batches(n_rows, batch, seed=5, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    steps = []
    for first in range(0, len(ranks[0]), accumulation):
        rows = [i for batches in ranks for b in batches[first : first + accumulation] for i in b if i != FILLER]
        assert len(rows) == len(set(rows))
        steps.append(set(rows))
    return steps


@pytest.mark.parametrize("n_rows", [16, 19, 5])
def test_a_step_covers_the_same_rows_however_it_is_cut(n_rows: int) -> None:
    reference = rows_of_steps(n_rows, 8, 1, 1)
    for batch, accumulation, world in [(4, 2, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]:
        assert rows_of_steps(n_rows, batch, accumulation, world) == reference
    assert set().union(*reference) == set(range(n_rows))


def test_epochs_differ_and_repeat() -> None:
    batches = Batches(20, 4, seed=1)
    first = list(batches)
    batches.set_epoch(1)
    assert list(batches) != first
    batches.set_epoch(0)
    assert list(batches) == first
    assert list(Batches(20, 4, seed=2)) != first
    assert [i for b in Batches(6, 4, seed=None) for i in b] == list(range(6))


def test_filler_weighs_nothing() -> None:
    rows = [{"input_ids": [1, 2, 3], "trained": [0, 1, 1], "source": "x:1"}]
    assert Groups(rows)[FILLER][0]["trained"] == [0, 0, 0]
    assert rows[0]["trained"] == [0, 1, 1]
