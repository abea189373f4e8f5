"""A corpus larger than memory as an iterable dataset that goes on, after a stop, at the row where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from posttrain.data.files import RawRow
from posttrain.data.ledger import Drop, Ledger
from posttrain.data.mix import RowMix
from posttrain.data.sources import Place, RowSource, ignored_note
from posttrain.data.work import RowWork
from posttrain.types import UserError

if TYPE_CHECKING:
    from posttrain.data.load import DataPlan

_Waiting = tuple[int, Place, RawRow]  # (source, place, row) that was read and not encoded yet


class RowStream(IterableDataset[dict[str, Any]]):
    """Yields encoded rows (dicts of columns) in the order in which `load_rows` has them; with a shuffle buffer, in a seeded order.

    Sharding  raw row n goes to shard n mod (world_size × DataLoader workers): every row to one shard. A limit of rows is
              divided among the shards. Shards may differ by rows, the more so when rows are dropped.
    Passes    each iteration is one pass; `set_epoch(n)` before it gives another shuffled order.
    Resume    `state_dict()` describes the point behind the row yielded last; `load_state_dict` on a new stream makes the next
              iteration go on there. Rows that were consumed are passed over undecoded, rows of the shuffle buffer read again.
    Ledger    `ledger` grows until a pass is complete, then stays: each row is counted once. In DataLoader workers it is the worker's.
    """

    def __init__(
        self,
        mix_parts: tuple[list[RowSource], tuple[float, ...]],
        work: RowWork,
        plan: DataPlan,
        shuffle_buffer_rows: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sources, self.weights = mix_parts
        self.work, self.plan = work, plan
        self.buffer_rows = max(0, shuffle_buffer_rows)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._counted = False  # the ledger holds a whole pass
        self._in_workers = torch.zeros(1, dtype=torch.bool).share_memory_()  # seen by this process and by DataLoader workers
        self._resume: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        """Go to the start of a pass."""
        self._mix = RowMix(self.sources, self.weights, self.plan.seed)
        self._read_rows = 0  # raw rows of the mix that were read, of all shards
        self._draws = 0  # from the shuffle buffer
        self._taken_rows = 0  # good rows of this shard
        self._waiting: list[_Waiting] = []
        self._current: _Waiting | None = None  # whose encoded rows are being yielded
        self._yielded = 0  # of these
        if not self._counted:
            self.ledger = Ledger()
            for source in self.sources:
                if note := ignored_note(source):
                    self.ledger.note(note)

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffled order of the next pass."""
        self.epoch = epoch

    def next_pass(self) -> None:
        """Go to the start of the next pass: `state_dict` describes that place at once."""
        self.epoch += 1
        self._begin()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shard, shards = self.rank, self.world_size
        worker = get_worker_info()
        if worker is not None:
            self._in_workers.fill_(True)
            shard, shards = shard * worker.num_workers + worker.id, shards * worker.num_workers
        if self._resume is None:
            self._begin()
        else:
            self._restore(self._resume)
            self._resume = None
        limit_rows = self.plan.max_rows
        if limit_rows >= 0:
            limit_rows = limit_rows // shards + (shard < limit_rows % shards)
        if self._current is not None:
            yield from self._encoded(self._current)
        rows = self._shuffled(shard, shards)
        while self._taken_rows != limit_rows and (waiting := next(rows, None)) is not None:
            yield from self._encoded(waiting)
        self._counted = True

    def _encoded(self, waiting: _Waiting) -> Iterator[dict[str, Any]]:
        """The encoded rows of one raw row that were not yielded yet; none for a bad row."""
        i, _, raw = waiting
        outcome = self.work(raw)
        if isinstance(outcome, Drop):
            if self.plan.bad_rows == "error":
                raise outcome.error()
            if not self._counted:
                self.ledger.drop(self.sources[i].name, outcome)
            return
        account, rows = outcome
        if self._current is None:
            self._taken_rows += 1
            if not self._counted:
                self.ledger.took(self.sources[i].name, raw.source, account.encoded_rows, account.truncated_tokens)
        while self._yielded < len(rows):
            row = rows[self._yielded]
            self._yielded += 1
            last = self._yielded == len(rows)
            self._current = None if last else waiting
            self._yielded = 0 if last else self._yielded
            yield row
            if last:
                return

    def _shuffled(self, shard: int, shards: int) -> Iterator[_Waiting]:
        """The raw rows of this shard, drawn at random from a buffer that is kept full; without a buffer, in order."""
        mine = self._sharded(shard, shards)
        while True:
            while len(self._waiting) < max(1, self.buffer_rows) and (item := next(mine, None)) is not None:
                self._waiting.append(item)
            if not self._waiting:
                return
            at = 0
            if self.buffer_rows:
                digest = hashlib.blake2b(f"{self.plan.seed} {self.epoch} {shard} {self._draws}".encode(), digest_size=8).digest()
                at = int.from_bytes(digest, "big") % len(self._waiting)
                self._draws += 1
            self._waiting[at], self._waiting[-1] = self._waiting[-1], self._waiting[at]
            yield self._waiting.pop()

    def _sharded(self, shard: int, shards: int) -> Iterator[_Waiting]:
        for item in self._mix:
            self._read_rows += 1
            if (self._read_rows - 1) % shards == shard:
                yield item

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as a JSON value. Raises UserError when DataLoader workers read it: they keep their places."""
        if bool(self._in_workers):
            raise UserError(
                "--streaming cannot save its place with --dataloader_num_workers > 0; set it to 0 to save checkpoints"
            )
        if self._resume is not None:
            return self._resume
        return {
            "epoch": self.epoch,
            "shards": [self.rank, self.world_size],
            "mix": self._mix.state_dict(),
            "read_rows": self._read_rows,
            "draws": self._draws,
            "taken_rows": self._taken_rows,
            "waiting": [[i, list(place)] for i, place, _ in self._waiting],
            "current": None if self._current is None else [self._current[0], list(self._current[1])],
            "yielded": self._yielded,
            "counted": self._counted,
            "ledger": self.ledger.to_json(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state` when the stream is iterated next. Raises UserError when it was taken with another number of ranks."""
        if state["shards"] != [self.rank, self.world_size]:
            raise UserError(f"the stream was saved as rank and world size {state['shards']}; resume it with as many processes")
        self._resume = state
        self.epoch = state["epoch"]
        self.ledger = Ledger.from_json(state["ledger"])

    def _restore(self, state: dict[str, Any]) -> None:
        self._begin()
        self.epoch = state["epoch"]
        self.ledger = Ledger.from_json(state["ledger"])
        self._mix.load_state_dict(state["mix"])
        for name in ("read_rows", "draws", "taken_rows", "yielded", "counted"):
            setattr(self, f"_{name}", state[name])
        places = [(i, (file, row)) for i, (file, row) in state["waiting"] + ([state["current"]] if state["current"] else [])]
        found = self._read_again(places)
        self._waiting = found[: len(state["waiting"])]
        self._current = found[-1] if state["current"] else None

    def _read_again(self, places: list[tuple[int, Place]]) -> list[_Waiting]:
        """The raw rows at some places that were read before, in the order asked for."""
        found: dict[tuple[int, Place], RawRow] = {}
        for i, source in enumerate(self.sources):
            wanted = {place for j, place in places if j == i}
            if not wanted:
                continue
            for place, raw in source.rows(min(wanted)):
                if place in wanted:
                    found[i, place] = raw
                    if place >= max(wanted):
                        break
        if len(found) < len(set(places)):
            raise UserError("the data changed since the stream was saved: rows that it had read are gone")
        return [(i, place, found[i, place]) for i, place in places]
