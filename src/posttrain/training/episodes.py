"""An episode of PPO: a prompt and one answer that the policy sampled, and the row of a prompt that episodes start from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.template import encode_prompt, message_dicts
from posttrain.data.tokenize_pairs import fit_prompt
from posttrain.data.work import EncodedRows
from posttrain.types import Prompt, RowError


@dataclass(frozen=True)
class Episode:
    """One answer to one prompt. `messages` are the prompt's turns, in OpenAI's form; `answer` is the text without its stop token."""

    source: str  # file:line of the prompt
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    prompt_ids: list[int]
    answer_ids: list[int]  # through the stop token, where there is one
    answer: str
    stopped: bool  # ended by a stop token, not by the length limit
    columns: dict[str, Any] = field(default_factory=dict)  # of the prompt's row, those that a reward function asks for


@dataclass(frozen=True)
class Wanted:
    """The columns of a prompt's row that reward functions ask for."""

    needed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    every: bool = False  # all that the row has (**columns)

    def __or__(self, other: Wanted) -> Wanted:
        """What both ask for."""
        needed = self.needed | other.needed
        return Wanted(needed, (self.optional | other.optional) - needed, self.every or other.every)

    def key(self) -> str:
        """The same for the same columns."""
        return repr((sorted(self.needed), sorted(self.optional), self.every))

    def of(self, prompt: Prompt) -> dict[str, Any]:
        """Those of a row. Raises RowError where one that must be there is not."""
        if lacking := sorted(self.needed - prompt.row.keys()):
            has = ", ".join(map(str, prompt.row)) or "none"
            raise RowError(prompt.source, lacking[0], f"no such column, which --reward_func asks for; the row's columns: {has}")
        names = [*prompt.row] if self.every else sorted((self.needed | self.optional) & prompt.row.keys())
        return {name: prompt.row[name] for name in names}


@dataclass(frozen=True)
class EncodePrompt:
    """A prompt → one row {"prompt_ids", "messages", "tools", "columns"} (the last three as JSON). A long prompt loses its oldest
    exchanges."""

    tokenizer: Any
    max_source_tokens: int
    wanted: Wanted = Wanted()

    def __call__(self, prompt: Prompt) -> EncodedRows:
        """Raises RowError for a prompt whose last exchange is too long, and for a column that is wanted and not there."""
        whole = encode_prompt(self.tokenizer, prompt)
        messages, ids = fit_prompt(self.tokenizer, prompt, whole, self.max_source_tokens)
        row = {
            "prompt_ids": ids,
            "messages": json.dumps(message_dicts(messages), ensure_ascii=False),
            "tools": json.dumps(prompt.tools, ensure_ascii=False),
            "columns": json.dumps(self.wanted.of(prompt), ensure_ascii=False, default=str),
        }
        return EncodedRows([row], len(whole) - len(ids))
