"""Raw rows → encoded rows, in this process or in several: the same result, in the same order, for any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from posttrain.data.files import RawRow
from posttrain.data.formats import Kind, parse
from posttrain.data.ledger import Drop
from posttrain.types import RowError, UserError

CHUNK_ROWS = 256


@dataclass(frozen=True)
class EncodedRows:
    """What an example became: one row of columns, or several (a chat that gives a row per trained turn)."""

    rows: list[dict[str, Any]]  # column → value; every row of a dataset has the same columns
    truncated_tokens: int = 0  # of the example, cut off by the length limit


# Pure: Example → EncodedRows. It raises RowError for an example that cannot be used (say, a prompt that is too long).
Encode = Callable[[Any], EncodedRows]


@dataclass(frozen=True)
class Taken:
    """The account of one good row: how many encoded rows it gave, and a hash of its content to know it again."""

    source: str
    encoded_rows: int
    truncated_tokens: int
    content_hash: int


@dataclass(frozen=True)
class RowWork:
    """Everything that turns a raw row into columns. Crosses process borders, so `encode` is picklable where processes are spawned."""

    kind: Kind
    data_format: str
    encode: Encode

    def __call__(self, raw: RawRow) -> tuple[Taken, list[dict[str, Any]]] | Drop:
        """(account, rows of columns with `source` among them), or the reason why the row cannot be used."""
        try:
            example = parse(raw.value(), raw.source, self.kind, self.data_format)
            encoded = self.encode(example)
        except RowError as error:
            return Drop.of(error)
        if not encoded.rows:
            return Drop(raw.source, "row", "nothing to train on")
        content = repr(dataclasses.replace(example, source="")).encode()
        content_hash = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
        rows = [{"source": raw.source, **columns} for columns in encoded.rows]
        return Taken(raw.source, len(rows), encoded.truncated_tokens, content_hash), rows


@dataclass(frozen=True)
class Chunk:
    """Some rows in a row, worked on: an account for each, in order, and the columns of the good ones as an Arrow table."""

    outcomes: list[tuple[int, Taken | Drop]]  # (dataset, account)
    table: Any  # pyarrow.Table; None when no row is good


def work_on(work: RowWork, rows: list[tuple[int, RawRow]], stop_at_fault: bool) -> Chunk:
    """One chunk. `stop_at_fault` leaves the rows behind the first bad one alone."""
    outcomes: list[tuple[int, Taken | Drop]] = []
    columns: list[dict[str, Any]] = []
    for dataset, raw in rows:
        outcome = work(raw)
        if isinstance(outcome, Drop):
            outcomes.append((dataset, outcome))
            if stop_at_fault:
                break
        else:
            outcomes.append((dataset, outcome[0]))
            columns += outcome[1]
    return Chunk(outcomes, to_table(columns) if columns else None)


def to_table(rows: list[dict[str, Any]]) -> Any:
    """Rows of columns as a pyarrow Table, with token ids in 4 bytes and 0/1 flags (`trained`) in 1."""
    import pyarrow as pa

    names = list(rows[0])
    for row in rows:
        if list(row) != names:
            raise ValueError(f"encode gave rows with different columns: {names} and {list(row)}")
    columns = {}
    for name in names:
        column = pa.array([row[name] for row in rows])
        if pa.types.is_list(column.type):
            inner = column.type.value_type
            if name == "trained":
                column = column.cast(pa.list_(pa.int8()))
            elif pa.types.is_int64(inner) or pa.types.is_null(inner):
                column = column.cast(pa.list_(pa.int32()))
        columns[name] = column
    return pa.table(columns)


_worker: tuple[RowWork, bool] | None = None  # of a worker process, set when it starts


def _start_worker(work: RowWork, stop_at_fault: bool) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism; tokenizers' threads do not survive a fork
    _worker = (work, stop_at_fault)


def _work_in_worker(rows: list[tuple[int, RawRow]]) -> Chunk:
    if _worker is None:
        raise RuntimeError("the worker process was not started by run_chunks")
    return work_on(_worker[0], rows, _worker[1])


def _start_method() -> str:
    """Fork starts at once, but not with an initialised CUDA context; the others import everything anew."""
    torch = sys.modules.get("torch")
    cuda_in_use = torch is not None and torch.cuda.is_initialized()
    return "fork" if "fork" in multiprocessing.get_all_start_methods() and not cuda_in_use else "spawn"


def run_chunks(
    work: RowWork,
    chunks: Iterable[list[tuple[int, RawRow]]],
    stop_at_fault: bool,
    workers: int = 1,
    start_method: str | None = None,
) -> Generator[Chunk, None, None]:
    """The chunks, worked on, in order. At most 2 × workers chunks are under way, so memory does not grow with the data."""
    if workers <= 1:
        for rows in chunks:
            yield work_on(work, rows, stop_at_fault)
        return
    context = multiprocessing.get_context(start_method or _start_method())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(work, stop_at_fault))
    under_way: deque[Future[Chunk]] = deque()
    try:
        for rows in chunks:
            under_way.append(pool.submit(_work_in_worker, rows))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--preprocessing_num_workers {workers}: a process died (out of memory?); try fewer, or 1 to see its error"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
