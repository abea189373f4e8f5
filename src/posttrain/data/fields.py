"""Typed access to the fields of a raw row: every surprise becomes a RowError that names the field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from posttrain.types import RowError

Row = Mapping[str, Any]

_JSON_NAMES = {
    "dict": "an object",
    "list": "a list",
    "str": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true/false",
    "NoneType": "null",
}


def fail(source: str, field: str, reason: str) -> NoReturn:
    """Raise the RowError for `field` of the row at `source`."""
    raise RowError(source, field, reason)


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    return _JSON_NAMES.get(type(value).__name__, type(value).__name__)


def first_key(row: Row, keys: Iterable[str]) -> str | None:
    """The first of `keys` that the row has with a value; null counts as absent, for tables fill columns with it."""
    return next((key for key in keys if row.get(key) is not None), None)


def read_text(value: object, source: str, field: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        fail(source, field, f"expected text, got {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, a tokenizer cannot read it
            fail(source, field, "holds half of a surrogate pair, which is no character; remove it")
    return value


def read_turn_text(value: object, source: str, field: str) -> str:
    """The content of a turn: a string, null (empty), or OpenAI's list of text parts. It may be empty."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return read_text(value, source, field)
    parts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            fail(source, f"{field}[{i}]", "only parts of type text can be used")
        parts.append(read_text(part.get("text"), source, f"{field}[{i}].text"))
    return "".join(parts)


def read_json(text: str, source: str, field: str) -> Any:
    """A field that holds JSON as a string (tables cannot hold it otherwise)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fail(source, field, f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        fail(source, field, f"broken JSON: {error}")


def read_list(value: object, source: str, field: str, of: str) -> list[Any]:
    """A list, or a JSON string of one. `of` names the elements in the message."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value, source, field)
    if not isinstance(value, list):
        fail(source, field, f"expected a list of {of}, got {kind_of(value)}")
    return value


def read_object(value: object, source: str, field: str) -> dict[str, Any]:
    """An object, or a JSON string of one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = read_json(value, source, field)
    if not isinstance(value, Mapping):
        fail(source, field, f"expected an object, got {kind_of(value)}")
    return dict(value)
