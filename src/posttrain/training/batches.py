"""The order of the rows and how they reach the ranks: seeded, independent of world size, and exact to resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from posttrain.types import PackedBatch

FILLER = -1  # an index that stands for a row of zero weight


class Batches(torch.utils.data.Sampler[list[int]]):
    """Batches of row indices for one rank.

    Global batch j is rows [j·W·b, (j+1)·W·b) of a permutation drawn from (seed, epoch), of which rank r takes the r-th slice of
    b. So one optimizer step covers the same rows for every way to cut it into batches, accumulation and ranks. Ranks have
    equally many batches: missing rows are FILLER, whose weight is zero.
    """

    def __init__(self, n_rows: int, batch_rows: int, *, seed: int | None, rank: int = 0, world: int = 1, drop_last: bool = False):
        """`seed=None` keeps the rows in order (evaluation). `drop_last` leaves out an incomplete last global batch."""
        self.n_rows, self.batch_rows, self.seed, self.rank, self.world = n_rows, batch_rows, seed, rank, world
        per_step = batch_rows * world
        self.n_batches = n_rows // per_step if drop_last else math.ceil(n_rows / per_step)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.n_rows))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.n_rows, generator=generator).tolist()
        for batch in range(self.n_batches):
            first = (batch * self.world + self.rank) * self.batch_rows
            rows = order[first : first + self.batch_rows]
            yield rows or [FILLER]


class Groups(Dataset[list[dict[str, Any]]]):
    """A dataset of rows seen through groups of row indices (one group a packed row; without packing, one index a group)."""

    def __init__(self, rows: Any, groups: Sequence[Sequence[int]] | None = None):
        self.rows, self.groups = rows, groups

    def __len__(self) -> int:
        return len(self.rows) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if index == FILLER:
            row = dict(self.rows[0])
            # Nothing trained in a row of tokens, no weight for a pair.
            return [{**row, "trained": [0] * len(row["input_ids"])} if "input_ids" in row else {**row, "weight": 0}]
        if self.groups is None:
            return [self.rows[index]]
        return [self.rows[i] for i in self.groups[index]]


class EpochLoader(DataLoader):
    """A DataLoader that hands the epoch on to its batch sampler. Its workers' seed never touches the global generator."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the epoch to come."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def loader(
    dataset: Groups, batches: Batches, collate: Callable[[list[dict[str, Any]]], PackedBatch], **workers: Any
) -> EpochLoader:
    """Batches of `dataset` in the order of `batches`; `workers` are the DataLoader's own arguments."""
    generator = torch.Generator().manual_seed(0)
    return EpochLoader(dataset, batch_sampler=batches, collate_fn=partial(_flat, collate=collate), generator=generator, **workers)


def stream_loader(
    stream: IterableDataset[list[dict[str, Any]]],
    batch_rows: int,
    collate: Callable[[list[dict[str, Any]]], PackedBatch],
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of a stream's groups, read in this process: its place is then exactly behind the last batch."""
    generator = torch.Generator().manual_seed(0)
    flat = partial(_flat, collate=collate)
    return DataLoader(stream, batch_size=batch_rows, collate_fn=flat, generator=generator, pin_memory=pin_memory)


def _flat(groups: list[list[dict[str, Any]]], collate: Callable[[list[dict[str, Any]]], PackedBatch]) -> PackedBatch:
    return collate([row for group in groups for row in group])
