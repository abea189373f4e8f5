"""Raw rows, messages, files of texts and a small `encode`, shared by the tests of data/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.data.work import EncodedRows
from posttrain.types import Message, RowError, Text, ToolCall

U, A, S, T = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system", "tool"))
WEATHER = {
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": WEATHER}
CALL = ToolCall("weather", {"city": "Bern"})
CALL_TEXT = json.dumps({"name": "weather", "arguments": {"city": "Bern"}})


def sharegpt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


def openai(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLED = said(
    "assistant",
    None,
    tool_calls=[{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}],
)


TEXTS: list[Any] = [f"row {i}" + (" split" * (i % 7 == 3)) + (" long" * (i % 50 == 9)) for i in range(700)]
GOOD = [(number, text) for number, text in enumerate(TEXTS, 1) if "long" not in text]


def encode_text(example: Text) -> EncodedRows:
    """Up to 8 bytes a row; texts of "split" give two rows, of "long" none. Picklable, for it crosses process borders."""
    if "long" in example.text:
        raise RowError(example.source, "text", "too long")
    ids = list(example.text.encode())
    rows = [ids[:8], ids[8:16]] if "split" in example.text else [ids[:8]]
    return EncodedRows([{"input_ids": row, "trained": [1] * len(row)} for row in rows], max(0, len(ids) - 8 * len(rows)))


def write_texts(path: Path, texts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def text_of(row: dict[str, Any]) -> str:
    return bytes(row["input_ids"]).decode()
