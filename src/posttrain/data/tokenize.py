"""Examples → columns of token ids and trained flags; what does not fit is cut by a stated rule and counted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from posttrain.data.template import Encoded, encode_chat, stop_token_ids
from posttrain.data.work import EncodedRows
from posttrain.types import Chat, RowError, Text, UserError

_VERSION = 1  # counts up when the same settings would give other ids


@dataclass(frozen=True)
class EncodeText:
    """A document → pieces of at most `block_tokens`, every token trained; the end token closes the last piece.

    A piece is a segment of its own: what came before it in the document is not seen again.
    """

    tokenizer: Any
    block_tokens: int

    def __call__(self, text: Text) -> EncodedRows:
        """Raises RowError for a document without tokens."""
        ids: list[int] = self.tokenizer(text.text)["input_ids"]
        if not ids:
            raise RowError(text.source, "text", "gives no tokens; remove the row")
        if ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        pieces = [ids[i : i + self.block_tokens] for i in range(0, len(ids), self.block_tokens)]
        # A piece of one token predicts nothing; it joins no row. It is at most the end token of a document that filled its rows.
        kept = [piece for piece in pieces if len(piece) > 1]
        if not kept:
            raise RowError(text.source, "text", "is a single token, which predicts nothing; remove the row")
        lost = sum(len(piece) for piece in pieces) - sum(len(piece) for piece in kept)
        return EncodedRows([{"input_ids": piece, "trained": [1] * len(piece)} for piece in kept], lost)


@dataclass(frozen=True)
class EncodeChat:
    """A conversation → one row, or one a trained turn where the template rewrites what came before (see template.py).

    A row longer than `max_tokens` loses whole turns at its end. If not even the first trained turn fits whole, its answer is
    cut (and then has no stop token, so the model does not learn to stop there); if its prompt alone is too long, the row is
    refused.
    """

    tokenizer: Any
    max_tokens: int

    def __call__(self, chat: Chat) -> EncodedRows:
        """Raises RowError for a conversation of which nothing trained is left."""
        rows, cut_tokens = [], 0
        encoded = encode_chat(self.tokenizer, chat)
        for one in encoded:
            kept = fit(one, self.max_tokens)
            cut_tokens += len(one.input_ids) - kept
            if any(one.trained[:kept]):
                rows.append({"input_ids": one.input_ids[:kept], "trained": [int(t) for t in one.trained[:kept]]})
        if not rows:
            shortest = min(one.turns[0][0] for one in encoded)
            raise RowError(
                chat.source,
                "messages",
                f"the prompt has {shortest} tokens and leaves no room for an answer in --model_max_length {self.max_tokens}",
            )
        return EncodedRows(rows, cut_tokens)


def fit(encoded: Encoded, max_tokens: int) -> int:
    """How many leading ids of a row are kept: all, or through the last trained turn that fits whole, or (when none does) as
    many as fit, or 0 when that would hold no trained token."""
    if len(encoded.input_ids) <= max_tokens:
        return len(encoded.input_ids)
    whole = [end for _, end in encoded.turns if end <= max_tokens]
    if whole:
        return whole[-1]
    return max_tokens if encoded.turns[0][0] < max_tokens else 0


def fingerprint(tokenizer: Any, **settings: Any) -> str:
    """Changes whenever the same examples would be encoded differently: tokenizer, template, lengths."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [_VERSION, vocabulary, tokenizer.chat_template, str(tokenizer.special_tokens_map), sorted(settings.items())]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def prove_masks(rows: Any, tokenizer: Any, max_tokens: int) -> str:
    """Check every row before the first step; returns a line for the log.

    Each row has a trained token that something predicts; each run of trained tokens ends in a stop token, unless the row was
    cut at `max_tokens` there. Raises UserError naming the first row that breaks this: a fault of the template.
    """
    stops = set(stop_token_ids(tokenizer))
    turns = cut = 0
    for row in rows:
        ids, trained = row["input_ids"], row["trained"]
        if not any(trained[1:]):
            raise UserError(f"{row['source']}: has no trained token after its first; report it as a fault of the template")
        for end in range(1, len(ids) + 1):
            if trained[end - 1] and (end == len(ids) or not trained[end]):
                turns += 1
                if ids[end - 1] not in stops:
                    if end < len(ids) or end < max_tokens:
                        raise UserError(f"{row['source']}: a trained turn does not end in a stop token, but in {ids[end - 1]}")
                    cut += 1
    note = f" ({cut} cut at {max_tokens} tokens)" if cut else ""
    return f"mask proof: {len(rows):,} rows, {turns:,} trained turns, each through its stop token{note}"
