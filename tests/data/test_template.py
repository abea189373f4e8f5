"""The template contract on every named template: goldens written by hand, then fuzzed chats against the tokenizer's own rendering."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from chat_tokenizers import KINDS, make_tokenizer, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_goldens import DEFAULTS, GOLDEN_CHAT, GOLDENS, SKY, THINKING, TOOLS, stop_text

from posttrain.data.template import Encoded, apply_template, encode_chat, encode_prompt, list_templates, stop_token_ids
from posttrain.types import Chat, Message, Prompt, ToolCall

NAMES = list_templates()


# By the family's rule; and because this tokenizer joins "Belle: " and "Hello", ":" and the line break after it.
ONE_ROW_PER_TURN = {"baichuan", "baichuan2", "chatglm2", "deepseekr1", "mistral", "qwen3"} | {"belle", "xverse", "deepseekcoder"}


@cache
def ready(name: str, kind: str = "byte_level") -> Any:
    """A tokenizer of the kind that speaks the named template."""
    tokenizer = make_tokenizer(kind, adds_bos=True)
    apply_template(tokenizer, name)
    return tokenizer


def test_at_least_the_known_names_have_goldens() -> None:
    assert set(GOLDENS) == set(NAMES)
    assert len(NAMES) >= 25


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    prompt, answer = GOLDENS[name]
    tokenizer = ready(name)
    row = encode_chat(tokenizer, Chat(GOLDEN_CHAT, "f:1"))[-1]
    start, end = row.turns[-1]
    assert written(tokenizer, row.input_ids[:start]).decode() == prompt
    assert written(tokenizer, row.input_ids[start:end]).decode() == answer
    assert end == len(row.input_ids)
    assert encode_prompt(tokenizer, Prompt(GOLDEN_CHAT[:-1], "f:1")) == row.input_ids[:start]


@pytest.mark.parametrize("name", NAMES)
def test_first_turn_is_trained_too_and_once(name: str) -> None:
    tokenizer = ready(name)
    rows = encode_chat(tokenizer, Chat(GOLDEN_CHAT, "f:1"))
    assert len(rows) == (2 if name in ONE_ROW_PER_TURN else 1)
    said = [written(tokenizer, row.input_ids[a:b]).decode() for row in rows for a, b in row.turns]
    assert said == [GOLDENS[name][1].replace("Yes.", "Hello."), GOLDENS[name][1]]


@pytest.mark.parametrize("name", NAMES)
def test_default_system_prompt(name: str) -> None:
    text = written(ready(name), encode_prompt(ready(name), Prompt((Message("user", "Hi"),), "f:1"))).decode()
    if name in DEFAULTS:
        assert text == DEFAULTS[name]
    else:  # nothing but the family's marks
        assert "helpful" not in text.lower()
        assert len(text) <= len(written(ready(name), encode_prompt(ready(name), Prompt(GOLDEN_CHAT[:2], "f:1")))) - len(
            "Be brief."
        )


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_golden_tools(name: str) -> None:
    call, between, answer = TOOLS[name]
    tokenizer = ready(name)
    turns = (
        Message("user", "Rome?"), Message("assistant", "", (ToolCall("sky", {"city": "Rome"}),)),
        Message("tool", "sunny"), Message("assistant", "Sun."),
    )  # fmt: skip
    (row,) = encode_chat(tokenizer, Chat(turns, "f:1", (SKY,)))
    (a, b), (c, d) = row.turns
    assert written(tokenizer, row.input_ids[a:b]).decode() == call
    assert written(tokenizer, row.input_ids[b:c]).decode() == between
    assert written(tokenizer, row.input_ids[c:d]).decode() == answer
    described = written(tokenizer, row.input_ids[:a]).decode()
    assert "What the sky looks like" in described
    assert '"city"' in described


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3",
            [
                ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "<think>\neasy\n</think>\n\n2<|im_end|>"),
                (
                    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
                    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
                    "<think>\nhm\n</think>\n\n4<|im_end|>",
                ),
            ],
        ),
        (
            "deepseekr1",
            [
                ("<s><｜User｜>1+1?<｜Assistant｜><think>\n", "easy\n</think>\n\n2</s>"),
                ("<s><｜User｜>1+1?<｜Assistant｜>2</s><｜User｜>2+2?<｜Assistant｜><think>\n", "hm\n</think>\n\n4</s>"),
            ],
        ),
    ],
)
def test_earlier_thoughts_are_dropped_so_each_turn_is_a_row(name: str, expected: list[tuple[str, str]]) -> None:
    rows = encode_chat(ready(name), Chat(THINKING, "f:1"))
    ((a, _),), ((b, _),) = rows[0].turns, rows[1].turns
    cut = [(r.input_ids[:n], r.input_ids[n:]) for r, n in zip(rows, (a, b), strict=True)]
    assert [tuple(written(ready(name), ids).decode() for ids in pair) for pair in cut] == expected


# ---------------------------------------------------------------- fuzz

LETTERS = st.sampled_from(
    [*"aZ09.,:;!?<>|[]{}\"'\\#_-/", " ", "  ", "\n", "\n\n", "\t", "\r", "é", "e\u0301", "你", "。", "🦊", "\u00a0", "ﬁ"]
)
WORDS = st.sampled_from(["Hello", " the", "USER:", "Assistant: ", "[/INST]", "### Response:\n", "<|x|>", "<tool_call>", "null"])
LOOSE = st.lists(LETTERS | WORDS, max_size=12).map("".join)
CONTENT = LOOSE.filter(lambda text: bool(text.strip()))
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "n", "名"]), CONTENT | st.integers() | st.booleans() | st.lists(CONTENT, max_size=2), max_size=2
)
CALL = st.builds(ToolCall, st.sampled_from(["sky", "sea_2"]), ARGUMENTS)


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """System (also empty) or not, one to three rounds, some through tools, some turns not trained, perhaps an open question."""
    messages = [Message("system", draw(LOOSE))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(CONTENT)))
        for calls in draw(st.lists(st.lists(CALL, min_size=1, max_size=2), max_size=1)):
            messages.append(Message("assistant", draw(st.just("") | CONTENT), tuple(calls), trained=draw(st.booleans())))
            messages += [Message("tool", draw(LOOSE)) for _ in calls]
        messages.append(Message("assistant", draw(CONTENT), trained=draw(st.booleans())))
    last = messages[-1]
    messages[-1] = Message("assistant", last.content)
    if draw(st.booleans()):
        messages.append(Message("user", draw(CONTENT)))
    return Chat(tuple(messages), "fuzz:1", (SKY,) if draw(st.booleans()) else ())


def openai_form(chat: Chat) -> list[dict[str, Any]]:
    """The chat as a client of a server would send it."""
    turns: list[dict[str, Any]] = []
    names: list[str] = []
    answered = 0
    for message in chat.messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            first = len(names)
            names += [call.name for call in message.tool_calls]
            turn["tool_calls"] = [
                {"type": "function", "id": f"call{first + k:05d}", "function": {"name": c.name, "arguments": c.arguments}}
                for k, c in enumerate(message.tool_calls)
            ]
        if message.role == "tool":
            turn |= {"tool_call_id": f"call{answered:05d}", "name": names[answered]}
            answered += 1
        turns.append(turn)
    return turns


def served(tokenizer: Any, chat: Chat, i: int, stop: str) -> tuple[list[int], str, str]:
    """What a server feeds before turn i (ids, text), and what the template then writes for the turn, through `stop`."""
    turns = openai_form(chat)
    tools = list(chat.tools) or None
    ids = tokenizer.apply_chat_template(turns[:i], tools=tools, add_generation_prompt=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(turns[:i], tools=tools, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns[: i + 1], tools=tools, tokenize=False)
    assert whole.startswith(prompt)
    answer = whole[len(prompt) :]
    return ids, prompt, answer[: answer.rindex(stop) + len(stop)]


def check_contract(tokenizer: Any, name: str, chat: Chat) -> None:
    rows = encode_chat(tokenizer, chat)
    turns = [i for i, m in enumerate(chat.messages) if m.role == "assistant" and m.trained]
    spans = [(row, a, b) for row in rows for a, b in row.turns]
    assert len(spans) == len(turns)
    assert len(rows) in (1, len(turns))
    for row in rows:
        inside = {k for a, b in row.turns for k in range(a, b)}
        assert row.trained == [int(k in inside) for k in range(len(row.input_ids))]
        assert sum(b - a for a, b in row.turns) == len(inside)  # no id twice
    prompts = []
    for i, (row, a, b) in zip(turns, spans, strict=True):
        stop = stop_text(name, bool(chat.messages[i].tool_calls))
        ids, prompt, answer = served(tokenizer, chat, i, stop)
        prompts.append(ids)
        assert row.input_ids[:a] == ids
        assert row.input_ids[b - 1] == tokenizer.convert_tokens_to_ids(stop)
        assert not set(row.input_ids[a : b - 1]) & set(stop_token_ids(tokenizer))
        whole = tokenizer(prompt + answer, add_special_tokens=False).input_ids
        if whole[:a] == ids:
            assert row.input_ids[a:b] == whole[a:]
        elif tokenizer.unk_token_id not in whole:  # the tokenizer joins prompt and answer: other ids, the same text
            assert written(tokenizer, row.input_ids[:b]) == written(tokenizer, whole)
        if row.input_ids and tokenizer.unk_token is None:
            assert written(tokenizer, row.input_ids[a:b]).decode() == answer
    if len(rows) == 1:
        assert rows[0].turns[-1][1] == len(rows[0].input_ids)
    else:  # one row could not have held them all
        last = rows[-1].input_ids
        assert any(last[:b] != row.input_ids[:b] for row, a, b in spans)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_trained_is_what_is_served(name: str, kind: str) -> None:
    tokenizer = ready(name, kind)

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(chats())
    def run(chat: Chat) -> None:
        check_contract(tokenizer, name, chat)

    run()


def test_context_turns_are_not_trained() -> None:
    turns = [Message(m.role, m.content, trained=m.content != "Hello.") for m in GOLDEN_CHAT]
    (row,) = encode_chat(ready("chatml"), Chat((*turns, Message("user", "more")), "f:1"))
    assert row == Encoded(row.input_ids, row.trained, [row.turns[-1]])
    assert (
        written(ready("chatml"), [i for i, t in zip(row.input_ids, row.trained, strict=True) if t]).decode() == "Yes.<|im_end|>"
    )
    assert written(ready("chatml"), row.input_ids).decode() == GOLDENS["chatml"][0] + "Yes.<|im_end|>"
