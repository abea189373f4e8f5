"""Prepared rows on disk, found again by the hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.ledger import Ledger
from posttrain.types import UserError

_ROWS, _EXAMPLES, _LEDGER, _KEY = "rows.arrow", "examples.npz", "ledger.json", "key.json"


def cache_root(cache_dir: str | None) -> Path:
    """`cache_dir`, else $POSTTRAIN_CACHE, else ~/.cache/posttrain."""
    return Path(cache_dir or os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain").expanduser()


@dataclass
class ExampleIndex:
    """Which example each encoded row comes from. Rows of an example stand side by side."""

    encoded_rows: array[int] = field(default_factory=lambda: array("q"))  # per example
    content_hashes: array[int] = field(default_factory=lambda: array("q"))  # per example
    datasets: array[int] = field(default_factory=lambda: array("q"))  # per example

    def append(self, encoded_rows: int, content_hash: int, dataset: int) -> None:
        """The next example."""
        self.encoded_rows.append(encoded_rows)
        self.content_hashes.append(content_hash)
        self.datasets.append(dataset)


class RowWriter:
    """Writes a folder of prepared rows: an Arrow stream, the index of examples, the ledger."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = ExampleIndex()
        self._writer: Any = None

    def write(self, table: Any) -> None:
        """Append the rows of a pyarrow Table; the first one's types hold for all."""
        import pyarrow

        if self._writer is None:
            self._writer = pyarrow.ipc.new_stream(str(self.folder / _ROWS), table.schema)
            self._schema = table.schema
        self._writer.write_table(table if table.schema == self._schema else table.cast(self._schema))

    def close(self, ledger: Ledger) -> None:
        """Finish the folder."""
        import numpy as np

        if self._writer is not None:
            self._writer.close()
        ledger.write(self.folder / _LEDGER)
        index = self.index
        counts, hashes, datasets = (
            np.asarray(c, dtype=np.int64) for c in (index.encoded_rows, index.content_hashes, index.datasets)
        )
        np.savez(self.folder / _EXAMPLES, encoded_rows=counts, content_hashes=hashes, datasets=datasets)


def read_folder(folder: Path) -> tuple[Any, Ledger, dict[str, Any]]:
    """(datasets.Dataset, memory-mapped; ledger; columns of the example index as numpy arrays)."""
    import datasets
    import numpy as np

    rows = datasets.Dataset(datasets.table.MemoryMappedTable.from_file(str(folder / _ROWS)), fingerprint=folder.name)
    ledger = Ledger.from_json(json.loads((folder / _LEDGER).read_text(encoding="utf-8")))
    with np.load(folder / _EXAMPLES) as columns:
        return rows, ledger, dict(columns)


def cached_folder(key: dict[str, Any], cache_dir: str | None, overwrite: bool, build: Callable[[Path], None]) -> Path:
    """The folder for `key` (a JSON value), built when it is missing. Appears whole or not at all, also when several ranks build it."""
    text = json.dumps(key, ensure_ascii=False, sort_keys=True)
    root = cache_root(cache_dir) / "datasets"
    folder = root / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if folder.is_dir() and not overwrite:
        return folder
    building = root / f".building-{uuid.uuid4().hex}"
    replaced = root / f"{building.name}-replaced"
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to the cache folder: {error}; name another with --cache_dir or POSTTRAIN_CACHE") from error
    try:
        build(building)
        (building / _KEY).write_text(text + "\n", encoding="utf-8")
        if overwrite and folder.is_dir():
            folder.rename(replaced)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return folder
