"""Grown vocabularies: what the base cuts stays, new pieces are joined from it, nothing is lost; for both kinds of BPE."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.data.grow import Growth, grow_by_corpus, grow_by_model
from posttrain.data.pieces import SPACE, take_apart
from posttrain.types import UserError
from vocabularies import ENGLISH, domain_lines, expanded, sentencepiece_base, sentencepiece_model, unigram_base

KINDS = ["byte-level", "sentencepiece", "unigram", "unigram-words"]
ENGLISH_WORDS = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=80)
NEAR = ["browner foxes", "the dozing foxglove", "overthrown quickstep", "shaded lazybones", "throes", "jumper other thereover"]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*domain_lines(12), *ENGLISH, "感染", "病", "毒", " ", "\n", "🦊", "e\u0301"]), max_size=6).map(
        "".join
    ),
    st.text(alphabet="病人患者感染毒 a1，", max_size=30),
)


@pytest.fixture(scope="module")
def bases(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = sentencepiece_base(tmp_path_factory.mktemp("llama"))
    return {
        "byte-level": tokenizer, "sentencepiece": AutoTokenizer.from_pretrained(folder), "unigram": unigram_base(folder),
        "unigram-words": unigram_base(folder, words_apart=True),
    }  # fmt: skip


def growth_of(base: Any, texts: Iterable[str] = (), most: int = 60, min_frequency: int = 2) -> Growth:
    growth = Growth(take_apart(base, "base"), most)
    grow_by_corpus(growth, texts or domain_lines(), min_frequency)
    return growth


def grown(growth: Growth) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(growth.tokenizer_state()))


def with_grown(growth: Growth) -> tuple[Growth, Tokenizer, Tokenizer]:
    return growth, growth.base.backend, grown(growth)


@pytest.fixture(scope="module")
def pairs(bases: dict[str, Any]) -> dict[str, tuple[Growth, Tokenizer, Tokenizer]]:
    """Kind → (growth, base, grown tokenizer)."""
    return {kind: with_grown(growth_of(base)) for kind, base in bases.items()}


@pytest.fixture(scope="module")
def english(bases: dict[str, Any]) -> dict[str, tuple[Growth, Tokenizer, Tokenizer]]:
    """The same, grown by words that are made of what the base knows: old and new merges meet in them."""
    return {kind: with_grown(growth_of(base, NEAR * 3)) for kind, base in bases.items()}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_a_new_piece_stands_for_what_the_base_gave(pairs: dict[str, Any], kind: str, text: str) -> None:
    """For every text, so that one without new pieces keeps its ids."""
    growth, base, new = pairs[kind]
    assert expanded(ids(new, text), growth) == ids(base, text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.lists(st.sampled_from([*NEAR, *ENGLISH, "the", "row", "n", "fo", " ", "er"]), max_size=8).map("".join))
def test_a_new_piece_stands_for_what_the_base_gave_near_its_own_words(english: dict[str, Any], kind: str, text: str) -> None:
    growth, base, new = english[kind]
    assert len(growth.pieces) > 20
    assert expanded(ids(new, text), growth) == ids(base, text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_nothing_is_lost(pairs: dict[str, Any], kind: str, text: str) -> None:
    _, base, new = pairs[kind]
    back = new.decode(ids(new, text), skip_special_tokens=False)
    assert back == base.decode(ids(base, text), skip_special_tokens=False)
    # SentencePiece reads its own mark as a space and takes the first space for the one that it puts before a text.
    if kind == "byte-level" or (SPACE not in text and not text.startswith(" ")):
        assert back == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=ENGLISH_WORDS)
def test_text_outside_the_domain_keeps_its_ids(pairs: dict[str, Any], kind: str, text: str) -> None:
    _, base, new = pairs[kind]
    assert ids(new, text) == ids(base, text)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_reached_and_whole(pairs: dict[str, Any], kind: str) -> None:
    growth, base, new = pairs[kind]
    assert len(growth.pieces) == 60
    domain = "".join(domain_lines())
    assert len(ids(new, domain)) < 0.5 * len(ids(base, domain))
    for word in ("感染", "患者"):
        assert len(ids(new, f"，{word}，")) < len(ids(base, f"，{word}，"))
    texts = [growth.base.text(parts) for parts in growth.pieces.values()]
    # A piece that is no whole character is a step on the way to one: its parts begin another piece.
    for parts, text in zip(growth.pieces.values(), texts, strict=True):
        assert text is not None or any(o[: len(parts)] == parts for o in growth.pieces.values() if o != parts)
    if kind != "byte-level":
        assert None not in texts
    for new_id, name in enumerate(growth.pieces, growth.first_id):
        assert [token.id for token in new.model.tokenize(name)] == [new_id]


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_and_special_tokens_stay(pairs: dict[str, Any], bases: dict[str, Any], kind: str) -> None:
    growth, base, new = pairs[kind]
    old = base.get_vocab(with_added_tokens=True)
    now = new.get_vocab(with_added_tokens=True)
    assert {name: now[name] for name in old} == old
    assert sorted(now.values()) == list(range(len(old) + 60))
    assert growth.first_id == len(old)
    special = bases[kind].eos_token
    assert ids(new, f"a{special}感染")[1:-1].count(old[special]) == 1 or ids(new, special) == [old[special]]


def test_special_tokens_behind_the_vocabulary_keep_their_ids(tokenizer: Any) -> None:
    base = copy.deepcopy(tokenizer)
    base.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    growth = growth_of(base)
    new = grown(growth)
    assert growth.first_id == len(tokenizer) + 1
    assert ids(new, "感染<|late|>感染")[1:-1].count(len(tokenizer)) == 1
    assert new.token_to_id("<|late|>") == len(tokenizer)


def test_a_piece_that_the_base_cannot_reach_stays_unreached() -> None:
    core = Tokenizer(models.BPE({"x": 0, "y": 1, "z": 2, "xy": 3}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    growth = growth_of(PreTrainedTokenizerFast(tokenizer_object=core), ["xyz"] * 5 + ["zx"] * 3)
    assert growth.pieces
    assert "xy" not in growth.pieces
    new = grown(growth)
    assert new.token_to_id("xy") == 3
    for text in ("xy", "xyz", "zxy", "zxyz"):
        assert expanded(ids(new, text), growth) == ids(core, text)


def test_a_unigram_piece_is_worth_its_parts(pairs: dict[str, Any]) -> None:
    """Scores written out: those of the parts, a character in bytes as an unknown one, 10 below the lowest."""
    growth, _, new = pairs["unigram"]
    state = json.loads(new.to_str())["model"]["vocab"]
    old = dict(json.loads(growth.base.backend.to_str())["model"]["vocab"])
    unknown = min(old.values()) - 10
    scores = dict(state)
    assert all(scores[name] == score for name, score in old.items())
    assert scores["感染"] == pytest.approx(2 * unknown + 5e-6, abs=1e-9)  # six bytes, one id
    mixed = next(name for name in growth.pieces if name.isdigit() or any(char in "复诊日" for char in name))
    known = sum(old.get(char, unknown) for char in mixed)
    assert scores[mixed] == pytest.approx(known + 1e-6 * (len(growth.pieces[mixed]) - 1), abs=1e-9)


def test_a_unigram_base_without_bytes_is_grown_by_what_it_knows(tmp_path: Path) -> None:
    base = unigram_base(tmp_path / "bare", byte_fallback=False)
    growth = growth_of(base, ["the dozing foxglove rests 感染"] * 9)
    new, names = grown(growth), set(growth.pieces)
    assert any("ox" in name for name in names)
    assert not [name for name in names if "感" in name or "染" in name]  # it has no ids for these to stand for
    assert len(ids(new, "the dozing foxglove")) < 0.7 * len(ids(growth.base.backend, "the dozing foxglove"))
    for text in (*ENGLISH, *NEAR, "the 感染 fox"):
        assert expanded(ids(new, text), growth) == ids(growth.base.backend, text)


def test_special_tokens_behind_a_unigram_vocabulary_keep_their_ids(tmp_path: Path) -> None:
    base = unigram_base(tmp_path / "late")
    base.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    growth = growth_of(base)
    new = grown(growth)
    late = len(base) - 1
    assert new.token_to_id("<|late|>") == late
    assert growth.first_id == late + 1
    assert ids(new, "感染<|late|>感染").count(late) == 1


# --- against the definition -----------------------------------------------------------------------------------------------


def naive_pieces(words: list[list[tuple[int, ...]]], steps: int) -> list[tuple[int, ...]]:
    """Sennrich's algorithm by the book: join the most frequent pair, again and again; the runs of old ids in order."""
    found = []
    for _ in range(steps):
        counts = Counter(pair for word in words for pair in pairwise(word))
        best, times = counts.most_common(1)[0]
        assert list(counts.values()).count(times) == 1, "the example must have no ties"
        found.append(best[0] + best[1])
        words = [_joined(word, best) for word in words]
    return found


