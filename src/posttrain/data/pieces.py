"""What the ids of a tokenizer stand for, and words of them: for byte-level BPE, and SentencePiece's BPE and Unigram.

A unit is the smallest run of ids that spells whole characters: mostly one id; several where the tokenizer has no piece for a
character and spells its bytes. Units are what a grown vocabulary joins, so that no new piece begins or ends inside a character.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from posttrain.types import UserError

SPACE = "▁"  # how SentencePiece writes a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how it writes a byte that no piece covers
IDEOGRAPHIC = {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}  # written together with CJK characters
BATCH = 1000  # texts encoded together


class Unit(NamedTuple):
    """Ids that together spell `text`: one, or the bytes of characters for which there is no piece."""

    ids: tuple[int, ...]
    text: str


@dataclass
class Pieces:
    """A tokenizer taken apart. `state` is its tokenizers JSON, `spelt` what each id of its model spells.

    scores   of a Unigram model, log-probabilities by id; empty for BPE
    """

    backend: Any
    state: dict[str, Any]
    byte_level: bool
    names: dict[int, str]
    spelt: dict[int, bytes]
    byte_ids: frozenset[int]  # SentencePiece's <0x..>
    scores: list[float] = field(default_factory=list)
    _texts: dict[int, str | None] = field(default_factory=dict)

    def words(self, texts: Iterable[str]) -> Iterator[list[Unit]]:
        """The words of texts as the tokenizer cuts them; no new piece may reach over the end of a word."""
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == BATCH:
                yield from self._batch_words(batch)
                batch = []
        yield from self._batch_words(batch)

    def _batch_words(self, texts: list[str]) -> Iterator[list[Unit]]:
        for encoding in self.backend.encode_batch(texts, add_special_tokens=False):
            ids: list[int] = []
            last: int | None = None
            for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word != last:
                    yield from self._cut(self.units(ids))
                    ids, last = [], word
                ids.append(token)
            yield from self._cut(self.units(ids))

    def units(self, ids: Iterable[int]) -> list[Unit | None]:
        """The units of ids; None where nothing can be joined: a special token, a lone byte, an unknown character."""
        found: list[Unit | None] = []
        pending: list[int] = []
        for token in ids:
            if token not in self.spelt:
                found += [None]
                pending = []
                continue
            text = self._text(token) if not pending else None
            if text is not None:
                found.append(None if token in self.byte_ids else Unit((token,), text))
                continue
            pending.append(token)
            text = _decoded(b"".join(self.spelt[part] for part in pending))
            if text is not None:
                printable = self.byte_level or (len(text) == 1 and text.isprintable())
                found.append(Unit(tuple(pending), text) if printable else None)
                pending = []
        return [*found, None] if pending else found

    def text(self, ids: Iterable[int]) -> str | None:
        """What ids spell together, if that is whole characters."""
        return _decoded(b"".join(self.spelt[token] for token in ids))

    def _text(self, token: int) -> str | None:
        """What one id spells, if that is whole characters."""
        if token not in self._texts:
            self._texts[token] = _decoded(self.spelt[token])
        return self._texts[token]

    def _cut(self, units: list[Unit | None]) -> Iterator[list[Unit]]:
        """Words of units. A tokenizer without a rule for words (SentencePiece's are whole documents) gets that of its trainer."""
        word: list[Unit] = []
        for unit in units:
            if unit is None or (word and not self.byte_level and not _joins(word[-1].text, unit.text)):
                if word:
                    yield word
                word = []
            if unit is not None:
                word.append(unit)
        if word:
            yield word

    def spelling(self, text: str) -> list[Unit] | None:
        """The units of a word (with ▁ for a space) alone; None where the tokenizer would cut it, or cannot spell it."""
        if self.byte_level:
            text = text.replace(SPACE, " ")
            normalised = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
            split = self.backend.pre_tokenizer.pre_tokenize_str(text)
            if normalised != text or len(split) != 1:
                return None
            text = split[0][0]
        found = self.units([token.id for token in self.backend.model.tokenize(text)])
        units = [unit for unit in found if unit is not None]
        return units if len(units) == len(found) else None


def take_apart(tokenizer: Any, name: str) -> Pieces:
    """The pieces of a tokenizer of transformers. Raises UserError for one whose vocabulary cannot be grown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{name}: its tokenizer has no fast backend (a tokenizer.json or a form that can be made into one)")
    state = json.loads(backend.to_str())
    kind = state["model"].get("type")
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{name}: its tokenizer is a {kind} model; only BPE and SentencePiece's Unigram can be grown")
    if state["model"].get("continuing_subword_prefix") or state["model"].get("end_of_word_suffix"):
        raise UserError(f"{name}: its tokenizer marks the parts of words, which pieces joined by merges do not")
    scores: list[float] = []
    if kind == "Unigram":
        names = {token: text for token, (text, _) in enumerate(state["model"]["vocab"])}
        scores = [score for _, score in state["model"]["vocab"]]
        unknown = state["model"].get("unk_id")
    else:
        names = {token: text for text, token in state["model"]["vocab"].items()}
        unknown = state["model"]["vocab"].get(state["model"].get("unk_token"))
    byte_level = any(_has_byte_level(state[part]) for part in ("pre_tokenizer", "decoder"))
    special = {added["id"] for added in state["added_tokens"]}
    spelt = {}
    for token, text in names.items():
        data = _byte_level_bytes(text) if byte_level else _sentencepiece_bytes(text)
        if data and token not in special and token != unknown:
            spelt[token] = data
    byte_ids = frozenset(token for token, text in names.items() if not byte_level and BYTE.fullmatch(text))
    return Pieces(backend, state, byte_level, names, spelt, byte_ids, scores)


def _has_byte_level(part: dict[str, Any] | None) -> bool:
    if not part:
        return False
    inner = part.get("pretokenizers") or part.get("decoders") or []
    return part["type"] == "ByteLevel" or any(_has_byte_level(one) for one in inner)


def _byte_level_bytes(text: str) -> bytes | None:
    """None for a token that is not written in the alphabet of bytes: a special one."""
    table = _byte_of_char()
    return bytes(table[char] for char in text) if all(char in table for char in text) else None


@functools.cache
def _byte_of_char() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def _sentencepiece_bytes(text: str) -> bytes:
    byte = BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.encode()


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _joins(before: str, after: str) -> bool:
    """Whether SentencePiece's trainer lets a piece reach over this place: not over spaces, scripts, or between digits."""
    if after.startswith(SPACE):
        return not before.strip(SPACE) and not after.strip(SPACE)
    if not before.strip(SPACE):
        return True
    left, right = _script(before[-1]), _script(after[0])
    return left == right != "DIGIT"


def _script(char: str) -> str:
    """The script of a letter, DIGIT, or OTHER."""
    category = unicodedata.category(char)
    if category.startswith("N"):
        return "DIGIT"
    if not category.startswith(("L", "M")):
        return "OTHER"
    script = unicodedata.name(char, "OTHER").split(" ")[0]
    return "CJK" if script in IDEOGRAPHIC else script
