"""A raw row with two answers → the ids that are served: every format, both cuts, each fault at its place, and fuzz."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import pytest
from chat_tokenizers import make_tokenizer, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_goldens import stop_text
from test_template import CONTENT, chats, served

from posttrain.data.files import RawRow
from posttrain.data.formats import parse
from posttrain.data.ledger import Drop
from posttrain.data.template import apply_template, encode_pair, stop_token_ids
from posttrain.data.tokenize_pairs import EncodePair, prove_pairs
from posttrain.data.work import RowWork
from posttrain.types import Chat, Message, Pair, RowError, UserError
from rows import CALL_TEXT, TOOL, A, S, U, openai, said, sharegpt

SOURCE = "pairs.jsonl:7"
HH = "\n\nHuman: Is the sky blue?\n\nAssistant: Mostly.\n\nHuman: And in Rome?\n\nAssistant:"
HH_PROMPT = [said("user", "Is the sky blue?"), said("assistant", "Mostly."), said("user", "And in Rome?")]
ASKED = [said("user", "And in Rome?")]
BRIEF = [said("system", "Be brief."), *HH_PROMPT]
GOOD, BAD = " It is sunny there.", " 你好, who knows?"
CALL = {"type": "function", "id": "call00000", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLING = said("assistant", "", tool_calls=[CALL])
OTHER_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
RESULT = said("tool", "rain", tool_call_id="call00000", name="weather")

# A row, then what a client would send to a server: the prompt, and the two answers as turns.
FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Any, Any]] = {
    "sharegpt": (sharegpt(("human", "And in Rome?"), chosen=GOOD, rejected=BAD), ASKED, GOOD, BAD),
    "sharegpt, answers as turns": (
        sharegpt(
            ("human", "Is the sky blue?"), ("gpt", "Mostly."), ("human", "And in Rome?"), system="Be brief.",
            chosen={"from": "gpt", "value": GOOD}, rejected={"from": "gpt", "value": BAD},
        ), BRIEF, GOOD, BAD,
    ),
    "openai, message lists": (
        {"prompt": BRIEF, "chosen": [said("assistant", GOOD)], "rejected": [said("assistant", BAD)]}, BRIEF, GOOD, BAD,
    ),
    "openai, messages and answers": (openai(*BRIEF, chosen=[said("assistant", GOOD)], rejected=said("assistant", BAD)), BRIEF, GOOD, BAD),
    "openai, whole dialogues": (
        {"chosen": [*BRIEF, said("assistant", GOOD)], "rejected": [*BRIEF, said("assistant", BAD)]}, BRIEF, GOOD, BAD,
    ),
    "openai, whole dialogues beside their prompt": (
        {"prompt": "And in Rome?", "chosen": [*ASKED, said("assistant", GOOD)], "rejected": [*ASKED, said("assistant", BAD)]},
        ASKED, GOOD, BAD,
    ),
    "whole dialogues, system beside them": (
        {"system": "Be brief.", "chosen": [*HH_PROMPT, said("assistant", GOOD)], "rejected": [*HH_PROMPT, said("assistant", BAD)]},
        BRIEF, GOOD, BAD,
    ),
    "hh": ({"chosen": HH + GOOD, "rejected": HH + BAD}, HH_PROMPT, GOOD.strip(), BAD.strip()),
    "hh, prompt apart": ({"prompt": HH, "chosen": GOOD, "rejected": BAD}, HH_PROMPT, GOOD, BAD),
    "question": ({"question": "And in Rome?", "response_chosen": GOOD, "response_rejected": BAD}, ASKED, GOOD, BAD),
    "question, system and history": (
        {
            "system": "Be brief.", "history": [["Is the sky blue?", "Mostly."]], "question": "And in Rome?",
            "response_chosen": GOOD, "response_rejected": BAD,
        }, BRIEF, GOOD, BAD,
    ),
    "question, empty system and history": (
        {"system": "", "history": [], "question": "And in Rome?", "response_chosen": GOOD, "response_rejected": BAD},
        ASKED, GOOD, BAD,
    ),
    "instruction": ({"instruction": "And", "input": "in Rome?", "chosen": GOOD, "rejected": BAD}, [said("user", "And\n\nin Rome?")], GOOD, BAD),
}  # fmt: skip
TOOL_FORMATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Any, Any]] = {
    "a call is chosen": (
        sharegpt(("human", "Rain?"), tools=[TOOL], chosen={"from": "function_call", "value": CALL_TEXT}, rejected=BAD),
        [said("user", "Rain?")], CALLING, BAD,
    ),
    "a call is rejected": (
        {"prompt": [said("user", "Rain?")], "tools": json.dumps([TOOL]), "chosen": [said("assistant", GOOD)], "rejected": [CALLING]},
        [said("user", "Rain?")], GOOD, CALLING,
    ),
    "two calls": (
        {"question": "Rain?", "tools": [TOOL], "response_chosen": [CALLING], "response_rejected": said("assistant", "", tool_calls=[OTHER_CALL])},
        [said("user", "Rain?")], CALLING, said("assistant", "", tool_calls=[OTHER_CALL]),
    ),
    "answers to a result": (
        sharegpt(("human", "Rain?"), ("function_call", CALL_TEXT), ("observation", "rain"), tools=[TOOL], chosen=GOOD, rejected=BAD),
        [said("user", "Rain?"), CALLING, RESULT], GOOD, BAD,
    ),
}  # fmt: skip
# Templates that write system turns, calls and stops in different ways, on tokenizers that cut differently.
TEMPLATES = [("qwen", "byte_level"), ("llama3", "gpt2"), ("vicuna", "sentencepiece_bpe"), ("vicuna", "byte_level")]


@cache
def ready(name: str, kind: str = "byte_level") -> Any:
    tokenizer = make_tokenizer(kind, adds_bos=True)
    apply_template(tokenizer, name)
    return tokenizer


def encoder(name: str = "qwen", source: int = 4096, target: int = 4096, keep_stop: bool = True) -> EncodePair:
    return EncodePair(ready(name), source, target, keep_stop)


def encoded(row: Any, encode: EncodePair) -> tuple[dict[str, Any], int]:
    """(columns, truncated tokens) of a raw row."""
    found = encode(parse(row, SOURCE, "pair"))
    (columns,) = found.rows
    return columns, found.truncated_tokens


def sent(tokenizer: Any, turns: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """The ids that a server feeds for these turns."""
    return tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(("name", "kind"), [*TEMPLATES, ("mistral", "byte_level"), ("gemma", "unigram")])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, name: str, kind: str) -> None:
    check_row(*FORMATS[form], ready(name, kind), name, None)


@pytest.mark.parametrize(("name", "kind"), TEMPLATES)
@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_formats_with_tools(form: str, name: str, kind: str) -> None:
    check_row(*TOOL_FORMATS[form], ready(name, kind), name, [TOOL])


def check_row(row: Any, prompt: list[dict[str, Any]], chosen: Any, rejected: Any, tokenizer: Any, name: str, tools: Any) -> None:
    columns, lost = encoded(row, EncodePair(tokenizer, 4096, 4096, True))
    assert list(columns) == ["prompt_ids", "chosen_ids", "rejected_ids", "margin"]
    assert lost == 0
    head = columns["prompt_ids"]
    assert head == sent(tokenizer, prompt, tools)
    asked = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=False)
    for answer, ids in ((chosen, columns["chosen_ids"]), (rejected, columns["rejected_ids"])):
        turn = said("assistant", answer) if isinstance(answer, str) else answer
        stop = stop_text(name, "tool_calls" in turn)
        assert ids[-1] == tokenizer.convert_tokens_to_ids(stop)
        assert not set(ids[:-1]) & set(stop_token_ids(tokenizer))
        whole = tokenizer.apply_chat_template([*prompt, turn], tools=tools, tokenize=False)
        if name == "mistral":  # its template moves the system text when a turn is added, so the answer is found by itself
            assert answer.strip() in written(tokenizer, ids).decode()
        else:
            text = whole[: whole.rindex(stop) + len(stop)]
            assert text.startswith(asked)
            if tokenizer.unk_token is None:
                assert written(tokenizer, ids).decode() == text[len(asked) :]
            assert tokenizer.decode(head + ids) == tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert columns["chosen_ids"] != columns["rejected_ids"]
    assert prove_pairs([{**columns, "source": SOURCE}], tokenizer, 4096).startswith("mask proof: 1 pairs")


@pytest.mark.parametrize("name", ["qwen", "qwen3", "deepseekr1", "mistral", "chatglm3", "vicuna"])
def test_fuzz(name: str) -> None:
    """Random dialogues with a second answer: the prompt and either answer are those that `encode_chat` is held to."""
    tokenizer = ready(name)

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(chats(), CONTENT, st.booleans())
    def run(chat: Chat, other: str, swap: bool) -> None:
        turns = chat.messages[:-1] if chat.messages[-1].role == "user" else chat.messages
        answers = [turns[-1], Message("assistant", other)]
        one, two = reversed(answers) if swap else answers
        head, *found = encode_pair(tokenizer, Pair(turns[:-1], one, two, "fuzz:1", chat.tools))
        for ids, answer in zip(found, (one, two), strict=True):
            whole = Chat((*turns[:-1], answer), "fuzz:1", chat.tools)
            expected, _, text = served(tokenizer, whole, len(turns) - 1, stop_text(name))
            assert head == expected
            assert ids[-1] == tokenizer.convert_tokens_to_ids(stop_text(name))
            assert written(tokenizer, ids).decode() == text
            assert not set(ids[:-1]) & set(stop_token_ids(tokenizer))

    run()


# ---------------------------------------------------------------- the left cut

ROUNDS = [
    ("Is the sky blue over all of the old cities?", "Mostly, and sunny."),
    ("Yes?", "Yes, of course, over Rome and over Bern and over the sea."),
    ("Hello world", "Hello."),
]
LAST = said("user", "And now, tell me what the weather is in Rome?")
TURNS = [turn for question, answer in ROUNDS for turn in (said("user", question), said("assistant", answer))]


@pytest.mark.parametrize("name", ["qwen", "llama3", "vicuna", "mistral"])
@pytest.mark.parametrize("system", [[], [said("system", "Be brief and kind.")]], ids=["bare", "system"])
def test_a_long_prompt_loses_whole_exchanges(name: str, system: list[dict[str, Any]]) -> None:
    """For every budget: the longest run of last exchanges that fits, behind the system turn, ends in the answer's header."""
    tokenizer = ready(name)
    kept = [sent(tokenizer, [*system, *TURNS[2 * k :], LAST]) for k in range(len(ROUNDS) + 1)]
    lengths = [len(ids) for ids in kept]
    assert lengths == sorted(lengths, reverse=True)
    row = {"prompt": [*system, *TURNS, LAST], "chosen": GOOD, "rejected": BAD}
    for budget in range(lengths[-1], lengths[0] + 2):
        columns, lost = encoded(row, encoder(name, source=budget))
        expected = next(ids for ids in kept if len(ids) <= budget)
        assert columns["prompt_ids"] == expected
        assert lost == lengths[0] - len(expected)
    columns, _ = encoded(row, encoder(name, source=lengths[-1]))
    uncut, _ = encoded(row, encoder(name))
    assert (columns["chosen_ids"], columns["rejected_ids"]) == (uncut["chosen_ids"], uncut["rejected_ids"])
    text = written(tokenizer, columns["prompt_ids"]).decode()
    assert all(turn["content"] in text for turn in [*system, LAST])
    assert text[-10:] == written(tokenizer, uncut["prompt_ids"]).decode()[-10:], "the answer's header"
    with pytest.raises(
        RowError, match=rf"{SOURCE}:prompt: .* {lengths[-1]} tokens, more than --max_source_length {lengths[-1] - 1};"
    ):
        encoded(row, encoder(name, source=lengths[-1] - 1))


