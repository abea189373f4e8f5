"""Several datasets as one sequence of rows."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from posttrain.data.files import RawRow
from posttrain.data.sources import Place, RowSource


class RowMix:
    """The rows of several sources in one order, which depends on weights and seed only; can go on from a saved state.

    Without weights one source follows the other. With weights the next row comes from the source that lags most behind its
    share, so that after every n rows each source gave its share of n to within a row or two, and no row comes twice; the mix
    ends where the source whose turn it is has no more rows. The seed sets the phase in which the sources start.
    """

    def __init__(self, sources: list[RowSource], weights: tuple[float, ...] = (), seed: int = 0):
        self.sources = sources
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        phase = Random(seed)
        self.credits = [share * phase.random() for share in self.shares]
        self.next_places: list[Place] = [(0, 0)] * len(sources)
        self.current = 0  # without weights: the source being read
        self.ended_by: str | None = None  # with weights: the source that had no more rows
        self._iterators: list[Iterator[tuple[Place, RawRow]] | None] = [None] * len(sources)

    def __iter__(self) -> Iterator[tuple[int, Place, RawRow]]:
        """(source, place in it, row) of each row."""
        while self.current < len(self.sources):
            i = self._pick() if self.shares else self.current
            item = self._next(i)
            if item is not None:
                yield i, *item
            elif self.shares:
                self.ended_by = self.sources[i].name
                return
            else:
                self.current += 1

    def _pick(self) -> int:
        for i, share in enumerate(self.shares):
            self.credits[i] += share
        i = max(range(len(self.credits)), key=self.credits.__getitem__)
        self.credits[i] -= 1.0
        return i

    def _next(self, i: int) -> tuple[Place, RawRow] | None:
        rows = self._iterators[i]
        if rows is None:
            rows = self._iterators[i] = self.sources[i].rows(self.next_places[i])
        item = next(rows, None)
        if item is not None:
            (file, row), _ = item
            self.next_places[i] = (file, row + 1)
        return item

    def count_rest(self) -> list[int]:
        """Rows of each source that were not given out. Reads them (undecoded), and ends the mix."""
        counts = [0] * len(self.sources)
        for i in range(len(self.sources)):
            while self._next(i) is not None:
                counts[i] += 1
        self.current = len(self.sources)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """A JSON value; with it `load_state_dict` goes on behind the row given out last."""
        return {"credits": list(self.credits), "places": [list(place) for place in self.next_places], "current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.credits = list(state["credits"])
        self.next_places = [(file, row) for file, row in state["places"]]
        self.current = state["current"]
        self._iterators = [None] * len(self.sources)
