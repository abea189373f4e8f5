"""Conversation → token ids and trained flags, by a chat template. The contract: train what is served.

For every trained assistant turn i the ids before it are those of `apply_chat_template(messages[:i],
add_generation_prompt=True)`, and the trained ids are the turn's own through its stop token, each once; nothing else is
trained. Where a conversation's later prompts begin with the ids of the earlier ones and their answers, one row carries all
turns; where they do not (Qwen3 drops earlier thinking, Baichuan's end token), each trained turn becomes a row of its own.

An answer is tokenised as a continuation, see chat_tokens.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateSyntaxError

from posttrain.data.chat_render import RENDER_ERRORS, find_stops, message_dicts, render, set_stop_tokens, stop_token_ids
from posttrain.data.chat_tokens import continuation_ids, text_ids, tokenise
from posttrain.data.template_files import DEFAULT, OWN, Template, label, list_templates, load_template
from posttrain.types import Chat, Message, Pair, Prompt, RowError, UserError

__all__ = [
    "Encoded",
    "Template",
    "apply_template",
    "encode_chat",
    "encode_pair",
    "encode_prompt",
    "list_templates",
    "load_template",
    "message_dicts",
    "set_stop_tokens",
    "stop_token_ids",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """One row: its ids, 1 for each id that is trained, and the spans [start, end) of the trained turns, in order."""

    input_ids: list[int]
    trained: list[int]
    turns: list[tuple[int, int]] = field(default_factory=list)


def apply_template(tokenizer: Any, template_name: str | None) -> Template:
    """Give the tokenizer the named template (or a file's; None: its own, else vicuna), its marks and its end token.

    The template is written into `tokenizer.chat_template`, so that whatever loads the saved tokenizer renders the same ids.
    A mark that the tokenizer has not as a single token is added as a special token; `Template.added_tokens` lists these, and
    the model's embedding must grow by as many. Raises UserError when the template is unknown or broken, or has no end token.
    """
    if template_name is None and tokenizer.chat_template:
        template = Template(label(tokenizer.chat_template).removeprefix("template "), tokenizer.chat_template)
    else:
        template = load_template(template_name or DEFAULT)
        if template_name is None:
            logger.warning("the tokenizer has no chat template: taking %s (--template_name chooses another)", DEFAULT)
    added = _add_marks(tokenizer, template)
    if template.stop_becomes_eos and tokenizer.eos_token != template.stop:
        # The old end token stays what it was in pretraining: the end of a document, and a good padding.
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or template.stop
        tokenizer.eos_token = template.stop
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer names no end token, which {template.name} needs: set eos_token in its configuration")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template.chat_template
    # A file's text bears no name, and the processes that prepare rows get the tokenizer alone.
    tokenizer.chosen_template = None if template_name is None else template.name
    if template.drops_foreign_bos and not _adds_bos(tokenizer):
        tokenizer.chat_template = f"{{%- set bos_token = '' -%}}\n{template.chat_template}"
    try:
        render(tokenizer, message_dicts([Message("user", "x")]), prompt=True)
    except TemplateSyntaxError as error:
        raise UserError(f"--template_name {template_name}: line {error.lineno}: {error.message}") from error
    except RENDER_ERRORS as error:
        raise UserError(f"{template.name}: cannot render a single question: {error}") from error
    return dataclasses.replace(template, chat_template=tokenizer.chat_template, added_tokens=added)


def _add_marks(tokenizer: Any, template: Template) -> tuple[str, ...]:
    """Make the template's marks single tokens; returns those that are new to the vocabulary."""
    missing = [mark for mark in template.special_tokens if tokenizer.tokenize(mark) != [mark]]
    size_tokens = len(tokenizer)
    if missing:
        # A mark that the vocabulary has as a plain piece keeps its id.
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    added = tuple(mark for mark in missing if tokenizer.convert_tokens_to_ids(mark) >= size_tokens)
    if added:
        logger.warning("template %s: the tokenizer gains %d special tokens: %s", template.name, len(added), " ".join(added))
    return added


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]