def test_tokens_are_counted_not_characters() -> None:
    """A prompt of exactly the budget stays whole although it has several characters a token; and Chinese has fewer than one."""
    for question, more_characters in (("Hello world " * 30, True), ("龘靐" * 90, False)):
        row = {"history": [["Hi", "Hello."]], "question": question, "response_chosen": "天" * 9, "response_rejected": "日" * 9}
        whole, _ = encoded(row, encoder())
        n_prompt, n_answer = len(whole["prompt_ids"]), len(whole["rejected_ids"])
        text = written(ready("qwen"), whole["prompt_ids"]).decode()
        assert (len(text) > n_prompt) == more_characters
        assert n_answer > 10
        assert encoded(row, encoder(source=n_prompt, target=n_answer)) == (whole, 0)
        assert encoded(row, encoder(source=n_prompt - 1, target=n_answer))[1] > 0
        assert encoded(row, encoder(source=n_prompt, target=n_answer - 1))[1] > 0


def test_an_exchange_with_a_call_stays_together() -> None:
    """A cut never parts a result from its call, nor the tools from the prompt."""
    tokenizer = ready("qwen")
    calls = [said("user", "Rain?"), CALLING, RESULT]
    row = {"prompt": [*TURNS, *calls], "tools": [TOOL], "chosen": GOOD, "rejected": BAD}
    shortest = sent(tokenizer, calls, [TOOL])
    columns, lost = encoded(row, encoder(source=len(shortest)))
    assert columns["prompt_ids"] == shortest
    assert lost == len(sent(tokenizer, [*TURNS, *calls], [TOOL])) - len(shortest)
    with pytest.raises(RowError, match="prompt: "):
        encoded(row, encoder(source=len(shortest) - 1))


