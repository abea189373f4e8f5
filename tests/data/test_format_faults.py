"""Every fault of a row is named at its field, and nothing but a RowError ever escapes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.formats import FORMATS, Kind, parse
from posttrain.types import Chat, Pair, Prompt, RowError, Text
from rows import openai, said, sharegpt

CHAT = sharegpt(("human", "hi"), ("gpt", "hello"))
PAIR = sharegpt(("human", "hi"), chosen="good", rejected="bad")
HH = "\n\nHuman: hi\n\nAssistant: who?\n\nHuman: me\n\nAssistant:"

FAULTS: list[tuple[Kind, Any, str, str]] = [
    ("chat", [1], "row", "expected an object, got a list"),
    ("chat", {"foo": 1, "bar": 2}, "row", "unknown format; keys: foo, bar"),
    ("chat", {"conversations": "hi"}, "conversations", "expected a list of turns, got text"),
    ("chat", {"conversations": "[1,"}, "conversations", "broken JSON"),
    ("chat", {"conversations": []}, "conversations", "no turns"),
    ("chat", {"conversations": ["hi"]}, "conversations[0]", "expected a turn"),
    ("chat", {"conversations": [{"value": "hi"}]}, "conversations[0].from", "missing"),
    ("chat", {"conversations": [{"from": "human"}]}, "conversations[0].value", "missing"),
    ("chat", sharegpt(("human", 5), ("gpt", "x")), "conversations[0].value", "expected text, got a number"),
    ("chat", sharegpt(("human", "\ud800"), ("gpt", "x")), "conversations[0].value", "surrogate"),
    ("chat", sharegpt(("human", "x"), ("gpt", "  ")), "conversations[1].value", "empty turn"),
    ("chat", sharegpt(("human", "x"), ("human", "y"), ("gpt", "z")), "conversations[1]", "two user turns in a row"),
    ("chat", sharegpt(("human", "x"), ("gpt", "y"), ("gpt", "z")), "conversations[2]", "two assistant turns in a row"),
    ("chat", sharegpt(("gpt", "hello, I am"), ("human", "x"), ("gpt", "z")), "conversations[0]", "starts with an assistant turn"),
    ("chat", sharegpt(("human", "x"), ("gpt", "z"), ("system", "s")), "conversations[2]", "system turn after the first"),
    ("chat", sharegpt(("human", "x")), "conversations", "no assistant turn: nothing to train on"),
    ("chat", sharegpt(("wizard", "x"), ("gpt", "y")), "conversations[0].from", "unknown role"),
    ("chat", sharegpt(("human", "x"), ("observation", "y"), ("gpt", "z")), "conversations[1]", "tool result with no call"),
    ("chat", sharegpt(("human", "x"), ("function_call", "{oops")), "conversations[1].value", "broken JSON"),
    ("chat", sharegpt(("human", "x"), ("function_call", "weather")), "conversations[1].value", "broken JSON"),
    ("chat", sharegpt(("human", "x"), ("function_call", '{"arguments": {}}')), "conversations[1].value.name", "missing"),
    ("chat", sharegpt(("human", "x"), ("gpt", "y"), tools="[{]"), "tools", "broken JSON"),
    ("chat", sharegpt(("human", "x"), ("gpt", "y"), tools=[{"description": "d"}]), "tools[0].name", "missing"),
    ("chat", sharegpt(("system", "a"), ("human", "x"), ("gpt", "y"), system="b"), "system", "two system turns"),
    ("chat", openai(said("user", "x"), said("assistant", "y", weight=0)), "messages", "weight 0: nothing to train on"),
    ("chat", openai(said("user", "x"), said("assistant", "y", weight=0.5)), "messages[1].weight", "expected 0"),
    ("chat", openai(said("user", [{"type": "image_url"}]), said("assistant", "y")), "messages[0].content[0]", "type text"),
    ("chat", openai(said("user", "x"), said("assistant", None)), "messages[1].content", "empty turn"),
    (
        "chat",
        openai(said("user", "x"), said("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "{"}}])),
        "messages[1].tool_calls[0].function.arguments",
        "broken JSON",
    ),
    (
        "chat",
        openai(
            said("user", "x"),
            said("assistant", "y", weight=0),
            said("assistant", "", tool_calls=[{"name": "f", "arguments": {}}]),
        ),
        "messages[2]",
        "two assistant turns in a row",
    ),
    ("chat", {"instruction": "x"}, "output", "missing"),
    ("chat", {"instruction": "", "output": "y"}, "instruction", "empty turn"),
    ("chat", {"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]", "pair"),
    ("chat", {"question": "x", "answer": ""}, "answer", "empty turn"),
    ("chat", {"question": "x"}, "answer", "missing"),
    ("chat", {"text": "x"}, "text", "a chat is wanted"),
    ("chat", PAIR, "chosen", "a preference pair"),
    ("text", CHAT, "conversations", "plain text is wanted"),
    ("text", {"text": " \n"}, "text", "empty document"),
    ("text", {"text": 3}, "text", "expected text, got a number"),
    ("prompt", {"text": "x"}, "text", "a prompt is wanted"),
    ("prompt", sharegpt(("system", "s")), "conversations", "no user turn"),
    ("pair", CHAT, "conversations", "a preference pair is wanted"),
    ("pair", sharegpt(("human", "x"), chosen="y"), "rejected", "missing"),
    ("pair", sharegpt(("human", "x"), chosen="y", rejected="y "), "rejected", "equal"),
    ("pair", {"chosen": CHAT["conversations"], "rejected": CHAT["conversations"]}, "rejected", "equal"),
    ("pair", sharegpt(("human", "x"), chosen=" ", rejected="y"), "chosen", "empty answer"),
    ("pair", sharegpt(("human", "x"), ("gpt", "y"), chosen="a", rejected="b"), "conversations[1]", "ends in a user turn"),
    ("pair", {"chosen": "a", "rejected": "b"}, "chosen", "no prompt"),
    (
        "pair",
        {"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "c"), said("assistant", "d")]},
        "rejected",
        "differ before their last turn",
    ),
]


@pytest.mark.parametrize(("kind", "row", "field", "reason"), FAULTS)
def test_fault_is_named_at_its_field(kind: Kind, row: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row, "file.jsonl:7", kind)
    assert (caught.value.source, caught.value.field) == ("file.jsonl:7", field)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"file.jsonl:7:{field}: ")


KEYS = sorted(
    {key for form in FORMATS.values() for key in form.keys} | {"rejected", "history", "tools", "system", "answer", "output"}
)
ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function_call", "observation", "x"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["[", "{", "[1]", '{"a": 1}', HH])
)
TURN = st.fixed_dictionaries(
    {}, optional={"from": ROLES, "role": ROLES, "value": SCALARS, "content": SCALARS, "tool_calls": SCALARS, "weight": SCALARS}
)
VALUE = st.recursive(
    SCALARS | TURN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)
ROW = VALUE | st.dictionaries(st.sampled_from(KEYS), VALUE | st.lists(TURN, max_size=4), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(row=ROW, kind=st.sampled_from(["text", "chat", "pair", "prompt", None]))
def test_any_json_value_gives_an_example_or_a_row_error(row: Any, kind: Kind | None) -> None:
    try:
        example = parse(row, "f:1", kind)
    except RowError:
        return
    assert isinstance(example, {"text": Text, "chat": Chat, "pair": Pair, "prompt": Prompt, None: (Text, Chat, Pair)}[kind])
    if isinstance(example, Chat):
        assert example.messages[-1].role == "assistant"
        assert any(m.trained for m in example.messages if m.role == "assistant")
