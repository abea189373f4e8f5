"""Turns as a chat template sees them, and what the template writes after an answer: the stop tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from posttrain.types import Message, ToolCall

# What a template raises over turns it cannot render; TypeError: it joins a text and an object, say a call's arguments.
RENDER_ERRORS = (TemplateError, TypeError)
MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBE = "PROBE7391"  # plain letters: no template trims or rewrites them


@dataclass(frozen=True)
class Stops:
    """What ends an answer: all ids and their texts, and what to end with where the template itself writes no end."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    after_answer: str
    after_call: str


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns in the form that `apply_chat_template` takes. Calls get ids by their order, and results the ids of their calls."""
    dicts: list[dict[str, Any]] = []
    open_calls: list[dict[str, Any]] = []
    n_calls = 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            open_calls = [_call_dict(call, n_calls + k) for k, call in enumerate(message.tool_calls)]
            turn["tool_calls"] = list(open_calls)
            n_calls += len(open_calls)
        elif message.role == "tool" and open_calls:
            call = open_calls.pop(0)
            turn |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        dicts.append(turn)
    return dicts


def _call_dict(call: ToolCall, number: int) -> dict[str, Any]:
    # Mistral's templates insist on nine letters or digits; a fixed rule keeps rows reproducible.
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def render(tokenizer: Any, turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), *, prompt: bool) -> str:
    """The text of the turns; `prompt` adds the header of the answer to come. Raises RENDER_ERRORS."""
    marks = _unlisted_marks(tokenizer)
    return str(
        tokenizer.apply_chat_template(turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt, **marks)
    )


def _unlisted_marks(tokenizer: Any) -> dict[str, str]:
    """Marks that a tokenizer of a model's own code has as plain properties (ChatGLM): the library gives templates only listed ones."""
    listed = tokenizer.special_tokens_map
    found = {name: getattr(tokenizer, name, None) for name in MARKS if name not in listed}
    return {name: str(mark) for name, mark in found.items() if mark}


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The ids at which generation must stop: what the template writes after an answer and after a call, then eos."""
    return list(find_stops(tokenizer).ids)


def set_stop_tokens(tokenizer: Any, generation_config: Any) -> None:
    """Write the stop tokens (and padding) into a GenerationConfig, which `generate`, vLLM and other servers obey."""
    ids = stop_token_ids(tokenizer)
    generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    generation_config.pad_token_id = tokenizer.pad_token_id
    generation_config.bos_token_id = tokenizer.bos_token_id


def find_stops(tokenizer: Any) -> Stops:
    """The stops of a tokenizer with its template (eos where it has none), found by rendering probes and remembered."""
    template = tokenizer.chat_template
    if not template:
        eos = tokenizer.eos_token
        return Stops((tokenizer.eos_token_id,), (eos,), eos, eos)
    key = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return _probe_stops(tokenizer, key, tokenizer.eos_token, len(tokenizer))


@lru_cache(maxsize=8)
def _probe_stops(tokenizer: Any, _template: str, _eos: str | None, _size: int) -> Stops:
    """The arguments after the first are what the answer depends on: a tokenizer can be changed in place."""
    question, answer = Message("user", "x"), Message("assistant", _PROBE)
    call = Message("assistant", "", (ToolCall("probe", {"value": _PROBE}),))
    parameters = {"type": "object", "properties": {"value": {"type": "string", "description": ""}}}
    tools = [{"type": "function", "function": {"name": "probe", "description": "", "parameters": parameters}}]

    marks = _marks_after(tokenizer, [question, answer], [])
    if not marks:  # GLM-4's own template: an answer ends where the next turn begins
        marks = _marks_after(tokenizer, [question, answer, question], [], at_once=True)
    after_answer = marks[0] if marks else tokenizer.eos_token

    # The call's own closing marks stand between its arguments and its end, hence the last one.
    marks = _marks_after(tokenizer, [question, call], tools)
    if marks:
        after_call = after_answer if after_answer in marks else marks[-1]
    else:
        marks = _marks_after(tokenizer, [question, call, Message("tool", "x")], tools)
        after_call = marks[0] if marks else after_answer
    texts = tuple(dict.fromkeys(t for t in (after_answer, after_call, tokenizer.eos_token) if t))
    return Stops(tuple(tokenizer.convert_tokens_to_ids(list(texts))), texts, after_answer, after_call)


def _marks_after(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]], at_once: bool = False) -> list[str]:
    """The control tokens after the probe's text, in order. With `at_once` the first must follow that text directly."""
    try:
        text = render(tokenizer, message_dicts(messages), tools, prompt=False)
    except RENDER_ERRORS:
        return []
    if _PROBE not in text:
        return []
    tail = text.rpartition(_PROBE)[2]
    control = _control_tokens(tokenizer)
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    marks = [control[i] for i in ids if i in control]
    return [] if at_once and marks and not tail.lstrip().startswith(marks[0]) else marks


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens, and other added tokens that the template writes; never the runs of spaces that some tokenizers add."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.items()
    return {i: t.content for i, t in added if t.content.strip() and (t.special or t.content in template)}