def test_a_cut_prompt_is_followed_by_the_answers_to_it() -> None:
    """Mistral's calls are numbered through the dialogue: with the first call gone, the answer's is the first."""
    tokenizer = ready("mistral")
    called = [said("user", "Rain?"), CALLING, RESULT, said("assistant", "Yes.")]
    row = {"prompt": [*called, said("user", "Rome?")], "tools": [TOOL], "chosen": [CALLING], "rejected": BAD}
    shortest = sent(tokenizer, [said("user", "Rome?")], [TOOL])
    for source, number in ((4096, "call00001"), (len(shortest), "call00000")):
        columns, _ = encoded(row, encoder("mistral", source=source))
        assert number in written(tokenizer, columns["chosen_ids"]).decode()
    assert columns["prompt_ids"] == shortest


# ---------------------------------------------------------------- the right cut

LONG = {"question": "Hi", "response_chosen": "The sky over Rome is sunny.", "response_rejected": "Yes."}


@pytest.mark.parametrize("keep_stop", [True, False])
def test_a_long_answer_loses_its_end(keep_stop: bool) -> None:
    tokenizer = ready("qwen")
    whole, _ = encoded(LONG, encoder())
    chosen, rejected = whole["chosen_ids"], whole["rejected_ids"]
    assert len(chosen) > len(rejected) >= 3
    stop = chosen[-1]
    for target in range(2, len(chosen) + 2):
        columns, lost = encoded(LONG, encoder(target=target, keep_stop=keep_stop))
        for name, ids in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            cut = [*ids[: target - 1], stop] if keep_stop else ids[:target]
            assert columns[name] == (ids if len(ids) <= target else cut)
        assert lost == sum(max(0, len(ids) - target) for ids in (chosen, rejected))
        assert columns["prompt_ids"] == whole["prompt_ids"]
        n_cut = 0 if keep_stop else sum(len(ids) > target for ids in (chosen, rejected))
        note = prove_pairs([{**columns, "source": SOURCE}], tokenizer, target)
        assert (f"({n_cut} cut at {target} tokens)" in note) == (n_cut > 0)