# ---------------------------------------------------------------- encoding


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """What generation sees, the header of the answer included. Raises RowError when the template cannot render a turn or drops it."""
    return text_ids(tokenizer, _prompt_text(tokenizer, prompt, message_dicts(prompt.messages), len(prompt.messages)))


def encode_chat(tokenizer: Any, chat: Chat) -> list[Encoded]:
    """One row with all trained turns where the template allows it for this chat, else one row per trained turn.

    What stands after the last trained turn is left out. Raises RowError when there is no trained turn, when the template
    cannot render the chat or drops a part of it, and when an answer holds a stop token.
    """
    turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant" and message.trained]
    if not turns:
        raise RowError(chat.source, "messages", "no assistant turn to train on")
    dicts = message_dicts(chat.messages)
    spoken = []
    for i in turns:
        prompt = _prompt_text(tokenizer, chat, dicts, i)
        spoken.append((prompt, _answer_text(tokenizer, chat, dicts, i, prompt)))
    cut = tokenise(tokenizer, spoken)
    rows = [_row(tokenizer, cut, prompt, answer) for prompt, answer in spoken]
    return _one_row(spoken, rows, set(stop_token_ids(tokenizer))) or rows


def encode_pair(tokenizer: Any, pair: Pair) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected): the ids that generation sees, and those of either answer through its stop token.

    Raises RowError as `encode_chat` does, its field `chosen` or `rejected` where an answer is at fault.
    """
    head: list[int] = []
    answers: dict[str, list[int]] = {}
    for name, message in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        chat = Chat((*pair.prompt, message), pair.source, pair.tools)
        dicts, i = message_dicts(chat.messages), len(pair.prompt)
        prompt = _prompt_text(tokenizer, chat, dicts, i)
        try:
            answer = _answer_text(tokenizer, chat, dicts, i, prompt)
        except RowError as error:
            raise RowError(pair.source, name, error.reason) from error
        row = _row(tokenizer, tokenise(tokenizer, [(prompt, answer)]), prompt, answer)
        head, answers[name] = row.input_ids[: row.turns[0][0]], row.input_ids[row.turns[0][0] :]
    return head, answers["chosen"], answers["rejected"]


def _row(tokenizer: Any, cut: Callable[[str], list[int]], prompt: str, answer: str) -> Encoded:
    """A trained turn by itself: what generation is given, then what it has to say, its stop token included."""
    head = cut(prompt)
    ids = head + continuation_ids(tokenizer, cut, head, prompt, answer)
    return Encoded(ids, [0] * len(head) + [1] * (len(ids) - len(head)), [(len(head), len(ids))])


def _one_row(spoken: Sequence[tuple[str, str]], rows: Sequence[Encoded], stops: set[int]) -> list[Encoded] | None:
    """All turns in the last turn's row, if each prompt is, on ids, the beginning of that row and each answer follows it there."""
    ids = rows[-1].input_ids
    text = "".join(spoken[-1])
    trained = [0] * len(ids)
    spans = []
    for (prompt, answer), row in zip(spoken, rows, strict=True):
        start = row.turns[0][0]
        if ids[:start] != row.input_ids[:start] or not text.startswith(prompt + answer):
            return None
        # An answer holds no stop token but its last, so the first one after the prompt ends it.
        end = next((k + 1 for k in range(start, len(ids)) if ids[k] in stops), len(ids))
        trained[start:end] = [1] * (end - start)
        spans.append((start, end))
    return [Encoded(ids, trained, spans)]


# ---------------------------------------------------------------- texts, and what a template may not do to them


