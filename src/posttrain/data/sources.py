"""Where rows come from: files or a hub dataset behind one name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.data.files import DataFiles, RawRow, content_hash, find_files, read_file, without_nulls
from posttrain.types import UserError

Place = tuple[int, int]  # (file, row in it) within one source; both from 0


@dataclass(frozen=True)
class DataSource:
    """What the user named. Either `file_dir` or `dataset_name`."""

    file_dir: str | None = None  # a file, a folder, or several a,b,c
    dataset_name: str | None = None  # a hub dataset or a local dataset folder
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    data_format: str = "auto"  # a key of FORMATS, or auto
    weights: tuple[float, ...] = ()  # one per comma-separated name of file_dir; none: one dataset after the other
    flag: str = "--train_file_dir"  # named in errors about file_dir


class RowSource(Protocol):
    """One dataset: its rows in a fixed order, from any place on."""

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    def rows(self, start: Place = (0, 0)) -> Iterator[tuple[Place, RawRow]]:
        """The rows at and behind `start`, each with its place."""
        ...

    def fingerprint(self) -> Any:
        """A JSON value that changes with the content and with the names in `source`."""
        ...


@dataclass(frozen=True)
class FileSource:
    """The rows of data files."""

    files: DataFiles

    @property
    def name(self) -> str:
        """As the user gave it."""
        return self.files.name

    def rows(self, start: Place = (0, 0)) -> Iterator[tuple[Place, RawRow]]:
        """The rows at and behind `start`; files before it are not opened."""
        for file, path in enumerate(self.files.paths[start[0] :], start[0]):
            skip_rows = start[1] if file == start[0] else 0
            for row, raw in enumerate(read_file(path, skip_rows), skip_rows):
                yield (file, row), raw

    def fingerprint(self) -> Any:
        """Names and content hashes of the files."""
        return [[str(path), content_hash(path)] for path in self.files.paths]


@dataclass(frozen=True)
class HubSource:
    """The rows of a split of a hub dataset or of a local dataset folder, read through `datasets`."""

    name: str
    config_name: str | None
    split: str
    streaming: bool

    def _dataset(self) -> Any:
        import datasets

        folder = Path(self.name)
        if self.name.startswith((".", "/", "~")) and not folder.exists():
            raise UserError(f"--dataset_name {self.name}: no such folder")
        saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()  # written by save_to_disk
        try:
            if saved:
                found = datasets.load_from_disk(self.name)
                return found[self.split] if isinstance(found, datasets.DatasetDict) else found
            return datasets.load_dataset(self.name, self.config_name, split=self.split, streaming=self.streaming)
        except KeyError as error:
            raise UserError(f"--dataset_name {self.name}: no split {error}; splits: {', '.join(found)}") from error
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"--dataset_name {self.name} (split {self.split}): cannot be loaded: {reason}") from error

    def rows(self, start: Place = (0, 0)) -> Iterator[tuple[Place, RawRow]]:
        """The rows at and behind `start`; the source is name[split]:number, from 1."""
        for row, value in enumerate(self._dataset().skip(start[1]), start[1]):
            yield (0, row), RawRow(f"{self.name}[{self.split}]:{row + 1}", without_nulls(value))

    def fingerprint(self) -> Any:
        """What `datasets` itself caches by."""
        return [self.name, self.config_name, self.split, self._dataset()._fingerprint]


def open_sources(source: DataSource, streaming: bool = False) -> list[RowSource]:
    """The datasets that the user named, in order. Raises UserError naming the flag."""
    if (source.file_dir is None) == (source.dataset_name is None):
        raise UserError(f"give either {source.flag} or --dataset_name")
    found: list[RowSource]
    if source.dataset_name is not None:
        found = [HubSource(source.dataset_name, source.dataset_config_name, source.dataset_split, streaming)]
    else:
        found = [FileSource(files) for files in find_files(source.file_dir or "", source.flag)]
    if source.weights and len(source.weights) != len(found):
        raise UserError(
            f"--dataset_weights: {len(source.weights)} weights for {len(found)} datasets; give one for each, in their order"
        )
    return found


def split_names(source: DataSource) -> list[str]:
    """The splits of a hub dataset; none for files, or where `datasets` cannot tell."""
    import datasets

    if source.dataset_name is None or (Path(source.dataset_name) / "state.json").exists():
        return []
    if (Path(source.dataset_name) / "dataset_dict.json").exists():
        return list(datasets.load_from_disk(source.dataset_name))
    try:
        return list(datasets.get_dataset_split_names(source.dataset_name, source.dataset_config_name))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        return []  # the training split is loaded next and says what is wrong


def parse_weights(text: str | None) -> tuple[float, ...]:
    """`--dataset_weights 0.7,0.3` → numbers > 0; None and "" → none."""
    try:
        weights = tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise UserError(f"--dataset_weights {text}: expected numbers, comma-separated: 0.7,0.3") from None
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"--dataset_weights {text}: every weight must be greater than 0; leave a dataset out instead")
    return weights


def ignored_note(source: RowSource) -> str | None:
    """The line about files of a folder that hold no data; None when there are none."""
    ignored = source.files.ignored if isinstance(source, FileSource) else ()
    if not ignored:
        return None
    more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
    return f"{source.name}: {len(ignored)} files hold no data by their type: {', '.join(map(str, ignored[:5]))}{more}"