def test_both_cuts_are_counted_together() -> None:
    row = {"prompt": [*TURNS, LAST], "chosen": GOOD, "rejected": BAD}
    whole, _ = encoded(row, encoder())
    columns, lost = encoded(row, encoder(source=len(whole["prompt_ids"]) - 1, target=3))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    gone = [len(whole[name]) - len(columns[name]) for name in names]
    assert all(gone)
    assert lost == sum(gone)
    work = RowWork("pair", "auto", encoder(source=len(whole["prompt_ids"]) - 1, target=3))
    outcome = work(RawRow(SOURCE, row))
    assert not isinstance(outcome, Drop)
    assert outcome[0].truncated_tokens == lost
    assert outcome[1] == [{"source": SOURCE, **columns}]


def test_prove_pairs_finds_what_is_wrong() -> None:
    stop = stop_token_ids(ready("qwen"))[0]
    good = {"prompt_ids": [5], "chosen_ids": [6, stop], "rejected_ids": [7, 8, stop], "source": SOURCE}
    assert prove_pairs([good, good], ready("qwen"), 9) == "mask proof: 2 pairs, each answer through its stop token"
    for name, ids, reason in [
        ("chosen_ids", [6, 7], f"{SOURCE}: its chosen answer does not end in a stop token"),
        ("rejected_ids", [7, stop, 8, stop], f"{SOURCE}: its rejected answer holds a stop token before its end"),
    ]:
        with pytest.raises(UserError, match=reason):
            prove_pairs([good, {**good, name: ids}], ready("qwen"), 9)


# ---------------------------------------------------------------- faults and margin

