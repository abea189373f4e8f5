"""Raw rows → Text, Chat, Pair, Prompt: pure functions in one table. A format is one entry of FORMATS.

Every dialogue format can serve every stage: with `chosen` and `rejected` beside it a dialogue is a Pair, without its last
assistant turn a Prompt. The rules on turns are those of `messages.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.data.fields import Row, fail, first_key, kind_of, read_json, read_list, read_text
from posttrain.data.formats_pairs import CHOSEN_KEYS, REJECTED_KEYS, has_answers, is_transcript, read_pair, read_transcript
from posttrain.data.messages import Turn, check_order, read_message, read_tools, read_turns
from posttrain.types import Chat, Example, Message, Pair, Prompt, RowError, Stage, Text, UserError

Kind = Literal["text", "chat", "pair", "prompt", "rated"]  # rated: a chat that ends in an answer, or a pair
Answer = Literal["required", "optional", "none"]  # whether the reader of a dialogue wants the answer as its last turn

KIND_OF_STAGE: dict[Stage, Kind] = {"pt": "text", "sft": "chat", "rm": "pair", "dpo": "pair", "ppo": "prompt"}

_SYSTEM_KEYS = ("system", "system_prompt")
_QUESTION_KEYS = ("question", "query", "prompt", "input", "问", "问题")
_ANSWER_KEYS = ("answer", "response", "completion", "output", "答", "回答")
_INPUT_KEYS = ("input", "context")
_HINTS: dict[Kind, str] = {
    "text": 'plain text is wanted: {"text": …} or a line of a .txt file; `posttrain sft` trains on chats',
    "chat": "a chat is wanted: conversations, messages, instruction and output, or question and answer",
    "pair": "a preference pair is wanted: a prompt or a conversation with `chosen` and `rejected`",
    "prompt": "a prompt is wanted: conversations, messages, instruction, question or prompt",
    "rated": "a chat with its answer or a preference pair is wanted: conversations, messages, question and answer, …",
}


@dataclass(frozen=True)
class Format:
    """How one way to write rows is recognised and read. `read` gives the turns of a dialogue; text has none."""

    keys: tuple[str, ...]  # a row with a value under one of these is of this format
    help: str
    read: Callable[[Row, str, Answer], list[Turn]] | None


def _system_turns(row: Row, source: str) -> list[Turn]:
    key = first_key(row, _SYSTEM_KEYS)
    if key is None or not read_text(row[key], source, key).strip():
        return []
    return [(key, Message("system", row[key]))]


def _history_turns(row: Row, source: str) -> list[Turn]:
    """The `history` of Alpaca and question/answer rows: a list of [question, answer]."""
    history = row.get("history")
    if history is None or (isinstance(history, str) and not history.strip()):
        return []
    turns: list[Turn] = []
    for i, pair in enumerate(read_list(history, source, "history", "[question, answer] pairs")):
        field = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            fail(source, field, "expected a [question, answer] pair")
        turns.append(_said("user", pair[0], source, f"{field}[0]"))
        turns.append(_said("assistant", pair[1], source, f"{field}[1]"))
    return turns


def _said(role: Literal["user", "assistant"], value: object, source: str, field: str) -> Turn:
    text = read_text(value, source, field)
    if not text.strip():
        fail(source, field, "empty turn")
    return field, Message(role, text)


def _answer_turns(row: Row, source: str, keys: tuple[str, ...], answer: Answer) -> list[Turn]:
    key = first_key(row, keys)
    if answer == "none" or (answer == "optional" and (key is None or row[key] in ("", []))):
        return []
    if key is None:
        fail(source, keys[0], "missing: the answer")
    if isinstance(row[key], list):
        return read_turns(row[key], source, key)
    if isinstance(row[key], Mapping):
        return [(key, read_message(row[key], source, key))]
    return [_said("assistant", row[key], source, key)]


def _read_sharegpt(row: Row, source: str, _answer: Answer) -> list[Turn]:
    return _listed(row, source, first_key(row, ("conversations", "conversation")) or "conversations")


def _read_openai(row: Row, source: str, _answer: Answer) -> list[Turn]:
    return _listed(row, source, "messages")


def _listed(row: Row, source: str, field: str) -> list[Turn]:
    """The turns under `field`, after the system turn that may stand beside them."""
    if row.get(field) is None:
        fail(source, field, "missing: the turns")
    system = _system_turns(row, source)
    turns = read_turns(row[field], source, field)
    if system and turns and turns[0][1].role == "system":
        fail(source, system[0][0], f"two system turns, here and in {field}; keep one")
    if not turns:
        fail(source, field, "empty list: no turns")
    return system + turns


def _read_alpaca(row: Row, source: str, answer: Answer) -> list[Turn]:
    """Instruction and input are one user turn, a blank line between them."""
    if row.get("instruction") is None:
        fail(source, "instruction", "missing: the question")
    asked = read_text(row["instruction"], source, "instruction").strip("\n")
    key = first_key(row, _INPUT_KEYS)
    given = read_text(row[key], source, key).strip("\n") if key else ""
    question = "\n\n".join(part for part in (asked, given) if part.strip())
    turns = _system_turns(row, source) + _history_turns(row, source) + [_said("user", question, source, "instruction")]
    return turns + _answer_turns(row, source, ("output", "response", "answer"), answer)


def _read_qa(row: Row, source: str, answer: Answer) -> list[Turn]:
    """A question is text, a list of turns, or an HH transcript that ends where the assistant answers."""
    key = first_key(row, _QUESTION_KEYS)
    if key is None:
        fail(source, "question", "missing: the question")
    before = _system_turns(row, source) + _history_turns(row, source)
    asked = row[key]
    if isinstance(asked, list):
        turns = before + read_turns(asked, source, key)
    elif isinstance(asked, str) and is_transcript(asked):
        turns = before + read_transcript(asked, source, key)
    else:
        turns = [*before, _said("user", asked, source, key)]
    return turns + _answer_turns(row, source, _ANSWER_KEYS, answer)


FORMATS: dict[str, Format] = {
    "sharegpt": Format(("conversations", "conversation"), "conversations: [{from, value}, …], tools, system", _read_sharegpt),
    "openai": Format(("messages",), "messages: [{role, content, tool_calls}, …], tools", _read_openai),
    "alpaca": Format(("instruction",), "instruction, input, output, history, system", _read_alpaca),
    "qa": Format(_QUESTION_KEYS, "question and answer (query/response, prompt/completion, 问/答), history, system", _read_qa),
    "hh": Format(("chosen",), "chosen and rejected, both whole dialogues (turns or Human:/Assistant: text)", None),
    "text": Format(("text",), "a line of a .txt file, or text", None),
}


def detect(row: object, source: str = "row") -> str:
    """The name of a row's format (a key of FORMATS). Raises RowError when none fits."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, Mapping):
        fail(source, "row", f"expected an object, got {kind_of(row)}")
    for name, form in FORMATS.items():
        if first_key(row, form.keys) is not None:
            return name
    raise RowError(
        source, "row", f"unknown format; keys: {', '.join(map(str, row)) or 'none'}; known formats: {', '.join(FORMATS)}"
    )


