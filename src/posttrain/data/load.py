"""Files, folders and hub names → prepared datasets with their ledgers; limits, mixing, held-out rows.

The way of a row: source (files.py, sources.py) → mix (mix.py) → parse and encode (work.py) → Arrow on disk (cache.py).
The order of rows is that of the files; shuffling is the trainer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.cache import RowWriter, cached_folder, read_folder
from posttrain.data.files import RawRow
from posttrain.data.formats import Kind, parse
from posttrain.data.ledger import BadRows, Counts, Drop, Ledger
from posttrain.data.mix import RowMix
from posttrain.data.sources import DataSource, RowSource, ignored_note, open_sources, split_names
from posttrain.data.split import hold_out
from posttrain.data.work import CHUNK_ROWS, Chunk, Encode, EncodedRows, RowWork, Taken, run_chunks
from posttrain.types import Example, RowError, UserError

if TYPE_CHECKING:
    from posttrain.data.stream import RowStream

__all__ = [
    "DataPlan",
    "DataSource",
    "Encode",
    "EncodedRows",
    "LoadedRows",
    "Splits",
    "iter_examples",
    "load_rows",
    "load_splits",
    "stream_rows",
]

_CACHE_VERSION = 1  # counts up when the same key would give other rows


@dataclass(frozen=True)
class DataPlan:
    """How rows become examples. Plain values, shared by the training and the validation data."""

    kind: Kind
    bad_rows: BadRows = "error"
    max_rows: int = -1  # take the first n good rows; -1: all
    seed: int = 42  # of the weighted mix and of the held-out rows
    workers: int = 1  # processes that parse and encode; the result does not depend on it
    cache_dir: str | None = None  # None: $POSTTRAIN_CACHE or ~/.cache/posttrain
    overwrite_cache: bool = False
    progress: bool = False  # a progress bar on stderr


@dataclass(frozen=True)
class LoadedRows:
    """Prepared rows (a memory-mapped `datasets.Dataset`) and the account of where the rest went."""

    dataset: Any
    ledger: Ledger


@dataclass(frozen=True)
class Splits:
    """Training rows and, where there are any, held-out rows."""

    train: LoadedRows
    validation: LoadedRows | None


def load_rows(source: DataSource, plan: DataPlan, encode: Encode, encode_fingerprint: str) -> LoadedRows:
    """The prepared rows of `source`, from the cache when the same was prepared before.

    encode              pure and picklable: Example of plan.kind → EncodedRows; may raise RowError
    encode_fingerprint  changes whenever `encode` would give other columns (tokenizer, template, lengths)

    Raises RowError at the first bad row under bad_rows="error", UserError when no row is left.
    """
    rows, ledger, _ = _prepare(source, plan, encode, encode_fingerprint)
    return LoadedRows(rows, ledger)


def load_splits(
    train: DataSource,
    validation: DataSource | None,
    plan: DataPlan,
    encode: Encode,
    encode_fingerprint: str,
    split_percentage: float = 0.0,
    max_eval_rows: int = -1,
) -> Splits:
    """Training and held-out rows: from `validation`; else a seeded share of the training rows; else the `validation` split of a
    hub dataset; else none.

    Held-out rows are `split_percentage` percent (rounded down, at least one) of the good rows that are used. They depend on
    the seed and the order of the rows; rows with equal content go to the same side. plan.max_rows limits the training side.
    """
    if not 0 <= split_percentage < 100:
        raise UserError(f"--validation_split_percentage {split_percentage}: expected at least 0 and less than 100")
    held_out_plan = dataclasses.replace(plan, max_rows=max_eval_rows)
    if validation is None and split_percentage == 0 and train.dataset_name is not None and "validation" in split_names(train):
        validation = dataclasses.replace(train, dataset_split="validation")
    if validation is not None or split_percentage == 0:
        held_out = load_rows(validation, held_out_plan, encode, encode_fingerprint) if validation else None
        return Splits(load_rows(train, plan, encode, encode_fingerprint), held_out)
    _check_limit(plan.max_rows)
    _check_limit(max_eval_rows)
    needed_rows = ceil(plan.max_rows * 100 / (100 - split_percentage)) if plan.max_rows > 0 else -1
    all_plan = dataclasses.replace(plan, max_rows=needed_rows)
    rows, ledger, index = _prepare(train, all_plan, encode, encode_fingerprint)
    names = [opened.name for opened in open_sources(train)]
    divided = hold_out(index, split_percentage, plan.seed, (plan.max_rows, max_eval_rows))
    train_rows, validation_rows = divided.select(rows)
    train_ledger, validation_ledger = divided.account(ledger, names, train_rows, validation_rows)
    return Splits(LoadedRows(train_rows, train_ledger), LoadedRows(validation_rows, validation_ledger))


def stream_rows(
    source: DataSource, plan: DataPlan, encode: Encode, shuffle_buffer_rows: int = 0, rank: int = 0, world_size: int = 1
) -> RowStream:
    """The rows of `source` as an iterable dataset that reads and encodes as it goes; plan.workers and the cache play no part."""
    from posttrain.data.stream import RowStream

    _check_limit(plan.max_rows)
    mix_parts = (open_sources(source, streaming=True), source.weights)
    work = RowWork(plan.kind, source.data_format, encode)
    return RowStream(mix_parts, work, plan, shuffle_buffer_rows, rank, world_size)


def iter_examples(
    source: DataSource, kind: Kind | None, bad_rows: BadRows, max_rows: int, ledger: Ledger, seed: int = 42
) -> Iterator[Example]:
    """The examples of `source` one by one, not encoded (for printing, generation, conversion); `ledger` grows with them."""
    _check_limit(max_rows)
    sources = open_sources(source)
    _note_ignored(sources, ledger)
    taken_rows = 0
    for i, _, raw in RowMix(sources, source.weights, seed):
        if taken_rows == max_rows:
            return
        try:
            example = parse(raw.value(), raw.source, kind, source.data_format)
        except RowError as error:
            if bad_rows == "error":
                raise Drop.of(error).error() from None
            ledger.drop(sources[i].name, Drop.of(error))
            continue
        ledger.took(sources[i].name, raw.source)
        taken_rows += 1
        yield example


def _check_limit(max_rows: int) -> None:
    if max_rows == 0 or max_rows < -1:
        raise UserError(f"--max_train_samples or --max_eval_samples {max_rows}: expected a number of rows, or -1 for all")


def _note_ignored(sources: list[RowSource], ledger: Ledger) -> None:
    for source in sources:
        note = ignored_note(source)
        if note:
            ledger.note(note)


def _prepare(source: DataSource, plan: DataPlan, encode: Encode, encode_fingerprint: str) -> tuple[Any, Ledger, dict[str, Any]]:
    """(rows, ledger, example index) from the cache, built first where missing."""
    _check_limit(plan.max_rows)
    sources = open_sources(source)
    key = {
        "version": _CACHE_VERSION,
        "sources": [[opened.name, opened.fingerprint(), ignored_note(opened)] for opened in sources],
        "format": source.data_format,
        "weights": [source.weights, plan.seed] if source.weights else None,
        "kind": plan.kind,
        "max_rows": plan.max_rows,
        "encode": encode_fingerprint,
    }
    work = RowWork(plan.kind, source.data_format, encode)
    mix = RowMix(sources, source.weights, plan.seed)
    folder = cached_folder(key, plan.cache_dir, plan.overwrite_cache, lambda building: _build(building, mix, work, plan))
    rows, ledger, index = read_folder(folder)
    if plan.bad_rows == "error" and ledger.drops:  # prepared under "skip" before
        raise ledger.drops[0].error()
    return rows, ledger, index


def _build(folder: Path, mix: RowMix, work: RowWork, plan: DataPlan) -> None:
    """Write the folder of prepared rows."""
    names = [source.name for source in mix.sources]
    ledger = Ledger(datasets={name: Counts() for name in names})
    _note_ignored(mix.sources, ledger)
    writer = RowWriter(folder)
    drawn_rows = [0] * len(names)  # per source: handed to workers, of which some may lie behind the limit
    seen_rows = [0] * len(names)
    taken_rows = 0
    with closing(run_chunks(work, _chunks(mix, drawn_rows, plan.progress), plan.bad_rows == "error", plan.workers)) as chunks:
        for chunk in chunks:
            taken_rows = _account(chunk, writer, ledger, names, seen_rows, plan)
            if taken_rows == plan.max_rows:
                break
    if mix.ended_by is not None and taken_rows != plan.max_rows:  # a chunk is read whole, beyond the limit
        ledger.note(f"the mix ends where {mix.ended_by} has no more rows; give it less weight to take more of the others")
    for i, rest_rows in enumerate(mix.count_rest()):
        ledger.left(names[i], drawn_rows[i] - seen_rows[i] + rest_rows)
    if taken_rows == 0:
        read = ledger.total.rows_in
        reason = f"; first: {':'.join(ledger.drops[0][:2])}: {ledger.drops[0].reason}" if ledger.drops else ""
        raise UserError(f"{', '.join(names)}: no row can be used, of {read:,} read{reason}")
    writer.close(ledger)


def _chunks(mix: RowMix, drawn_rows: list[int], progress: bool) -> Iterator[list[tuple[int, RawRow]]]:
    from tqdm.auto import tqdm

    chunk: list[tuple[int, RawRow]] = []
    for i, _, raw in tqdm(mix, desc="reading and encoding", unit=" rows", disable=not progress):
        drawn_rows[i] += 1
        chunk.append((i, raw))
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _account(chunk: Chunk, writer: RowWriter, ledger: Ledger, names: list[str], seen_rows: list[int], plan: DataPlan) -> int:
    """Write the good rows of a chunk up to the limit and count all of it; returns the good rows taken so far."""
    kept_rows = 0
    for i, outcome in chunk.outcomes:
        if len(writer.index.datasets) == plan.max_rows:
            break
        seen_rows[i] += 1
        if isinstance(outcome, Taken):
            ledger.took(names[i], outcome.source, outcome.encoded_rows, outcome.truncated_tokens)
            writer.index.append(outcome.encoded_rows, outcome.content_hash, i)
            kept_rows += outcome.encoded_rows
        elif plan.bad_rows == "error":
            raise outcome.error()
        else:
            ledger.drop(names[i], outcome)
    if kept_rows:
        writer.write(chunk.table.slice(0, kept_rows))
    return len(writer.index.datasets)