def _joined(word: list[tuple[int, ...]], pair: tuple[tuple[int, ...], tuple[int, ...]]) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = []
    for unit in word:
        if out and (out[-1], unit) == pair:
            out[-1] = out[-1] + unit
        else:
            out.append(unit)
    return out


def test_the_trained_pieces_are_those_of_the_definition(tokenizer: Any) -> None:
    texts = ["vexing"] * 13 + ["vexed"] * 7 + ["vet"] * 4 + ["king"] * 2
    growth = growth_of(tokenizer, texts, most=3)
    backend = tokenizer.backend_tokenizer
    words: list[list[tuple[int, ...]]] = [[(one,) for one in ids(backend, text)] for text in texts]
    assert all(len(word) > 1 for word in words)
    assert list(growth.pieces.values()) == naive_pieces(words, 3)


def test_min_frequency_and_room(tokenizer: Any) -> None:
    texts = ["vexing"] * 13 + ["hint"] * 2
    pieces = [set(growth_of(tokenizer, texts, 50, frequency).pieces) for frequency in (1, 3, 14)]
    assert pieces[0] > pieces[1] > pieces[2] == set()
    assert any("hint".endswith(name) for name in pieces[0] - pieces[1])
    assert [len(growth_of(tokenizer, texts, most).pieces) for most in (1, 2, 4)] == [1, 2, 4]
    # A character of three ids needs two pieces, so that one is left alone here.
    assert [len(growth_of(tokenizer, domain_lines(), most).pieces) for most in (1, 2)] == [0, 2]


