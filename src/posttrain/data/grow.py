"""A vocabulary grows: a BPE is trained on a domain's corpus in the base's own ids, and what it joins becomes new pieces.

In a BPE base its merges are appended to the base's, which rank before all new ones and never take a new piece: every text is first
cut as the base cuts it, and only then are its ids joined further. A Unigram base takes the cut whose scores have the largest sum: a new
piece gets the sum of its parts, so that every cut with it is worth as much as the base's own, and a trace more for each id that it saves,
so that of these the shortest wins. Either way a text in which no new piece applies keeps its ids, and each new piece stands for a known run of
old ids. BPE: Sennrich et al., arXiv 1508.07909; Unigram: Kudo, arXiv 1804.10959.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from posttrain.data.pieces import SPACE, Pieces, Unit
from posttrain.types import UserError

# The trainer of `tokenizers` joins characters; ours stand for ids of the base. A unit of several ids is two characters, so that
# "spell it as one" is a merge with the unit's frequency among the others. The trainer breaks ties in favour of the lower character
# and no pair with one half of a unit is more frequent than the two halves together, so halves are joined before anything else.
FIRST_HALF, SECOND_HALF, WHOLE = 0x10000, 0x28000, 0x40000
LAST_CODE = 0x10FFFF
REPEATS = 1000  # of a word in one line for the trainer
# Of Unigram scores, which are log-probabilities of -3 to -20 and kept in double precision: less than any difference that was trained.
SAVED_ID_SCORE = 1e-6
UNKNOWN_PENALTY = 10.0  # below the lowest score: what `tokenizers` gives a character that no piece has


@dataclass
class Growth:
    """New pieces (name → the base ids that it stands for, in the order of their ids) and the merges that reach them."""

    base: Pieces
    most_pieces: int
    pieces: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    _ids: dict[str, int] = field(default_factory=dict)  # of all names that the base has, added tokens among them

    def __post_init__(self) -> None:
        old = {name: token for token, name in self.base.names.items()}
        self._ids = {**old, **{a["content"]: a["id"] for a in self.base.state["added_tokens"]}}

    @property
    def room(self) -> int:
        """How many more pieces may be added."""
        return self.most_pieces - len(self.pieces)

    def join(self, left: str, right: str, parts: tuple[int, ...] = ()) -> str | None:
        """The piece left + right, reached by a merge; None where the base has it already, by another way, or there is no room.

        `parts`: what it stands for, where left is no piece.
        """
        joined = left + right
        if joined in self._ids or (joined not in self.pieces and not self.room):
            return None
        self.pieces.setdefault(joined, parts or self._parts(left) + self._parts(right))
        if not self.base.scores:
            self.ranks.setdefault((left, right), len(self.ranks))
        return joined

    def chain(self, names: list[str]) -> str | None:
        """The piece of all names, joined from the left; None, and nothing added, where that cannot be."""
        if self.base.scores:
            return self.join("".join(names[:-1]), names[-1], tuple(part for name in names for part in self._parts(name)))
        steps = ["".join(names[: i + 1]) for i in range(1, len(names))]
        if any(step in self._ids for step in steps) or len({*steps} - self.pieces.keys()) > self.room:
            return None
        joined: str | None = names[0]
        for name in names[1:]:
            assert joined is not None
            joined = self.join(joined, name)
        return joined

    def spell(self, unit: Unit) -> str | None:
        """The piece of one unit, made if it has none. SentencePiece's BPE looks a character up before it falls back on bytes."""
        if len(unit.ids) == 1:
            return self.base.names[unit.ids[0]]
        if self.base.byte_level:
            return self.chain(self.applied([self.base.names[token] for token in unit.ids]))
        if unit.text not in self.pieces and self.room:
            self.pieces[unit.text] = unit.ids
        return unit.text if unit.text in self.pieces else None

    def applied(self, names: list[str]) -> list[str]:
        """Names after the new merges, as the grown tokenizer joins them."""
        names = list(names)
        while True:
            ranked = [(self.ranks[pair], i) for i, pair in enumerate(pairwise(names)) if pair in self.ranks]
            if not ranked:
                return names
            _, i = min(ranked)
            names[i : i + 2] = [names[i] + names[i + 1]]

    def _parts(self, name: str) -> tuple[int, ...]:
        return self.pieces[name] if name in self.pieces else (self._ids[name],)

    @property
    def first_id(self) -> int:
        """The id of the first new piece: behind all that the base has."""
        return max(self._ids.values()) + 1

    def tokenizer_state(self) -> dict[str, Any]:
        """The tokenizers JSON of the grown tokenizer."""
        state = copy.deepcopy(self.base.state)
        if self.base.scores:
            state["model"]["vocab"] = self._scored()
            return state
        # Special tokens lie between the old pieces and the new ones. Named in the model too they keep their ids when it is read.
        state["model"]["vocab"] = {**self._ids, **{name: self.first_id + i for i, name in enumerate(self.pieces)}}
        state["model"]["merges"] += [list(pair) for pair in self.ranks]
        return state

    def _scored(self) -> list[list[Any]]:
        """The vocabulary of a grown Unigram model, [piece, score] by id. Special tokens behind the old pieces are named in it, too."""
        names = {token: name for name, token in self._ids.items()}
        if len(names) != self.first_id:
            raise UserError("the vocabulary cannot be grown: its special tokens leave ids out")
        lowest = min(self.base.scores)
        scored = [[names[token], score] for token, score in enumerate(self.base.scores)]
        scored += [[names[token], lowest] for token in range(len(scored), self.first_id)]
        return scored + [[name, self._score(parts, lowest)] for name, parts in self.pieces.items()]

    def _score(self, parts: tuple[int, ...], lowest: float) -> float:
        """What the base gives for these ids; a character that it spells in bytes counts as unknown."""
        spelt = b"".join(self.base.spelt[token] for token in parts if token in self.base.byte_ids).decode()
        known = sum(self.base.scores[token] for token in parts if token not in self.base.byte_ids)
        return known + len(spelt) * (lowest - UNKNOWN_PENALTY) + SAVED_ID_SCORE * (len(parts) - 1)


