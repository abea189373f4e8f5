"""Files of every type give the same rows, each with its place; what cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from posttrain.data.files import find_files, read_file
from posttrain.types import RowError, UserError

ROWS = [{"text": "first, with a comma"}, {"text": 'zweite "Zeile"'}, {"text": "第三行"}]


def values(path: Path, skip_rows: int = 0) -> list[Any]:
    return [row.value() for row in read_file(path, skip_rows)]


def lines(path: Path) -> list[int]:
    return [int(row.source.removeprefix(f"{path}:")) for row in read_file(path)]


def write(path: Path) -> Path:
    """ROWS in the type that the name says."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        plain = path.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(ROWS), plain, row_group_size=2)
        content = plain.read_bytes()
        plain.unlink()
    elif kind == "csv":
        plain = path.with_suffix(".tmp")
        with plain.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text"])
            writer.writeheader()
            writer.writerows(ROWS)
        content = plain.read_bytes()
        plain.unlink()
    else:
        text = {
            "txt": "\n".join(row["text"] for row in ROWS),
            "json": json.dumps(ROWS, indent=1, ensure_ascii=False),
            "jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n",
        }[kind]
        content = text.encode()
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(path.name.split(".")[-1])
    path.write_bytes(pack(content) if pack else content)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("kind", "places"),
    [("txt", [1, 2, 3]), ("jsonl", [1, 2, 3]), ("json", [2, 5, 8]), ("csv", [2, 3, 4]), ("parquet", [1, 2, 3])],
)
def test_every_type(tmp_path: Path, kind: str, places: list[int], packed: str) -> None:
    path = write(tmp_path / f"rows.{kind}{packed}")
    wanted = [row["text"] for row in ROWS] if kind == "txt" else ROWS
    assert values(path) == wanted
    assert lines(path) == places
    for skip_rows in range(4):
        assert values(path, skip_rows) == wanted[skip_rows:]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b"}', [1, 4]),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        ("a.json", '{\n "text": "a"\n}\n\n{"text":\n"b"}', [1, 5]),
        ("a.json", '\ufeff \n[{"text": "a"},\n\n{"text": "b"}]\n', [2, 4]),
        ("a.jsonl", '[\n{"text": "a"},\n{"text": "b"}\n]', [2, 3]),
        ("a.txt", "\ufeffa\n\n \t\r\nb\r\n", [1, 4]),
        ("a.csv", "\ufefftext\r\na\r\n\r\nb\r\n", [2, 4]),
    ],
)
def test_spellings(tmp_path: Path, name: str, content: str, places: list[int]) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    wanted: list[Any] = ["a", "b"] if name == "a.txt" else [{"text": "a"}, {"text": "b"}]
    assert values(path) == wanted
    assert lines(path) == places


def test_a_broken_line_is_a_fault_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n{"text": b}\n{"text": "Wärme"}\n'.encode() + b'{"text": "\xce\xc4"}\n{"text": "z"}\n')
    good, faults = [], []
    for row in read_file(path):
        try:
            good.append(row.value())
        except RowError as error:
            faults.append((error.source, error.field, error.reason.split(":")[0].split(";")[0]))
    assert good == [{"text": "a"}, {"text": "Wärme"}, {"text": "z"}]
    offset_bytes = path.read_bytes().index(b"\xce")
    assert faults == [(f"{path}:2", "column 10", "broken JSON"), (f"{path}:4", f"byte {offset_bytes}", "not UTF-8")]


