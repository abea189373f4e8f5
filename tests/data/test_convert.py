"""Converted rows are read as the examples that they were, and the report accounts for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.convert import DataType, convert, to_canonical
from posttrain.data.files import read_file
from posttrain.data.formats import FORMATS, parse
from posttrain.types import Chat, Message, Pair, RowError, ToolCall, UserError
from rows import openai, said, sharegpt


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False))
    return str(path)


CANONICAL = sharegpt(("human", "add\n\n1 2"), ("gpt", "3"))
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("data_type", "row", "wanted"),
    [
        ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, CANONICAL),
        ("qa", {"input": "add\n\n1 2", "output": "3"}, CANONICAL),
        ("qa", {"question": "add\n\n1 2", "answer": "3"}, CANONICAL),
        ("sharegpt", {**CANONICAL, "id": 5}, CANONICAL),
        ("openai", openai(said("user", "add\n\n1 2"), said("assistant", "3")), CANONICAL),
        ("auto", openai(said("user", "x"), said("assistant", "y"), tools=[{"name": "f"}]), {**sharegpt(("human", "x"), ("gpt", "y")), "tools": json.dumps([TOOL])}),
        ("auto", {"prompt": "x", "chosen": "y", "rejected": "z"}, {"conversations": [{"from": "human", "value": "x"}], "chosen": "y", "rejected": "z"}),
        ("text", {"text": "你好", "meta": 1}, {"text": "你好"}),
        ("json2jsonl", {"any": ["thing"]}, {"any": ["thing"]}),
    ],
)  # fmt: skip
def test_each_type(tmp_path: Path, data_type: DataType, row: Any, wanted: Any) -> None:
    report = convert(write(tmp_path / "in.json", [row, row]), str(tmp_path / "new" / "out.jsonl"), data_type)
    assert read(report.out_file) == [wanted, wanted]
    assert (report.rows_in, report.written, report.ledger.total.dropped) == (2, 2, 0)


def test_data_types_are_the_formats() -> None:
    assert set(get_args(DataType)) == {"auto", "json2jsonl", *FORMATS}


def test_bad_rows_are_reported(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [CANONICAL, {"conversations": []}, {"x": 1}])
    report = convert(source, str(tmp_path / "out.jsonl"), "sharegpt")
    assert read(report.out_file) == [CANONICAL]
    assert [(drop.source, drop.field) for drop in report.ledger.drops] == [(f"{source}:1", "conversations")] * 2
    assert "rows: 3 in = 1 written + 2 dropped" in report.summary()
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(RowError, match="empty list"):
        convert(source, str(tmp_path / "out.jsonl"), "sharegpt", bad_rows="error")
    assert (tmp_path / "out.jsonl").read_bytes() == before, "a failed conversion leaves the earlier file alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.jsonl"]


def test_files(tmp_path: Path) -> None:
    table = tmp_path / "data"
    table.write_text("question,answer\nx,y\n")
    report = convert(str(table), str(tmp_path / "out.jsonl"), "qa", "csv")
    assert read(report.out_file) == [sharegpt(("human", "x"), ("gpt", "y"))]
    lines = tmp_path / "lines.txt"
    lines.write_text('{"问": "x", "答": "y"}\n')
    assert read(convert(str(lines), str(tmp_path / "out.jsonl"), "qa").out_file) == [sharegpt(("human", "x"), ("gpt", "y"))]
    assert read(convert(str(lines), str(tmp_path / "out.jsonl")).out_file) == [{"text": '{"问": "x", "答": "y"}'}]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "notes.md").touch()
    report = convert(str(folder), str(tmp_path / "out.jsonl"), "json2jsonl")
    assert read(report.out_file) == [{"text": "one"}, {"text": "two"}]
    assert "notes.md" in report.summary()
    with pytest.raises(UserError, match=r"--out_file .* is one of the files to read"):
        convert(str(tmp_path / "out.jsonl"), str(tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match="--in_file absent"):
        convert("absent", str(tmp_path / "out.jsonl"))


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
CALLS = st.lists(
    st.builds(ToolCall, TEXT, st.dictionaries(TEXT, st.integers() | TEXT | st.none(), max_size=2)), min_size=1, max_size=2
).map(tuple)
ANSWER = st.builds(Message, st.just("assistant"), TEXT, st.just(()), st.booleans()) | st.builds(
    Message, st.just("assistant"), TEXT | st.just(""), CALLS, st.booleans()
)
USER = TEXT.map(lambda text: Message("user", text))


@st.composite
def chats(draw: Any) -> Chat:
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [draw(USER), draw(ANSWER)]
        if messages[-1].tool_calls:
            messages += [Message("tool", draw(TEXT | st.just("")))] * draw(st.integers(1, 2)) + [draw(ANSWER)]
    messages += [draw(USER), Message("assistant", draw(TEXT))]
    return Chat(tuple(messages), "f:1", draw(st.sampled_from([(), (TOOL,)])))


@settings(max_examples=150, deadline=None)
@given(chats())
def test_a_chat_survives(chat: Chat) -> None:
    assert parse(json.loads(json.dumps(to_canonical(chat))), "f:1") == chat


@settings(max_examples=100, deadline=None)
@given(chats(), ANSWER, ANSWER)
def test_a_pair_survives(chat: Chat, chosen: Message, rejected: Message) -> None:
    pair = Pair(chat.messages[:-1], chosen, rejected, "f:1", chat.tools)
    if (chosen.content.strip(), chosen.tool_calls) != (rejected.content.strip(), rejected.tool_calls):
        assert parse(json.loads(json.dumps(to_canonical(pair))), "f:1") == pair


def test_the_output_reads_as_the_input(tmp_path: Path) -> None:
    rows = [CANONICAL, {"text": "x"}, {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}]
    report = convert(write(tmp_path / "in.json", rows), str(tmp_path / "out.jsonl"))
    assert [parse(row.value(), "f:1") for row in read_file(report.out_file)] == [parse(row, "f:1") for row in rows]
