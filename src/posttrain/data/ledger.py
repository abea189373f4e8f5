"""The row ledger: what became of every row that was read. Rows in = trained + held out + dropped + not taken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from posttrain.types import RowError

BadRows = Literal["error", "skip"]

IDENTITY = "rows_in = trained + held_out + dropped + not_taken"


class Drop(NamedTuple):
    """A row that was left out, and why: the parts of its RowError, in a form that crosses process borders."""

    source: str
    field: str
    reason: str

    @classmethod
    def of(cls, error: RowError) -> Drop:
        return cls(error.source, error.field, error.reason)

    def error(self) -> RowError:
        """The error that stops a run under --bad_rows error."""
        return RowError(self.source, self.field, f"{self.reason} (--bad_rows skip leaves such rows out and counts them)")


@dataclass
class Counts:
    """Rows of one dataset. `trained` rows reach training (or evaluation, when the ledger is that of the validation data)."""

    rows_in: int = 0
    trained: int = 0
    held_out: int = 0  # moved to validation by --validation_split_percentage
    dropped: int = 0
    not_taken: int = 0  # behind --max_train_samples, or behind the end of a weighted mix

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass
class Ledger:
    """Counts per dataset, every drop, every truncation. Grows while rows are read; parts of it merge."""

    datasets: dict[str, Counts] = field(default_factory=dict)  # by the name that the user gave
    drops: list[Drop] = field(default_factory=list)
    truncations: list[tuple[str, int]] = field(default_factory=list)  # (source, tokens cut)
    encoded_rows: int = 0  # rows of the prepared dataset; more than `trained` where a chat gives a row per turn
    notes: list[str] = field(default_factory=list)  # files left aside, …

    def _counts(self, dataset: str) -> Counts:
        return self.datasets.setdefault(dataset, Counts())

    def took(self, dataset: str, source: str, encoded_rows: int = 1, truncated_tokens: int = 0) -> None:
        """A row became `encoded_rows` rows of the prepared dataset, `truncated_tokens` of its tokens were cut off."""
        counts = self._counts(dataset)
        counts.rows_in += 1
        counts.trained += 1
        self.encoded_rows += encoded_rows
        if truncated_tokens:
            self.truncations.append((source, truncated_tokens))

    def drop(self, dataset: str, drop: Drop) -> None:
        """A row cannot be used."""
        counts = self._counts(dataset)
        counts.rows_in += 1
        counts.dropped += 1
        self.drops.append(drop)

    def left(self, dataset: str, rows: int) -> None:
        """Rows that were not looked at, for enough were taken before them."""
        counts = self._counts(dataset)
        counts.rows_in += rows
        counts.not_taken += rows

    def move(self, dataset: str, rows: int, to: Literal["held_out", "not_taken"]) -> None:
        """Rows counted as trained went elsewhere after all."""
        counts = self._counts(dataset)
        counts.trained -= rows
        setattr(counts, to, getattr(counts, to) + rows)

    def note(self, text: str) -> None:
        """A line for the summary, once."""
        if text not in self.notes:
            self.notes.append(text)

    def merge(self, other: Ledger) -> None:
        """Add what another ledger counted (of a worker, a rank, a later chunk)."""
        for name, counts in other.datasets.items():
            mine = self._counts(name)
            mine += counts
        self.drops += other.drops
        self.truncations += other.truncations
        self.encoded_rows += other.encoded_rows
        for text in other.notes:
            self.note(text)

    @property
    def total(self) -> Counts:
        """The counts over all datasets."""
        total = Counts()
        for counts in self.datasets.values():
            total += counts
        return total

    def assert_identity(self) -> None:
        """Every row read is accounted for, in every dataset. A failure is our bug, so it is no UserError."""
        for name, c in self.datasets.items():
            if c.rows_in != c.trained + c.held_out + c.dropped + c.not_taken or min(asdict(c).values()) < 0:
                raise AssertionError(f"row ledger of {name} does not add up ({IDENTITY}): {c}")
        if self.total.dropped != len(self.drops):
            raise AssertionError(f"row ledger: {self.total.dropped} rows dropped, {len(self.drops)} named")

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, rows), the most frequent first."""
        return Counter(drop.reason for drop in self.drops).most_common()

    def summary(self, verb: str = "trained", listed_rows: int = 5) -> str:
        """Lines for the terminal: the identity, per dataset when there are several, reasons with their first rows, truncation."""
        lines = [_identity_line("rows", self.total, verb)]
        if len(self.datasets) > 1:
            lines += [_identity_line(f"  {name}", counts, verb) for name, counts in self.datasets.items()]
        for reason, rows in self.reasons():
            named = [f"{drop.source}:{drop.field}" for drop in self.drops if drop.reason == reason]
            more = f", and {rows - listed_rows:,} more" if rows > listed_rows else ""
            lines.append(f"  dropped {rows:,}: {reason}\n    {', '.join(named[:listed_rows])}{more}")
        if self.truncations:
            source, most_tokens = max(self.truncations, key=lambda cut: cut[1])
            cut_tokens = sum(tokens for _, tokens in self.truncations)
            lines.append(
                f"  truncated {len(self.truncations):,} rows, {cut_tokens:,} tokens cut; most: {most_tokens:,} at {source}"
            )
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def to_json(self) -> dict[str, Any]:
        """The content of ledger.json."""
        total = asdict(self.total)
        return {
            **total,
            "identity": IDENTITY,
            "encoded_rows": self.encoded_rows,
            "truncated_rows": len(self.truncations),
            "truncated_tokens": sum(tokens for _, tokens in self.truncations),
            "datasets": {name: asdict(counts) for name, counts in self.datasets.items()},
            "reasons": dict(self.reasons()),
            "drops": [drop._asdict() for drop in self.drops],
            "truncations": [list(cut) for cut in self.truncations],
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` described."""
        return cls(
            datasets={name: Counts(**counts) for name, counts in data["datasets"].items()},
            drops=[Drop(**drop) for drop in data["drops"]],
            truncations=[(source, tokens) for source, tokens in data["truncations"]],
            encoded_rows=data["encoded_rows"],
            notes=list(data["notes"]),
        )

    def write(self, path: str | Path) -> None:
        """Write ledger.json, after the identity held."""
        self.assert_identity()
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _identity_line(name: str, counts: Counts, verb: str) -> str:
    parts = [f"{counts.trained:,} {verb}"]
    if counts.held_out:
        parts.append(f"{counts.held_out:,} held out")
    parts.append(f"{counts.dropped:,} dropped")
    if counts.not_taken:
        parts.append(f"{counts.not_taken:,} not taken")
    return f"{name}: {counts.rows_in:,} in = {' + '.join(parts)}"
