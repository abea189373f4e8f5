"""Turns, tool calls and tools as the formats spell them → the project's Messages; and the rules on the order of turns.

The rules (each broken one is a RowError at the turn's field):
a system turn comes first or not at all, and an empty one is the same as none; after it a user turn comes first, for a
template cannot ask for an assistant turn that answers nothing, so a greeting belongs into the system turn; no two user
turns and no two assistant turns in a row; a tool result follows a call; no turn is empty, except the result of a tool
that returned nothing and the text beside a call. A call may follow the text of the same turn: the two become one message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.fields import Row, fail, first_key, kind_of, read_list, read_object, read_text, read_turn_text
from posttrain.types import Message, Role, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")

# A turn and the field of the row that it comes from, so that a fault can be named after turns were read.
Turn = tuple[str, Message]


def read_turns(value: object, source: str, field: str) -> list[Turn]:
    """The turns of a list of {from, value} or {role, content} objects, calls joined to the text before them."""
    turns: list[Turn] = []
    for i, raw in enumerate(read_list(value, source, field, "turns")):
        path = f"{field}[{i}]"
        if not isinstance(raw, Mapping):
            fail(source, path, f"expected a turn (an object), got {kind_of(raw)}")
        message = read_message(raw, source, path)
        if message.role == "system" and not message.content.strip():
            continue
        if turns and _is_bare_call(message) and turns[-1][1].role == "assistant" and turns[-1][1].trained == message.trained:
            path, before = turns.pop()
            message = replace(before, tool_calls=before.tool_calls + message.tool_calls)
        turns.append((path, message))
    return turns


def read_message(raw: Row, source: str, path: str) -> Message:
    """One turn, ShareGPT's or OpenAI's spelling. Raises RowError at `path` and its keys."""
    role_key = first_key(raw, ("from", "role"))
    if role_key is None:
        fail(source, f"{path}.{'role' if 'content' in raw else 'from'}", "missing: who speaks")
    spoken = raw[role_key]
    if not isinstance(spoken, str) or spoken.strip().lower() not in ROLES:
        fail(source, f"{path}.{role_key}", f"unknown role; known: {', '.join(ROLES)}")
    name = spoken.strip().lower()
    role = ROLES[name]
    text_key = first_key(raw, ("value", "content")) or ("content" if role_key == "role" else "value")
    calls = _read_calls(raw, source, path) if role == "assistant" else ()
    if text_key not in raw and not calls:
        fail(source, f"{path}.{text_key}", "missing: what is said")
    content = _read_content(raw.get(text_key), role, source, f"{path}.{text_key}")
    if name in _CALL_ROLES and not _is_action_text(content):
        calls, content = read_call_value(content, source, f"{path}.{text_key}"), ""
    if role == "assistant" and raw.get("reasoning_content"):
        thought = read_text(raw["reasoning_content"], source, f"{path}.reasoning_content")
        content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"  # where Qwen3's and DeepSeek's templates look for it
    if role in ("user", "assistant") and not content.strip():
        if not calls:
            fail(source, f"{path}.{text_key}", "empty turn")
        content = ""
    return Message(role, content, calls, trained=_read_weight(raw, source, path))


def _read_content(value: object, role: Role, source: str, field: str) -> str:
    """The text of a turn; what a tool returned may be any JSON value, which becomes its JSON text."""
    if role == "tool" and isinstance(value, Mapping | bool | int | float):
        return json.dumps(value, ensure_ascii=False)
    return read_turn_text(value, source, field)


def _read_weight(raw: Row, source: str, path: str) -> bool:
    weight = raw.get("weight")
    if weight is None:
        return True
    if weight not in (0, 1, "0", "1"):
        fail(source, f"{path}.weight", "expected 0 (context only) or 1 (trained)")
    return int(weight) == 1


def _read_calls(raw: Row, source: str, path: str) -> tuple[ToolCall, ...]:
    """OpenAI's `tool_calls`, and its older single `function_call`."""
    if raw.get("tool_calls"):
        field = f"{path}.tool_calls"
        listed = read_list(raw["tool_calls"], source, field, "calls")
        return tuple(_read_call(call, source, f"{field}[{i}]") for i, call in enumerate(listed))
    if raw.get("function_call"):
        return (_read_call(raw["function_call"], source, f"{path}.function_call"),)
    return ()


