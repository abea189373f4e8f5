"""Preference pairs: a dialogue with two answers, or two whole dialogues whose common start is the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from posttrain.data.fields import Row, fail, first_key, read_text
from posttrain.data.messages import Turn, check_order, read_message, read_tools, read_turns
from posttrain.types import Message, Pair

CHOSEN_KEYS = ("chosen", "response_chosen")
REJECTED_KEYS = ("rejected", "response_rejected")

# Anthropic's HH transcripts: turns begin after a blank line (or at the start) with the speaker's name.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def has_answers(row: Row) -> bool:
    """Whether the row holds both answers of a pair."""
    return first_key(row, CHOSEN_KEYS) is not None and first_key(row, REJECTED_KEYS) is not None


def is_transcript(text: str) -> bool:
    """Whether text is a dialogue written as Human: … Assistant: …"""
    return bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def read_transcript(text: str, source: str, field: str) -> list[Turn]:
    """The turns of an HH transcript. An `Assistant:` with nothing behind it, at the end, asks for the answer and is no turn."""
    parts = _SPEAKER.split("\n\n" + read_text(text, source, field).strip())
    turns: list[Turn] = []
    spoken = list(zip(parts[1::2], parts[2::2], strict=True))
    for i, (speaker, said) in enumerate(spoken):
        if not said.strip():
            if speaker == "Assistant" and i == len(spoken) - 1:
                break
            fail(source, field, "empty turn")
        turns.append((field, Message("user" if speaker == "Human" else "assistant", said.strip())))
    return turns


def read_pair(row: Row, source: str, read_prompt: Callable[[], list[Turn]] | None, system: list[Turn]) -> Pair:
    """The pair of a row that has both answers. `read_prompt` reads the dialogue before them; None: the row has none beside them.

    `system` is the system turn beside the dialogue, if any: `read_prompt` knows it already, whole dialogues do not.
    """
    chosen_key = first_key(row, CHOSEN_KEYS) or CHOSEN_KEYS[0]
    rejected_key = first_key(row, REJECTED_KEYS) or REJECTED_KEYS[0]
    chosen = _read_answer(row[chosen_key], source, chosen_key)
    rejected = _read_answer(row[rejected_key], source, rejected_key)
    if any(message.role == "user" for _, message in chosen + rejected):
        prompt, chosen, rejected = _split_common(chosen, rejected, source, rejected_key)
        if system and prompt and prompt[0][1].role == "system":
            fail(source, system[0][0], f"two system turns, here and in {chosen_key}; keep one")
        prompt = system + prompt
    elif read_prompt is None:
        fail(source, chosen_key, "no prompt: neither beside the answers nor in them")
    else:
        prompt = read_prompt()
    for turns, key in ((chosen, chosen_key), (rejected, rejected_key)):
        if len(turns) != 1 or turns[0][1].role != "assistant":
            fail(source, key, "expected one assistant turn after the prompt")
    if not prompt or prompt[-1][1].role not in ("user", "tool"):
        fail(source, prompt[-1][0] if prompt else chosen_key, "the prompt of a pair ends in a user turn or a tool result")
    for answer in (chosen, rejected):
        check_order([*prompt, *answer], source)
    if _same(chosen[0][1], rejected[0][1]):
        fail(source, rejected_key, "chosen and rejected are equal: nothing to prefer")
    messages = tuple(message for _, message in prompt)
    return Pair(messages, chosen[0][1], rejected[0][1], source, read_tools(row, source), _read_margin(row, source))


def _read_margin(row: Row, source: str) -> float:
    """How much better the chosen answer is at least, in units of reward; 0 where the row does not say."""
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
        fail(source, "margin", f"expected a number of at least 0, not {margin!r}")
    return float(margin)


def _read_answer(value: object, source: str, field: str) -> list[Turn]:
    """An answer: text, one turn, or a list of turns (which may be the whole dialogue)."""
    if isinstance(value, list):
        turns = read_turns(value, source, field)
        if not turns:
            fail(source, field, "empty answer")
        return turns
    if isinstance(value, Mapping):
        return [(field, read_message(value, source, field))]
    text = read_text(value, source, field)
    if not text.strip():
        fail(source, field, "empty answer")
    if is_transcript(text):
        turns = read_transcript(text, source, field)
        if turns[-1][1].role != "assistant":
            fail(source, field, "empty answer: the dialogue ends before the assistant speaks")
        return turns
    return [(field, Message("assistant", text))]


def _split_common(chosen: list[Turn], rejected: list[Turn], source: str, field: str) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(prompt, chosen, rejected) of two whole dialogues; the prompt is their common start, short of the last turns."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared][1], rejected[shared][1]):
        shared += 1
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        fail(source, field, "chosen and rejected differ before their last turn; a pair shares everything but the answer")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _same(one: Message, other: Message) -> bool:
    return (one.role, one.content.strip(), one.tool_calls) == (other.role, other.content.strip(), other.tool_calls)
