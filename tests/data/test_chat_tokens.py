"""Cutting the texts of a chat: each stretch once, and only as the tokenizer cuts the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chat_tokenizers import KINDS, make_tokenizer

from posttrain.data import chat_tokens
from posttrain.data.chat_tokens import tokenise
from posttrain.data.template import apply_template, encode_chat
from posttrain.types import Chat, Message


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.n_characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str, **settings: Any) -> Any:
        self.n_characters += len(text)
        return self.tokenizer(text, **settings)


@pytest.mark.parametrize("name", ["vicuna", "chatml", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_work_grows_with_the_chat_not_with_its_square(kind: str, name: str) -> None:
    tokenizer = make_tokenizer(kind)
    apply_template(tokenizer, name)
    turns = [Message("user" if i % 2 == 0 else "assistant", f"Turn {i}: the sky over Rome is sunny. " * 5) for i in range(40)]
    encode_chat(tokenizer, Chat(tuple(turns[:2]), "f:1"))  # finds the stop tokens, once
    counting = Counting(tokenizer)
    rows = encode_chat(counting, Chat(tuple(turns), "f:1"))
    assert rows == encode_chat(tokenizer, Chat(tuple(turns), "f:1"))
    assert counting.n_characters < 8 * len(tokenizer.decode(rows[-1].input_ids))


def test_a_tokenizer_that_looks_past_its_stop_tokens_is_given_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def far_sighted(text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[len(text), *map(ord, text)])

    monkeypatch.setattr(chat_tokens, "find_stops", lambda _: SimpleNamespace(texts=("$",)))
    cut = tokenise(far_sighted, [("a:", "b$"), ("a:b$c:", "d$")])
    assert cut("a:b$c:") == [6, *map(ord, "a:b$c:")]