def parse(row: object, source: str, kind: Kind | None = None, format: str = "auto") -> Example:
    """The example of `kind` that a raw row holds; kind None: what the row is by itself.

    row     an object, or the text of a line (.txt); for dialogues such a line may be the JSON text of an object
    source  "file:line", copied into the example and into errors
    format  a key of FORMATS, or "auto": detected for this row

    Raises RowError for a row that cannot be used, UserError for an unknown format.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(f"--data_format {format}: unknown; known: auto, {', '.join(FORMATS)}")
    if isinstance(row, str):
        wanted = "text" if kind is None and format in ("auto", "text") else kind
        row, format = _row_of_line(row, source, wanted), "auto" if format == "text" else format
    if not isinstance(row, Mapping):
        raise RowError(source, "row", f"expected an object, got {kind_of(row)}")
    name = detect(row, source) if format == "auto" else format
    if format == "auto" and kind == "text" and row.get("text") is not None:
        name = "text"  # published dialogue sets often carry a rendered `text` beside the turns
    if kind is None:
        kind = "pair" if has_answers(row) else "text" if name == "text" else "chat"
    if kind == "rated":
        return _to_pair(row, source, name) if has_answers(row) else _to_answered(row, source, name)
    if kind == "text":
        return _to_text(row, source, name)
    if kind == "pair":
        return _to_pair(row, source, name)
    return _to_chat(row, source, name) if kind == "chat" else _to_prompt(row, source, name)


def _row_of_line(line: str, source: str, kind: Kind | None) -> Row:
    """A line of a .txt file is a document, for prompts a question, and for dialogues it may be an object."""
    if kind == "text":
        return {"text": line}
    if line.lstrip().startswith("{"):
        try:
            value = read_json(line, source, "text")
        except RowError:
            if kind != "prompt":
                raise
        else:
            return value if isinstance(value, Mapping) else {"text": line}
    return {"prompt": line} if kind == "prompt" else {"text": line}


def _wrong_kind(source: str, field: str, name: str, kind: Kind) -> RowError:
    return RowError(source, field, f"a row of format {name} where {_HINTS[kind]}")


def _to_text(row: Row, source: str, name: str) -> Text:
    if name != "text":
        raise _wrong_kind(source, first_key(row, FORMATS[name].keys) or "row", name, "text")
    if row.get("text") is None:
        fail(source, "text", "missing: the document")
    text = read_text(row["text"], source, "text")
    if not text.strip():
        fail(source, "text", "empty document")
    return Text(text, source)


def _dialogue(row: Row, source: str, name: str, kind: Kind, answer: Answer) -> list[Turn]:
    read = FORMATS[name].read
    if read is None:
        raise _wrong_kind(source, first_key(row, FORMATS[name].keys) or "row", name, kind)
    turns = read(row, source, answer)
    if not turns:
        fail(source, first_key(row, FORMATS[name].keys) or "row", "empty list: no turns")
    check_order(turns, source)
    return turns


def _to_chat(row: Row, source: str, name: str) -> Chat:
    """A trailing turn that nobody answers is left out: no token of it would be trained."""
    if has_answers(row):
        raise RowError(source, "chosen", f"a preference pair where {_HINTS['chat']}; `posttrain rm` and `dpo` train on pairs")
    turns = _dialogue(row, source, name, "chat", "required")
    field = turns[-1][0].split("[")[0]
    while turns and turns[-1][1].role != "assistant":
        turns.pop()
    if not any(message.role == "assistant" and message.trained for _, message in turns):
        all_context = any(message.role == "assistant" for _, message in turns)
        fail(
            source,
            field,
            "every assistant turn has weight 0: nothing to train on" if all_context else "no assistant turn: nothing to train on",
        )
    return Chat(tuple(message for _, message in turns), source, read_tools(row, source))


def _to_answered(row: Row, source: str, name: str) -> Chat:
    """A chat whose last turn, the assistant's, is the one trained turn, whatever weights the row has."""
    turns = _dialogue(row, source, name, "rated", "required")
    field, last = turns[-1]
    if last.role != "assistant":
        fail(source, field, "the last turn is not the assistant's: there is no answer to rate")
    messages = tuple(replace(message, trained=i == len(turns) - 1) for i, (_, message) in enumerate(turns))
    return Chat(messages, source, read_tools(row, source))


