"""Data files → raw rows with the place each comes from, lazily and in constant memory.

.txt (a line is a row, blank lines separate), .jsonl, .json (an array, or objects one after the other), .csv (with a header),
.parquet; each also as .gz or .zst. UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from posttrain.data.json_rows import NOT_UTF8, json_values
from posttrain.types import RowError, UserError

FileType = Literal["txt", "json", "jsonl", "csv", "parquet"]
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = ", ".join(f".{name}" for name in get_args(FileType)) + " (and .gz or .zst of each)"
_READ_BYTES = 1 << 20


class RawRow(NamedTuple):
    """A row as it was read. JSON stays text until `value()`, so that passing over rows is cheap and workers share the decoding."""

    source: str  # "file:line"; the line where the row starts, or the number of the row where a file has no lines
    payload: Any
    is_json: bool = False
    fault: tuple[str, str] | None = None  # (field, reason) when the row could not be read

    def value(self) -> Any:
        """The row. Raises RowError when it is broken."""
        if self.fault:
            raise RowError(self.source, *self.fault)
        if not self.is_json:
            return self.payload
        try:
            return json.loads(self.payload)
        except json.JSONDecodeError as error:
            raise RowError(self.source, f"column {error.colno}", f"broken JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise RowError(self.source, "column 1", f"broken JSON: {error}") from None


@dataclass(frozen=True)
class DataFiles:
    """The files behind one name that the user gave, in reading order."""

    name: str
    paths: tuple[Path, ...]
    ignored: tuple[Path, ...] = ()  # in the folder, of a type that holds no data


def type_of(path: Path) -> tuple[FileType | None, str | None]:
    """(type, compression) by the name's endings; type None: unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes.pop()) if suffixes and suffixes[-1] in _COMPRESSIONS else None
    name = suffixes[-1][1:] if suffixes else ""
    return (next((known for known in get_args(FileType) if known == name), None), compression)


def find_files(names: str, flag: str) -> list[DataFiles]:
    """The data files of a file, a folder (recursive, sorted) or several of them, comma-separated. Raises UserError naming `flag`."""
    given = [names] if Path(names).exists() else [name.strip() for name in names.split(",") if name.strip()]
    if not given:
        raise UserError(f"{flag} is empty; give a file, a folder, or several a,b,c")
    return [_find(name, flag) for name in given]


def _find(name: str, flag: str) -> DataFiles:
    path = Path(name)
    if path.is_file():
        if type_of(path)[0] is None:
            raise UserError(f"{flag} {name}: unknown type of file; known: {_KNOWN}")
        return DataFiles(name, (path,))
    if not path.is_dir():
        raise UserError(f"{flag} {name}: no such file or folder (looked in {Path.cwd()})")
    found = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
    paths = tuple(file for file in found if type_of(file)[0])
    ignored = tuple(file for file in found if not type_of(file)[0])
    if not paths:
        raise UserError(f"{flag} {name}: no data files in this folder ({len(ignored)} others); known: {_KNOWN}")
    return DataFiles(name, paths, ignored)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Links are followed, each folder once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (Path(root) / file for file in files)


def open_bytes(path: Path) -> io.BufferedReader:
    """The decompressed bytes of a file, to be read forwards."""
    compression = type_of(path)[1]
    if compression is None:
        return io.BufferedReader(io.FileIO(path), _READ_BYTES)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), _READ_BYTES)


