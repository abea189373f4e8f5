"""Which examples are held out of training."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from dataclasses import dataclass
from random import Random
from typing import Any

from posttrain.data.ledger import Counts, Ledger
from posttrain.types import UserError


@dataclass(frozen=True)
class Divided:
    """Examples (by their number) on each side, and those behind the limit of their side."""

    train: list[int]
    train_left: list[int]
    held_out: list[int]
    held_out_left: list[int]
    encoded_rows: list[int]  # per example
    datasets: list[int]  # per example

    def select(self, rows: Any) -> tuple[Any, Any]:
        """(training, held-out) rows of a datasets.Dataset whose rows belong to the examples in order."""
        starts = [0]
        for n in self.encoded_rows:
            starts.append(starts[-1] + n)

        def of(examples: list[int]) -> Any:
            return rows.select([row for e in examples for row in range(starts[e], starts[e + 1])])

        return of(self.train), of(self.held_out)

    def account(self, ledger: Ledger, names: list[str], train_rows: Any, held_out_rows: Any) -> tuple[Ledger, Ledger]:
        """The ledgers of both sides. Held-out rows are `held_out` in the first and `trained` (used) in the second."""
        train, held_out = copy.deepcopy(ledger), Ledger()
        for i, n in Counter(self.datasets[e] for e in self.held_out + self.held_out_left).items():
            train.move(names[i], n, "held_out")
            held_out.datasets[names[i]] = Counts(rows_in=n, trained=n)
        for examples, side in ((self.train_left, train), (self.held_out_left, held_out)):
            for i, n in Counter(self.datasets[e] for e in examples).items():
                side.move(names[i], n, "not_taken")
        for side, rows in ((train, train_rows), (held_out, held_out_rows)):
            sources = set(rows["source"])
            side.truncations = [cut for cut in ledger.truncations if cut[0] in sources]
            side.encoded_rows = len(rows)
        return train, held_out


def hold_out(index: dict[str, Any], percentage: float, seed: int, limits: tuple[int, int]) -> Divided:
    """Hold out `percentage` percent of the examples (rounded down, at least one), in the order of the files on either side.

    index   columns of `cache.ExampleIndex`; examples with one content hash stay together, so that no content is on both sides
    limits  (training, held-out) examples to keep of each side; -1: all

    Raises UserError when the examples cannot be divided.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for example, content in enumerate(index["content_hashes"].tolist()):
        groups[content].append(example)
    if len(groups) < 2:
        raise UserError(
            "--validation_split_percentage: fewer than two different rows; name held-out data with --validation_file_dir"
        )
    examples = len(index["content_hashes"])
    wanted = max(1, int(examples * percentage / 100))
    order = list(groups.values())
    Random(seed).shuffle(order)
    held: list[int] = []
    for group in order:
        if len(held) + len(group) <= wanted:
            held += group
    held = sorted(held or sorted(order, key=len)[0])
    inside = set(held)
    rest = [e for e in range(examples) if e not in inside]
    keep_train, keep_held = (len(rest) if limits[0] < 0 else limits[0]), (len(held) if limits[1] < 0 else limits[1])
    return Divided(
        train=rest[:keep_train],
        train_left=rest[keep_train:],
        held_out=held[:keep_held],
        held_out_left=held[keep_held:],
        encoded_rows=index["encoded_rows"].tolist(),
        datasets=index["datasets"].tolist(),
    )
