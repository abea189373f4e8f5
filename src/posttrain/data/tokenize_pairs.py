"""Preference pairs → columns of token ids. A prompt that is too long loses its oldest turns, an answer its end; both are counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from posttrain.data.template import encode_pair, encode_prompt, stop_token_ids
from posttrain.data.work import EncodedRows
from posttrain.types import Message, Pair, Prompt, RowError, UserError


@dataclass(frozen=True)
class EncodePair:
    """A pair → one row {"prompt_ids", "chosen_ids", "rejected_ids", "margin"}.

    A prompt longer than `max_source_tokens` loses whole exchanges from its beginning (the system turn stays), so that it still ends
    in the header of the answer. An answer longer than `max_target_tokens` loses its end: with `keep_stop` its stop token is put
    back (a reward model reads its score there), without it the model does not learn to stop there.
    """

    tokenizer: Any
    max_source_tokens: int
    max_target_tokens: int
    keep_stop: bool

    def __call__(self, pair: Pair) -> EncodedRows:
        """Raises RowError for a prompt whose last exchange is too long and for answers that are equal as ids or once they are cut."""
        whole, chosen, rejected = encode_pair(self.tokenizer, pair)
        if chosen == rejected:  # a template may trim what tells the texts apart, a tokenizer may normalise it
            raise RowError(pair.source, "rejected", "the answers give the same tokens: nothing to prefer")
        messages, head = fit_prompt(self.tokenizer, Prompt(pair.prompt, pair.source, pair.tools), whole, self.max_source_tokens)
        if len(messages) < len(pair.prompt):
            head, chosen, rejected = encode_pair(self.tokenizer, dataclasses.replace(pair, prompt=messages))
        cut_chosen, cut_rejected = self._cut(chosen), self._cut(rejected)
        if cut_chosen == cut_rejected:
            raise RowError(
                pair.source,
                "rejected",
                f"the answers are the same in their first {self.max_target_tokens} tokens; raise --max_target_length",
            )
        lost = len(whole) - len(head) + len(chosen) - len(cut_chosen) + len(rejected) - len(cut_rejected)
        row = {"prompt_ids": head, "chosen_ids": cut_chosen, "rejected_ids": cut_rejected, "margin": pair.margin}
        return EncodedRows([row], lost)

    def _cut(self, answer: list[int]) -> list[int]:
        if len(answer) <= self.max_target_tokens:
            return answer
        return [*answer[: self.max_target_tokens - 1], answer[-1]] if self.keep_stop else answer[: self.max_target_tokens]


def fit_prompt(tokenizer: Any, prompt: Prompt, ids: list[int], max_tokens: int) -> tuple[tuple[Message, ...], list[int]]:
    """(messages, ids) of a prompt that has at most `max_tokens`: its oldest exchanges go first, the system turn stays.

    `ids` are those of the whole prompt. Raises RowError when the system turn and the last exchange alone are too long.
    """
    messages = prompt.messages
    system = messages[:1] if messages[0].role == "system" else ()
    while len(ids) > max_tokens:
        asked = [i for i, message in enumerate(messages) if message.role == "user" and i > len(system)]
        if not asked:
            raise RowError(
                prompt.source,
                "prompt",
                f"its system turn and last exchange alone are {len(ids):,} tokens, more than --max_source_length {max_tokens};"
                " raise it or shorten the row",
            )
        messages = (*system, *messages[asked[0] :])
        ids = encode_prompt(tokenizer, dataclasses.replace(prompt, messages=messages))
    return messages, ids


def prove_pairs(rows: Any, tokenizer: Any, max_target_tokens: int) -> str:
    """Check every pair before the first step; returns a line for the log.

    Each answer holds one stop token, its last, unless it was cut at `max_target_tokens`. Raises UserError naming the first row
    that breaks this: a fault of the template.
    """
    stops = set(stop_token_ids(tokenizer))
    cut = 0
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            ids = row[name]
            if ids[-1] not in stops:
                if len(ids) < max_target_tokens:
                    raise UserError(f"{row['source']}: its {name[:-4]} answer does not end in a stop token, but in {ids[-1]}")
                cut += 1
            if any(token in stops for token in ids[:-1]):
                raise UserError(f"{row['source']}: its {name[:-4]} answer holds a stop token before its end")
    note = f" ({cut} cut at {max_target_tokens} tokens)" if cut else ""
    return f"mask proof: {len(rows):,} pairs, each answer through its stop token{note}"