def content_hash(path: Path) -> str:
    """BLAKE2b of a file's bytes (as stored, not decompressed)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_file(path: Path, skip_rows: int = 0, file_type: FileType | None = None) -> Iterator[RawRow]:
    """The rows of one file behind its first `skip_rows`, lazily.

    A row that is broken by itself is yielded with its fault. RowError is raised only where nothing behind the fault can be
    read (a broken JSON array), UserError where the file cannot be read at all.
    """
    kind = file_type or type_of(path)[0]
    try:
        if kind == "parquet":
            yield from _read_parquet(path, skip_rows)
        elif kind == "csv":
            yield from islice(_read_csv(path), skip_rows, None)
        elif kind == "txt":
            yield from _read_lines(path, is_json=False, skip_rows=skip_rows)
        else:
            yield from _read_json(path, kind, skip_rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


class _Lines:
    """The lines of a stream as text, line ends kept. A line that is not UTF-8 comes with escapes and leaves `fault`."""

    def __init__(self, stream: io.BufferedReader, path: Path):
        self.stream, self.path = stream, path
        self.number = 0  # of the line returned last, from 1
        self.offset_bytes = 0
        self.fault: tuple[str, str] | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.stream)
        start_bytes = self.offset_bytes
        self.offset_bytes += len(line)
        self.number += 1
        if self.number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{self.path}: byte 0: UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
            if line.startswith(codecs.BOM_UTF8):
                line, start_bytes = line[3:], 3
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.fault = self.fault or (f"byte {start_bytes + error.start}", NOT_UTF8)
            return line.decode(errors="surrogateescape")

    def take_fault(self) -> tuple[str, str] | None:
        """The fault since the last call."""
        fault, self.fault = self.fault, None
        return fault


def _read_lines(path: Path, is_json: bool, skip_rows: int) -> Iterator[RawRow]:
    with open_bytes(path) as stream:
        lines, name = _Lines(stream, path), str(path)
        for line in lines:
            if lines.fault is None and not line.strip():
                continue
            if skip_rows > 0:
                skip_rows -= 1
                lines.fault = None
                continue
            fault = lines.take_fault() if lines.fault else None
            yield RawRow(f"{name}:{lines.number}", None if fault else line.rstrip("\r\n"), is_json, fault)


def _read_json(path: Path, kind: str | None, skip_rows: int) -> Iterator[RawRow]:
    """An array or spread-out objects are decoded as they come; else a line is a row."""
    with open_bytes(path) as stream:
        first = stream.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1].decode(errors="replace")
        if first != "[":  # an array may be one line of any length
            first = next((line for line in _Lines(stream, path) if line.strip()), "").strip()
    whole = first.startswith("[")
    if kind == "json" and not whole and first:
        try:
            json.loads(first)
        except ValueError:
            whole = True
    if not whole:
        yield from _read_lines(path, is_json=True, skip_rows=skip_rows)
        return
    with open_bytes(path) as stream:
        for line, value in islice(json_values(stream, path), skip_rows, None):
            yield RawRow(f"{path}:{line}", value)


def _read_csv(path: Path) -> Iterator[RawRow]:
    """Rows are numbered as a spreadsheet numbers them: the header is row 1. An empty cell is an empty text."""
    csv.field_size_limit(sys.maxsize)
    with open_bytes(path) as stream:
        lines = _Lines(stream, path)
        reader = csv.reader(lines, strict=True)
        header = next(reader, None)
        if header is None:
            return
        if lines.fault or len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise UserError(f"{path}:1: the header must name each column once, in UTF-8; it is: {','.join(header)!a}")
        number = 1
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(f"{path}:{number}", None, fault=("row", f"broken CSV: {error}"))
                continue
            fault = lines.take_fault()
            if not fault and cells and len(cells) != len(header):
                fault = ("row", f"has {len(cells)} cells where the header names {len(header)}; quote cells that hold a comma")
            if fault or cells:  # no cells: a blank line
                yield RawRow(f"{path}:{number}", None if fault else dict(zip(header, cells, strict=True)), fault=fault)


def _read_parquet(path: Path, skip_rows: int) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as spooled:
        where: Any = path
        if type_of(path)[1]:  # parquet is read from its end: it must be unpacked first
            with open_bytes(path) as stream:
                while piece := stream.read(_READ_BYTES):
                    spooled.write(piece)
            spooled.seek(0)
            where = spooled
        try:
            number = 0
            for batch in parquet.ParquetFile(where).iter_batches(batch_size=1024):
                if number + batch.num_rows > skip_rows:
                    for i, value in enumerate(batch.to_pylist(), number):
                        if i >= skip_rows:
                            yield RawRow(f"{path}:{i + 1}", without_nulls(value))
                number += batch.num_rows
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: cannot be read as parquet: {error}") from error


def without_nulls(value: Any) -> Any:
    """A table's value without null fields: Arrow fills the fields that a row lacks with null, in every object."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
