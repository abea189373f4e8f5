"""Every format gives the example that it describes, to every stage that can use it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.data.formats import KIND_OF_STAGE, detect, parse
from posttrain.types import Chat, Message, Pair, Prompt, RowError, Text, UserError
from rows import CALL, CALL_TEXT, CALLED, TOOL, WEATHER, A, S, T, U, openai, said, sharegpt

HI = (U("hi"), A("hello"))

CHATS: list[tuple[str, dict[str, Any], tuple[Message, ...], tuple[Any, ...]]] = [
    ("sharegpt", sharegpt(("human", "hi"), ("gpt", "hello")), HI, ()),
    ("sharegpt", sharegpt(("user", "hi"), ("assistant", "hello")), HI, ()),
    ("sharegpt", {"conversations": [said("user", "hi"), said("assistant", "hello")]}, HI, ()),
    ("sharegpt", {"conversations": json.dumps([said("user", "hi"), said("assistant", "hello")])}, HI, ()),
    ("sharegpt", sharegpt(("system", "be brief"), ("human", "hi"), ("gpt", "hello")), (S("be brief"), *HI), ()),
    ("sharegpt", sharegpt(("system", " "), ("human", "hi"), ("gpt", "hello")), HI, ()),
    ("sharegpt", sharegpt(("human", "hi"), ("gpt", "hello"), system="be brief"), (S("be brief"), *HI), ()),
    ("sharegpt", sharegpt(("human", "hi"), ("gpt", "hello"), ("human", "and?")), HI, ()),
    (
        "sharegpt",
        sharegpt(
            ("human", "hi"), ("function_call", CALL_TEXT), ("observation", "rain"), ("gpt", "wet"), tools=json.dumps([WEATHER])
        ),
        (U("hi"), Message("assistant", "", (CALL,)), T("rain"), A("wet")),
        (TOOL,),
    ),
    (
        "sharegpt",
        sharegpt(
            ("human", "hi"),
            ("gpt", "let me see"),
            ("function_call", f"[{CALL_TEXT}, {CALL_TEXT}]"),
            ("observation", ""),
            ("gpt", "wet"),
        ),
        (U("hi"), Message("assistant", "let me see", (CALL, CALL)), T(""), A("wet")),
        (),
    ),
    (
        "sharegpt",
        sharegpt(
            ("human", "hi"),
            ("function_call", 'Action: weather\nAction Input: {"city": "Bern"}'),
            ("observation", "rain"),
            ("gpt", "wet"),
        ),
        (U("hi"), A('Action: weather\nAction Input: {"city": "Bern"}'), T("rain"), A("wet")),
        (),
    ),
    ("openai", openai(said("user", "hi"), said("assistant", "hello"), tools=[TOOL]), HI, (TOOL,)),
    (
        "openai",
        openai(said("developer", "x"), said("user", [{"type": "text", "text": "hi"}]), said("assistant", "hello")),
        (S("x"), *HI),
        (),
    ),
    (
        "openai",
        openai(said("user", "hi"), CALLED, said("tool", "rain", tool_call_id="1"), said("assistant", "wet")),
        (U("hi"), Message("assistant", "", (CALL,)), T("rain"), A("wet")),
        (),
    ),
    (
        "openai",
        openai(said("user", "a"), said("assistant", "b", weight=0), said("user", "c"), said("assistant", "d", weight=1)),
        (U("a"), Message("assistant", "b", trained=False), U("c"), A("d")),
        (),
    ),
    (
        "openai",
        openai(said("user", "hi"), said("assistant", "4", reasoning_content="2+2")),
        (U("hi"), A("<think>\n2+2\n</think>\n\n4")),
        (),
    ),
    ("alpaca", {"instruction": "hi", "input": "", "output": "hello", "history": None, "system": None}, HI, ()),
    ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, (U("add\n\n1 2"), A("3")), ()),
    (
        "alpaca",
        {"instruction": "hi", "output": "hello", "history": [["a", "b"]], "system": "s"},
        (S("s"), U("a"), A("b"), *HI),
        (),
    ),
    ("qa", {"question": "hi", "answer": "hello"}, HI, ()),
    ("qa", {"query": "hi", "response": "hello", "history": '[["a", "b"]]'}, (U("a"), A("b"), *HI), ()),
    ("qa", {"问": "hi", "答": "hello"}, HI, ()),
    ("qa", {"input": "hi", "output": "hello"}, HI, ()),
    ("qa", {"prompt": [said("user", "hi")], "completion": [said("assistant", "hello")]}, HI, ()),
]


@pytest.mark.parametrize(("name", "row", "messages", "tools"), CHATS)
def test_chat(name: str, row: dict[str, Any], messages: tuple[Message, ...], tools: tuple[Any, ...]) -> None:
    wanted = Chat(messages, "f:1", tools)
    assert detect(row) == name
    assert parse(row, "f:1") == parse(row, "f:1", "chat") == parse(row, "f:1", "chat", name) == wanted
    assert parse(json.dumps(row), "f:1", "chat") == wanted, "the same row as a line of a .txt file"


@pytest.mark.parametrize("row", ["a line", {"text": "a line"}, {"text": "a line", "instruction": "x", "output": "y"}])
def test_text(row: Any) -> None:
    assert parse(row, "f:1", "text") == Text("a line", "f:1")


def test_a_chat_without_its_last_answer_is_a_prompt() -> None:
    for _, row, messages, tools in CHATS:
        asked = parse(row, "f:1", "prompt")
        assert isinstance(asked, Prompt)
        assert asked.tools == tools
        if "and?" in str(row):
            assert asked.messages == (*messages, U("and?"))
        else:
            assert asked.messages == messages[:-1]
    for row in ("hi", {"prompt": "hi"}, {"question": "hi", "answer": ""}, {"instruction": "hi"}, openai(said("user", "hi"))):
        assert parse(row, "f:1", "prompt") == Prompt((U("hi"),), "f:1")
    assert parse('{"not": JSON', "f:1", "prompt") == Prompt((U('{"not": JSON'),), "f:1")


HH = "\n\nHuman: hi\n\nAssistant: who?\n\nHuman: me\n\nAssistant:"
PAIRS: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("sharegpt", sharegpt(("human", "hi"), chosen="good", rejected="bad"), (U("hi"),)),
    (
        "sharegpt",
        sharegpt(("human", "hi"), chosen={"from": "gpt", "value": "good"}, rejected={"role": "assistant", "content": "bad"}),
        (U("hi"),),
    ),
    ("openai", openai(said("user", "hi"), chosen=[said("assistant", "good")], rejected=[said("assistant", "bad")]), (U("hi"),)),
    ("qa", {"prompt": "hi", "chosen": "good", "rejected": "bad"}, (U("hi"),)),
    ("qa", {"prompt": [said("system", "s"), said("user", "hi")], "chosen": "good", "rejected": "bad"}, (S("s"), U("hi"))),
    (
        "qa",
        {
            "prompt": "hi",
            "chosen": [said("user", "hi"), said("assistant", "good")],
            "rejected": [said("user", "hi"), said("assistant", "bad")],
        },
        (U("hi"),),
    ),
    (
        "qa",
        {"system": "s", "history": [["a", "b"]], "question": "hi", "response_chosen": "good", "response_rejected": "bad"},
        (S("s"), U("a"), A("b"), U("hi")),
    ),
    ("qa", {"prompt": HH, "chosen": "good", "rejected": "bad"}, (U("hi"), A("who?"), U("me"))),
    ("hh", {"chosen": HH + " good", "rejected": HH + " bad"}, (U("hi"), A("who?"), U("me"))),
    (
        "hh",
        {"chosen": [said("user", "hi"), said("assistant", "good")], "rejected": [said("user", "hi"), said("assistant", "bad")]},
        (U("hi"),),
    ),
    ("alpaca", {"instruction": "hi", "input": "", "chosen": "good", "rejected": "bad"}, (U("hi"),)),
]


@pytest.mark.parametrize(("name", "row", "prompt"), PAIRS)
def test_pair(name: str, row: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    assert detect(row) == name
    assert (
        parse(row, "f:1")
        == parse(row, "f:1", "pair")
        == parse(row, "f:1", "pair", name)
        == Pair(prompt, A("good"), A("bad"), "f:1")
    )
    assert parse(row, "f:1", "prompt") == Prompt(prompt, "f:1")


def test_pair_over_tool_calls() -> None:
    row = sharegpt(("human", "hi"), tools=[WEATHER], chosen={"from": "function_call", "value": CALL_TEXT}, rejected="it rains")
    assert parse(row, "f:1", "pair") == Pair((U("hi"),), Message("assistant", "", (CALL,)), A("it rains"), "f:1", (TOOL,))
    row = sharegpt(
        ("human", "hi"), ("function_call", CALL_TEXT), ("observation", "rain"), tools=[TOOL], chosen="wet", rejected="dry"
    )
    pair = parse(row, "f:1", "pair")
    assert isinstance(pair, Pair)
    assert [m.role for m in pair.prompt] == ["user", "assistant", "tool"]


def test_named_format() -> None:
    with pytest.raises(RowError, match="f:1:instruction: missing"):
        parse({"question": "x", "answer": "y"}, "f:1", "chat", "alpaca")
    with pytest.raises(UserError, match="--data_format alpacca: unknown; known: auto, sharegpt, openai, alpaca, qa, hh, text"):
        parse({"question": "x"}, "f:1", "chat", "alpacca")
    assert set(KIND_OF_STAGE.values()) == {"text", "chat", "pair", "prompt"}