def grow_by_corpus(growth: Growth, texts: Iterable[str], min_frequency: int) -> None:
    """Add the pieces that a BPE trainer finds in `texts`, most frequent first; each occurs at least `min_frequency` times."""
    base = growth.base
    units: dict[Unit, int] = {}  # of several ids
    words: Counter[str] = Counter()
    for word in base.words(texts):
        symbols = "".join(_symbols(unit, units) for unit in word)
        if len(symbols) > 1:
            words[symbols] += 1
    by_number = list(units)
    built: dict[str, str | None] = {}

    def name(symbols: str) -> str | None:
        if len(symbols) == 1 and ord(symbols) >= WHOLE:
            return base.names[ord(symbols) - WHOLE]
        return built[symbols]

    for left, right in _trained_merges(words, growth.most_pieces, min_frequency):
        if not growth.room:
            return
        if ord(left[0]) < SECOND_HALF and len(left) == 1:
            built[left + right] = growth.spell(by_number[ord(left) - FIRST_HALF])
            continue
        first, second = name(left), name(right)
        built[left + right] = growth.join(first, second) if first and second else None


def _symbols(unit: Unit, units: dict[Unit, int]) -> str:
    if len(unit.ids) == 1:
        return _symbol(WHOLE, unit.ids[0], LAST_CODE)
    number = units.setdefault(unit, len(units))
    return _symbol(FIRST_HALF, number, SECOND_HALF) + _symbol(SECOND_HALF, number, WHOLE)


def _symbol(start: int, number: int, end: int) -> str:
    if start + number >= end:
        raise UserError(f"the vocabulary cannot be grown: more than {end - start:,} different tokens or unknown characters")
    return chr(start + number)


def _trained_merges(words: Counter[str], most_pieces: int, min_frequency: int) -> list[tuple[str, str]]:
    """The merges of a BPE over words of symbols, in order; more than asked for, as not each gives a piece."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    symbols = len(set().union(*words)) if words else 0
    trainer = trainers.BpeTrainer(
        vocab_size=symbols + 2 * most_pieces, min_frequency=min_frequency, show_progress=False, special_tokens=[]
    )
    model.train_from_iterator(_lines(words), trainer)
    return [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]


def _lines(words: Counter[str]) -> Iterator[str]:
    for word, times in words.items():
        for done in range(0, times, REPEATS):
            yield "\n".join([word] * min(REPEATS, times - done))


def grow_by_model(growth: Growth, path: str) -> int:
    """Add the pieces of a trained SentencePiece model, in its order; returns how many were left out.

    A piece is joined from the ids that the base gives for it. Left out are pieces that the base would cut (words of several
    parts, say) and those for which no room is left.
    """
    left_out = 0
    for text in _sentencepiece_pieces(path):
        units = growth.base.spelling(text)
        if units is None:
            left_out += 1
            continue
        spelt = [growth.spell(unit) for unit in units]
        whole = growth.applied([name for name in spelt if name is not None])
        if None in spelt or (len(whole) > 1 and growth.chain(whole) is None):
            left_out += 1
    return left_out


def _sentencepiece_pieces(path: str) -> list[str]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--domain_sp_model {path}: is not a SentencePiece model (a .model file)") from error
    odd = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
    ids = [token for token in range(model.vocab_size()) if not any(test(token) for test in odd)]
    return [text for token in ids if (text := model.id_to_piece(token)).strip(SPACE)]
