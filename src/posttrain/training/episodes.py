"""An episode of PPO: a prompt and one answer that the policy sampled, and the row of a prompt that episodes start from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from posttrain.data.template import encode_prompt, message_dicts
from posttrain.data.tokenize_pairs import fit_prompt
from posttrain.data.work import EncodedRows
from posttrain.types import Prompt


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


@dataclass(frozen=True)
class EncodePrompt:
    """A prompt → one row {"prompt_ids", "messages", "tools"} (the last two as JSON). A long prompt loses its oldest exchanges."""

    tokenizer: Any
    max_source_tokens: int

    def __call__(self, prompt: Prompt) -> EncodedRows:
        """Raises RowError for a prompt whose last exchange is too long."""
        whole = encode_prompt(self.tokenizer, prompt)
        messages, ids = fit_prompt(self.tokenizer, prompt, whole, self.max_source_tokens)
        row = {
            "prompt_ids": ids,
            "messages": json.dumps(message_dicts(messages), ensure_ascii=False),
            "tools": json.dumps(prompt.tools, ensure_ascii=False),
        }
        return EncodedRows([row], len(whole) - len(ids))
