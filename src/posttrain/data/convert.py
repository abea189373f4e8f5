"""Any format → canonical JSONL: ShareGPT turns, {"text"} for documents, chosen and rejected beside the turns of a pair."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.data.files import FileType, RawRow, find_files, read_file
from posttrain.data.formats import parse
from posttrain.data.formats_pairs import is_transcript
from posttrain.data.ledger import BadRows, Drop, Ledger
from posttrain.types import Example, Message, Pair, RowError, Text, UserError

DataType = Literal["auto", "text", "sharegpt", "openai", "alpaca", "qa", "hh", "json2jsonl"]

_FROM = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did with the rows; `ledger.trained` are the rows written."""

    out_file: Path
    ledger: Ledger

    @property
    def rows_in(self) -> int:
        """Rows read."""
        return self.ledger.total.rows_in

    @property
    def written(self) -> int:
        """Rows written."""
        return self.ledger.total.trained

    def summary(self) -> str:
        """Lines for the terminal."""
        return f"{self.ledger.summary('written')}\nwrote {self.out_file}"


def convert(
    in_file: str,
    out_file: str,
    data_type: DataType = "auto",
    file_type: FileType | Literal["auto"] = "auto",
    bad_rows: BadRows = "skip",
) -> ConvertReport:
    """Write the rows of `in_file` (a file, a folder, several a,b,c) to `out_file` as JSON lines.

    data_type  the format of the rows, or auto: detected row by row. json2jsonl: objects are written as they are
    file_type  how to read the files, or auto: by their names

    The output appears when it is complete. Reading it gives the same examples again. Raises UserError; RowError under "error".
    """
    found = find_files(in_file, "--in_file") if file_type == "auto" or not Path(in_file).is_file() else None
    paths = [Path(in_file)] if found is None else [path for files in found for path in files.paths]
    target = Path(out_file)
    if target.is_dir():
        raise UserError(f"--out_file {out_file}: is a folder; name a file in it")
    if any(target.exists() and path.samefile(target) for path in paths):
        raise UserError(f"--out_file {out_file} is one of the files to read; name another")
    ledger = Ledger()
    for files in found or []:
        if files.ignored:
            ledger.note(
                f"{files.name}: {len(files.ignored)} files hold no data by their type: {', '.join(map(str, files.ignored[:5]))}"
            )
    kind = None if file_type == "auto" else file_type
    rows = ((path, raw) for path in paths for raw in read_file(path, file_type=kind))
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with building.open("w", encoding="utf-8") as stream:
            for value in _converted(rows, data_type, bad_rows, ledger):
                stream.write(json.dumps(value, ensure_ascii=False) + "\n")
        ledger.assert_identity()
        building.replace(target)
    finally:
        building.unlink(missing_ok=True)
    return ConvertReport(target, ledger)


def _converted(
    rows: Iterator[tuple[Path, RawRow]], data_type: DataType, bad_rows: BadRows, ledger: Ledger
) -> Iterator[dict[str, Any]]:
    for path, raw in rows:
        try:
            value = (
                _as_object(raw) if data_type == "json2jsonl" else to_canonical(parse(raw.value(), raw.source, None, data_type))
            )
        except RowError as error:
            if bad_rows == "error":
                raise Drop.of(error).error() from None
            ledger.drop(str(path), Drop.of(error))
            continue
        ledger.took(str(path), raw.source)
        yield value


def _as_object(raw: RawRow) -> dict[str, Any]:
    value = raw.value()
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise RowError(raw.source, "row", "expected an object")
    return value


def to_canonical(example: Example) -> dict[str, Any]:
    """The JSON object that `formats.parse` reads as the same example."""
    if isinstance(example, Text):
        return {"text": example.text}
    if isinstance(example, Pair):
        row: dict[str, Any] = {
            "conversations": _turns(example.prompt),
            "chosen": _answer(example.chosen),
            "rejected": _answer(example.rejected),
        }
    else:
        row = {"conversations": _turns(example.messages)}
    if example.tools:
        row["tools"] = json.dumps(example.tools, ensure_ascii=False)  # text, so that a table can hold any schema
    return row


def _turns(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [turn for message in messages for turn in _turn(message)]


def _turn(message: Message) -> list[dict[str, Any]]:
    """One turn; two (what is said, what is called) when a message has both."""
    turns: list[dict[str, Any]] = []
    if message.content or not message.tool_calls:
        turns.append({"from": _FROM[message.role], "value": message.content})
    if message.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        turns.append({"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)})
    return turns if message.trained else [turn | {"weight": 0} for turn in turns]


def _answer(message: Message) -> Any:
    """Text where that says it all, and cannot be taken for a whole dialogue."""
    plain = not message.tool_calls and message.trained and not is_transcript(message.content)
    return message.content if plain else _turn(message)