def read_call_value(text: str, source: str, field: str) -> tuple[ToolCall, ...]:
    """ShareGPT's function_call turn: the JSON text of one {name, arguments} or of a list of them."""
    if text.lstrip().startswith("["):
        calls = read_list(text, source, field, "calls")
        if not calls:
            fail(source, field, "empty turn")
        return tuple(_read_call(call, source, f"{field}[{i}]") for i, call in enumerate(calls))
    if not text.strip():
        fail(source, field, "empty turn")
    if not text.lstrip().startswith("{"):
        fail(source, field, 'broken JSON: a call is {"name": …, "arguments": {…}} or a list of them')
    return (_read_call(text, source, field),)


def _read_call(value: object, source: str, field: str) -> ToolCall:
    call = read_object(value, source, field)
    if "function" in call:
        field = f"{field}.function"
        call = read_object(call["function"], source, field)
    name = read_text(call.get("name"), source, f"{field}.name") if call.get("name") is not None else ""
    if not name.strip():
        fail(source, f"{field}.name", "missing: which function is called")
    key = first_key(call, ("arguments", "parameters"))
    arguments = call[key] if key is not None else {}
    if isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    return ToolCall(name, read_object(arguments, source, f"{field}.{key}"))


def _is_action_text(content: str) -> bool:
    """A call written as text (`Action: …`, `Action Input: …`), which stays what the model says."""
    return content.lstrip().startswith("Action:") or "\nAction:" in content


def _is_bare_call(message: Message) -> bool:
    return message.role == "assistant" and bool(message.tool_calls) and not message.content.strip()


def read_tools(row: Row, source: str) -> tuple[dict[str, Any], ...]:
    """The row's `tools` (or `functions`), a list or its JSON text, in OpenAI's form. None and empty text are no tools."""
    field = first_key(row, ("tools", "functions"))
    if field is None or (isinstance(row[field], str) and not row[field].strip()):
        return ()
    tools = []
    for i, value in enumerate(read_list(row[field], source, field, "tools")):
        path = f"{field}[{i}]"
        tool = read_object(value, source, path)
        if tool.get("function") is not None:
            path = f"{path}.function"
            tool = read_object(tool["function"], source, path)
        if not isinstance(tool.get("name"), str) or not tool["name"].strip():
            fail(source, f"{path}.name", "missing: the name of the function")
        function = {"description": "", **tool}
        parameters = tool.get("parameters") or {"type": "object", "properties": {}}
        function["parameters"] = read_object(parameters, source, f"{path}.parameters")
        tools.append(
            {"type": "function", "function": {k: function.pop(k) for k in ("name", "description", "parameters")} | function}
        )
    return tuple(tools)


def check_order(turns: Sequence[Turn], source: str) -> None:
    """Raise RowError at the first turn that cannot stand where it stands (rules: head of this file)."""
    before: Message | None = None
    for path, message in turns:
        problem = _order_problem(before, message)
        if problem:
            fail(source, path, problem)
        before = message


def _order_problem(before: Message | None, message: Message) -> str | None:
    opens = before is None or before.role == "system"
    last = before.role if before else None
    if message.role == "system" and before is not None:
        return "system turn after the first turn; join it to the first or drop it"
    if message.role == "user" and last == "user":
        return "two user turns in a row; join them or add the answer between"
    if message.role == "assistant" and opens:
        return "starts with an assistant turn; put a user turn before it, or move a greeting into the system turn"
    if message.role == "assistant" and last == "assistant":
        return "two assistant turns in a row; join them or add the user turn between"
    if message.role == "tool" and not (before and _may_have_result(before)):
        return "tool result with no call before it"
    return None


def _may_have_result(before: Message) -> bool:
    return before.role == "tool" or (before.role == "assistant" and (bool(before.tool_calls) or _is_action_text(before.content)))
