"""The texts of a chat → ids, each stretch cut once, and an answer as a continuation of its prompt.

Generation gives a model the prompt's ids and takes one id after another, so the prompt's ids stay as they are. That differs
from the ids of the whole text only where the tokenizer would join the last character of the prompt with the first of the answer
("Assistant: " and "Yes" to " Yes"), and where it begins a text with a space (SentencePiece).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from posttrain.data.chat_render import find_stops

_ANCHORS = ("\n", ":", "x", "1", "。")  # texts put before an answer, so that it is not cut as the start of a text


def tokenise(tokenizer: Any, spoken: Sequence[tuple[str, str]]) -> Callable[[str], list[int]]:
    """text → ids for the texts of one chat, whose beginnings are the same: each stretch between stop tokens is cut only once.

    The stretches' ids make up the ids of the text because a tokenizer takes its special tokens out first; that is checked on
    the chat's longest text, and where it fails every text is cut as a whole.
    """
    if len(spoken) == 1:
        return partial(text_ids, tokenizer)
    by_stretches = _Stretches(tokenizer)
    longest = "".join(spoken[-1])
    return by_stretches if by_stretches(longest) == text_ids(tokenizer, longest) else partial(text_ids, tokenizer)


class _Stretches:
    """Cuts a text at its stop tokens, each stretch with the stop token before it, and remembers their ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stops = find_stops(tokenizer).texts
        self.boundary = re.compile("|".join(f"(?<={re.escape(stop)})" for stop in self.stops))
        self.known: dict[tuple[str, str], list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        before = ""
        for stretch in self.boundary.split(text):
            key = (before, stretch)
            if key not in self.known:
                self.known[key] = text_ids(self.tokenizer, before + stretch)[bool(before) :]
            ids += self.known[key]
            before = next((stop for stop in self.stops if stretch.endswith(stop)), "")
        return ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is cut by its caller, who says so.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def continuation_ids(tokenizer: Any, cut: Callable[[str], list[int]], head: list[int], prompt: str, answer: str) -> list[int]:
    """The answer's ids after the prompt's `head`. Where the whole text is cut differently there, the answer is cut by itself."""
    whole = cut(prompt + answer)
    if whole[: len(head)] == head:
        return whole[len(head) :]
    text = _decoded(tokenizer, whole)
    candidates = [text_ids(tokenizer, answer)]
    for anchor in _ANCHORS:
        before = text_ids(tokenizer, anchor)
        both = text_ids(tokenizer, anchor + answer)
        if both[: len(before)] == before:
            candidates.append(both[len(before) :])
    # A normaliser may join the two texts for good (a letter and its accent): then no cut says the same, and any will do.
    return next((ids for ids in candidates if _decoded(tokenizer, head + ids) == text), candidates[-1])


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
