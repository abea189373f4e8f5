"""A row stream packed as it goes: windows of rows, best fit inside each, pass after pass without end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from posttrain.data.pack import best_fit
from posttrain.data.stream import RowStream
from posttrain.types import UserError

WINDOW_ROWS = 1024  # packed together: large enough that best fit leaves little room, small enough to read again on resume


class PackedStream(IterableDataset[list[dict[str, Any]]]):
    """Groups of rows of at most `capacity` tokens (None: one row a group). Starts the next pass where one ends.

    `state_dict` is the place behind the group yielded last; a stream that loads it goes on with the next group. Resuming reads
    again at most one window.
    """

    def __init__(self, rows: RowStream, capacity: int | None):
        self.rows, self.capacity = rows, capacity
        self._window_start: dict[str, Any] | None = None
        self._done_groups = 0  # of the window that starts there

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        iterator = None
        skip, self._done_groups = self._done_groups, 0
        while True:
            fresh_pass = iterator is None
            if iterator is None:
                iterator = iter(self.rows)
            if not skip:
                self._window_start = self.rows.state_dict()
            window = list(islice(iterator, WINDOW_ROWS))
            if not window:
                if fresh_pass and not skip and self.rows.ledger.total.trained == 0:
                    raise UserError(f"the stream has no row to train on\n{self.rows.ledger.summary()}")
                self.rows.next_pass()
                iterator, skip = None, 0
                continue
            groups = self._grouped(window)
            for index in range(skip, len(groups)):
                self._done_groups = index + 1
                yield [window[i] for i in groups[index]]
            skip, self._done_groups = 0, 0

    def _grouped(self, window: list[dict[str, Any]]) -> list[list[int]]:
        if self.capacity is None:
            return [[i] for i in range(len(window))]
        return best_fit([len(row["input_ids"]) for row in window], self.capacity)

    def state_dict(self) -> dict[str, Any]:
        """A JSON value. Raises UserError when DataLoader workers read the stream."""
        start = self._window_start if self._window_start is not None else self.rows.state_dict()
        return {"window_start": start, "done_groups": self._done_groups, "ledger": self.rows.ledger.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration go on behind the group that was yielded last when `state` was taken."""
        self.rows.load_state_dict(state["window_start"])
        self._window_start, self._done_groups = state["window_start"], state["done_groups"]