@pytest.mark.parametrize(
    ("content", "line", "column", "why"),
    [
        ('[{"a": 1},\n {"a": }]', 2, 8, "Expecting value"),
        ('[{"a": 1}\n {"a": 2}]', 2, 2, "expected , or ]"),
        ('[{"a": 1},\n {"a": 2}', 2, 10, "not closed"),
        ('[{"a": 1},\n]', 2, 1, "a comma before the end"),
        ('[{"a": 1}]\nmore', 2, 1, "text after the end"),
        ('[{"a": "never closed', 1, 8, "Unterminated string"),
    ],
)
def test_broken_array(tmp_path: Path, content: str, line: int, column: int, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(RowError, match="broken JSON") as caught:
        values(path)
    assert (caught.value.source, caught.value.field) == (f"{path}:{line}", f"column {column}")
    assert why in caught.value.reason


def test_array_larger_than_the_buffer(tmp_path: Path) -> None:
    """Elements across every buffer border, one of them longer than the buffer; memory stays that of an element."""
    rows = [{"text": "ä" * (i % 701), "n": i} for i in range(4000)] + [{"text": "x" * 600_000, "n": 12345678901234567890}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    assert values(path) == rows
    path.write_text(json.dumps(list(range(150_000))))
    assert values(path) == list(range(150_000)), "a number is whole only when something follows it"
    text = json.dumps(rows)
    path.write_text(text[:-2] + "x" + text[-2:])
    with pytest.raises(RowError, match="broken JSON") as caught:
        values(path)
    assert (caught.value.source, caught.value.field) == (f"{path}:1", f"column {len(text) - 1}")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = "x" * 1000
    content = {
        "a.txt": f"{line}\n" * 30_000,
        "a.jsonl": f'{{"text": "{line}"}}\n' * 30_000,
        "a.csv": "text\n" + f"{line}\n" * 30_000,
    }
    content["a.json"] = "[" + ",".join([f'{{"text": "{line}"}}'] * 30_000) + "]"
    path.write_text(content[name])
    tracemalloc.start()
    count = sum(1 for _ in read_file(path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 30_000
    assert peak_bytes < 6 << 20, "of a file of 30 MB"


def test_csv_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n1,2\n1,2,3\n1\n"multi\nline",x\n\xff,y\n3,4\n"open,5\n')
    seen = []
    for row in read_file(path):
        number = int(row.source.split(":")[-1])
        try:
            seen.append((number, tuple(row.value().values())))
        except RowError as error:
            seen.append((number, (error.field, error.reason.split(" ")[0])))
    assert seen == [
        (2, ("1", "2")), (3, ("row", "has")), (4, ("row", "has")), (5, ("multi\nline", "x")), (6, ("byte 31", "not")), (7, ("3", "4")), (8, ("row", "broken")),
    ]  # fmt: skip
    path.write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="header must name each column once"):
        values(path)


def test_unreadable_files(tmp_path: Path) -> None:
    utf16 = tmp_path / "a.txt"
    utf16.write_text("hello", encoding="utf-16")
    with pytest.raises(UserError, match=r"a.txt: byte 0: UTF-16, not UTF-8"):
        values(utf16)
    array = tmp_path / "a.json"
    array.write_bytes('["Wärme", "'.encode() + b'\xce\xc4"]')
    with pytest.raises(UserError, match=f"a.json: byte {array.read_bytes().index(bytes([0xCE]))}: not UTF-8"):
        values(array)
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-12])
    with pytest.raises(UserError, match=r"a.jsonl.gz: cannot be read"):
        values(cut)
    table = tmp_path / "a.parquet"
    table.write_bytes(b"no table")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        values(table)


def test_nulls_of_a_table_are_absent_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "calls": {"name": "f"}}]}, {"messages": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert values(path) == [rows[0], {}]


def test_finding(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.txt", "a.csv.gz", "b/notes.md", "Z.JSON", "b/c/x.parquet.zst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "c" / "loop").symlink_to(tmp_path)
    (found,) = find_files(str(tmp_path), "--train_file_dir")
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == [
        "Z.JSON",
        "a.csv.gz",
        "b/10.txt",
        "b/2.jsonl",
        "b/c/x.parquet.zst",
    ]
    assert [path.name for path in found.ignored] == ["notes.md"]
    comma = tmp_path / "one,two.txt"
    comma.touch()
    assert [files.paths for files in find_files(str(comma), "-")] == [(comma,)]
    (tmp_path / "b" / "c" / "loop").unlink()
    both = find_files(f"{tmp_path}/Z.JSON, {tmp_path}/b", "-")
    assert [len(files.paths) for files in both] == [1, 3]


@pytest.mark.parametrize(
    ("name", "why"),
    [("absent", "no such file or folder"), ("a.doc", "unknown type of file"), ("empty", "no data files"), (" , ", "empty")],
)
def test_not_finding(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "a.doc").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^--train_file_dir.*{why}"):
        find_files(name if name == " , " else str(tmp_path / name), "--train_file_dir")