def test_sentencepiece_words_end_where_its_trainer_ends_them(bases: dict[str, Any]) -> None:
    texts = ["zeta zeta 77 病毒zeta,, 病毒\n病毒，\n，"] * 50
    growth = growth_of(bases["sentencepiece"], texts, most=500)
    names = set(growth.pieces)
    assert {"▁zeta", "病毒", "▁病毒"} <= names
    assert not [name for name in names if SPACE in name[1:] or "\n" in name or "<0x" in name]
    assert not [name for name in names if re.search(r"\d\d|[a-z][病毒,]|[病毒][a-z,]|[,，][a-z病毒]", name)]


# --- a trained model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_trained_model(bases: dict[str, Any], kind: str, tmp_path: Path) -> None:
    file = sentencepiece_model(tmp_path, domain_lines(), 420, "domain")
    growth = Growth(take_apart(bases[kind], "base"), 1000)
    left_out = grow_by_model(growth, str(file))
    new = grown(growth)
    assert left_out < 20
    pieces = {growth.base.text(parts) for parts in growth.pieces.values()}
    assert {"感染", "病毒"} <= {piece.strip() for piece in pieces if piece}
    for line in domain_lines():
        assert expanded(ids(new, line), growth) == ids(growth.base.backend, line)
        assert len(ids(new, line)) < 0.5 * len(ids(growth.base.backend, line))
    few = Growth(take_apart(bases[kind], "base"), 5)
    assert grow_by_model(few, str(file)) > left_out
    assert 0 < len(few.pieces) <= 5


def test_a_word_that_the_base_would_cut_has_no_spelling(tokenizer: Any) -> None:
    pieces = take_apart(tokenizer, "base")
    assert [pieces.spelling(text) for text in ("病毒，病", "fox, fox")] == [None, None]
    assert [unit.text for unit in pieces.spelling("▁病毒") or []] == [" ", "病", "毒"]


def test_a_file_that_is_no_model(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.model"
    file.write_text("nothing")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        grow_by_model(Growth(take_apart(tokenizer, "base"), 5), str(file))


# --- what cannot work -----------------------------------------------------------------------------------------------------


def test_other_tokenizers_are_refused(tokenizer: Any) -> None:
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match=r"^base: its tokenizer is a WordPiece model; only BPE and SentencePiece's Unigram"):
        take_apart(PreTrainedTokenizerFast(tokenizer_object=word_piece), "base")
    suffixed = Tokenizer(models.BPE({"a": 0, "b</w>": 1, "ab</w>": 2}, [("a", "b</w>")], end_of_word_suffix="</w>"))
    suffixed.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="marks the parts of words"):
        take_apart(PreTrainedTokenizerFast(tokenizer_object=suffixed), "base")
    with pytest.raises(UserError, match="no fast backend"):
        take_apart(object(), "base")