STOP = "<|im_end|>"
FAULTS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "equal": ({"question": "Hi", "response_chosen": "Yes.", "response_rejected": "Yes. "}, "response_rejected", "equal", {}),
    "equal calls": (
        sharegpt(("human", "x"), tools=[TOOL], chosen={"from": "function_call", "value": CALL_TEXT}, rejected=CALLING),
        "rejected", "equal", {},
    ),
    "empty text": ({"question": "Hi", "response_chosen": "Yes.", "response_rejected": " \n"}, "response_rejected", "empty answer", {}),
    "empty list": ({"prompt": "Hi", "chosen": [], "rejected": "Yes."}, "chosen", "empty answer", {}),
    "empty turn": ({"prompt": "Hi", "chosen": [said("assistant", "")], "rejected": "Yes."}, "chosen[0].content", "empty turn", {}),
    "empty in hh": ({"chosen": HH + GOOD, "rejected": HH}, "rejected", "empty answer", {}),
    "both empty in hh": ({"chosen": HH, "rejected": HH}, "chosen", "empty answer", {}),
    "null": ({"prompt": "Hi", "chosen": None, "rejected": "Yes."}, "chosen", "missing", {}),
    "lost to the cut": (
        {"question": "Hi", "response_chosen": "Yes, of course.", "response_rejected": "Yes, of Rome."}, "rejected",
        "the answers are the same in their first 3 tokens; raise --max_target_length", {"target": 3},
    ),
    "lost to the cut, no stop": (
        {"question": "Hi", "response_chosen": "Yes, of course.", "response_rejected": "Yes, of Rome."}, "rejected",
        "the same in their first 3 tokens", {"target": 3, "keep_stop": False},
    ),
    "a stop token inside": ({"question": "Hi", "response_chosen": "Yes", "response_rejected": f"a{STOP}b"}, "rejected", STOP, {}),
    "a stop token inside the other": ({"question": "Hi", "response_chosen": f"a{STOP}b", "response_rejected": "a"}, "chosen", STOP, {}),
    "a question too long": (
        {"question": "Hello " * 40, "response_chosen": "Yes", "response_rejected": "No"}, "prompt", "--max_source_length 30", {"source": 30},
    ),
    "a system turn too long": (
        {"system": "Be brief " * 40, "question": "Hi", "response_chosen": "Yes", "response_rejected": "No"},
        "prompt", "system turn", {"source": 30},
    ),
    "two system turns": (
        {"system": "s", "chosen": [*BRIEF, said("assistant", "a")], "rejected": [*BRIEF, said("assistant", "b")]},
        "system", "two system turns", {},
    ),
    "a negative margin": ({"question": "Hi", "response_chosen": "a", "response_rejected": "b", "margin": -1}, "margin", "-1", {}),
    "a margin in words": ({"question": "Hi", "response_chosen": "a", "response_rejected": "b", "margin": "big"}, "margin", "'big'", {}),
    "no number": ({"question": "Hi", "response_chosen": "a", "response_rejected": "b", "margin": float("nan")}, "margin", "nan", {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_by_file_line_and_field(fault: str) -> None:
    row, field, reason, limits = FAULTS[fault]
    with pytest.raises(RowError) as caught:
        encoded(row, encoder(**limits))
    assert (caught.value.source, caught.value.field) == (SOURCE, field)
    assert reason in caught.value.reason
    drop = RowWork("pair", "auto", encoder(**limits))(RawRow(SOURCE, row))
    assert isinstance(drop, Drop)
    assert (drop.source, drop.field) == (SOURCE, field)


def test_answers_that_the_tokenizer_makes_equal() -> None:
    """Different texts, the same ids: no longer limit would help, so none is asked for."""
    tokenizer = make_tokenizer("unigram")
    apply_template(tokenizer, "qwen")
    row = {"question": "Hi", "response_chosen": "ﬁne", "response_rejected": "fine"}  # NFKC
    with pytest.raises(RowError, match=f"{SOURCE}:rejected: ") as caught:
        encoded(row, EncodePair(tokenizer, 999, 999, True))
    assert "same tokens" in caught.value.reason
    assert "max_target_length" not in caught.value.reason


@pytest.mark.parametrize(("margin", "expected"), [(None, 0.0), (0, 0.0), (2, 2.0), (0.25, 0.25)])
def test_margin(margin: float | None, expected: float) -> None:
    columns, _ = encoded({**LONG, "margin": margin}, encoder())
    assert columns["margin"] == expected
    assert isinstance(columns["margin"], float)
    assert encoded(LONG, encoder())[0]["margin"] == 0.0


def test_prompts_of_both_answers_are_one() -> None:
    """Qwen3 drops earlier thoughts and opens none: whatever an answer holds, both follow the same ids."""
    tokenizer = ready("qwen3")
    thought = "<think>\nhm\n</think>\n\n4"
    prompt = (S("Be brief."), U("1+1?"), A("<think>\neasy\n</think>\n\n2"), U("2+2?"))
    for one, two in itertools.permutations([thought, "4"]):
        head, chosen, rejected = encode_pair(tokenizer, Pair(prompt, A(one), A(two), SOURCE))
        assert "easy" not in written(tokenizer, head).decode()
        texts = [written(tokenizer, ids).decode() for ids in (chosen, rejected)]
        assert [text.count("hm") for text in texts] == [int(answer == thought) for answer in (one, two)]
        assert all(text.endswith(f"4{STOP}") for text in texts)