def _prompt_text(tokenizer: Any, chat: Chat | Prompt, dicts: list[dict[str, Any]], i: int) -> str:
    """The prompt of turn i. Raises RowError when the template cannot render it or leaves something out."""
    if i == 0:
        raise RowError(chat.source, "messages[0]", "the assistant speaks first: there is no prompt to answer")
    text = _render(tokenizer, chat, dicts[:i], i, prompt=True)
    for k, tool in enumerate(chat.tools):
        function = tool.get("function", tool)
        _require(tokenizer, chat, text, f"tools[{k}]", [function["name"], function.get("description") or ""])
    for k, message in enumerate(chat.messages[:i]):
        # Dropping earlier thoughts is a template's right.
        content = message.content.rpartition("</think>")[2] if message.role == "assistant" else message.content
        _require(tokenizer, chat, text, f"messages[{k}]", [content, *(call.name for call in message.tool_calls)])
    return text


def _answer_text(tokenizer: Any, chat: Chat, dicts: list[dict[str, Any]], i: int, prompt: str) -> str:
    """What the assistant says in turn i after `prompt`, through its stop token."""
    message = chat.messages[i]
    stops = find_stops(tokenizer)
    parts = [message.content]
    for call in message.tool_calls:
        parts += [call.name, *call.arguments]
    said = json.dumps([message.content, *(call.arguments for call in message.tool_calls)], ensure_ascii=False)
    for stop in stops.texts:
        if stop in said:
            raise RowError(
                chat.source, f"messages[{i}]", f"holds the stop token {stop}, at which generation would end; remove it"
            )
    full = _render(tokenizer, chat, dicts[: i + 1], i, prompt=False)
    text = full[len(prompt) :] if full.startswith(prompt) else _after_question(full, prompt, chat.messages[i - 1].content, parts)
    if text is None:
        reason = f"the {_label(tokenizer)} renders this turn in another way than its prompt begins it"
        raise RowError(chat.source, f"messages[{i}]", f"{reason} (…{prompt[-20:]!r}); choose another with --template_name")
    ends = [at + len(stop) for stop in stops.texts if (at := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text + (stops.after_call if message.tool_calls else stops.after_answer)
    if prompt.rstrip().endswith("<think>"):  # the prompt has opened the thought already
        parts[0] = parts[0].lstrip().removeprefix("<think>")
    _require(tokenizer, chat, text, f"messages[{i}]", parts)
    return text


def _after_question(full: str, prompt: str, question: str, parts: list[str]) -> str | None:
    """The answer where the rendered turn does not begin with its prompt (Mistral's template moves the system text).

    It then follows the last question and whatever the prompt has after that; None when this is not found.
    """
    asked = prompt.rfind(question.strip()) if question.strip() else -1
    if asked < 0:
        return None
    at = full.rfind(prompt[asked:])
    while at >= 0:
        text = full[at + len(prompt) - asked :]
        if not any(_lacks(text, part) for part in parts):
            return text
        at = full.rfind(prompt[asked:], 0, at)
    return None


def _render(tokenizer: Any, chat: Chat | Prompt, turns: list[dict[str, Any]], i: int, *, prompt: bool) -> str:
    try:
        return render(tokenizer, turns, chat.tools, prompt=prompt)
    except RENDER_ERRORS as error:
        reason = f"the {_label(tokenizer)} cannot render the chat up to here: {error}"
        raise RowError(chat.source, f"messages[{i}]", reason) from error


def _require(tokenizer: Any, chat: Chat | Prompt, text: str, field: str, parts: list[str]) -> None:
    """Raises RowError when a part of the chat is not in its rendering."""
    for part in parts:
        if _lacks(text, part):
            what = " ".join(part.split())[:40]
            reason = f"the {_label(tokenizer)} leaves out {what!r}; choose one that renders it with --template_name"
            raise RowError(chat.source, field, reason)


def _label(tokenizer: Any) -> str:
    """How to name the template that rows are rendered by to the user."""
    found, chosen = label(tokenizer.chat_template), getattr(tokenizer, "chosen_template", None)
    return f"template {chosen}" if chosen and found == OWN else found


def _lacks(text: str, part: str) -> bool:
    """Whether a part is missing from a text, be it trimmed there, wrapped anew or escaped as JSON."""
    if part.strip() in text:
        return False
    dense = "".join(text.split())
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1], repr(part)[1:-1])
    return not any("".join(form.split()) in dense for form in forms)