def _to_prompt(row: Row, source: str, name: str) -> Prompt:
    if has_answers(row):
        pair = _to_pair(row, source, name)
        return Prompt(pair.prompt, source, pair.tools, row)
    turns = _dialogue(row, source, name, "prompt", "optional")
    field = turns[-1][0].split("[")[0]
    if turns[-1][1].role == "assistant":
        turns.pop()
    if not any(message.role == "user" for _, message in turns):
        fail(source, field, "no user turn: nothing to answer")
    return Prompt(tuple(message for _, message in turns), source, read_tools(row, source), row)


def _to_pair(row: Row, source: str, name: str) -> Pair:
    if not has_answers(row):
        chosen, rejected = first_key(row, CHOSEN_KEYS), first_key(row, REJECTED_KEYS)
        if chosen or rejected:
            fail(source, "rejected" if chosen else "chosen", "missing: a pair has a chosen and a rejected answer")
        raise _wrong_kind(source, first_key(row, FORMATS[name].keys) or "row", name, "pair")
    read = FORMATS[name].read
    return read_pair(row, source, (lambda: read(row, source, "none")) if read else None, _system_turns(row, source))


def format_help() -> dict[str, Any]:
    """Name → one line, for the command line's help."""
    return {name: form.help for name, form in FORMATS.items()}
