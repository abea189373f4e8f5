"""A domain's text, and base tokenizers of both kinds that know nothing of it, shared by the tests of vocabulary growth."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import sentencepiece

ENGLISH = [
    "the quick brown fox jumps over the lazy dog and rests in the shade of a tree",
    "a dog and a fox met at the river 42 times",
    "0 1 2 3 4 5 6 7 8 9 , .",
]


def domain_lines(n: int = 60) -> list[str]:
    """Chinese sentences on infections, each another."""
    who, what, then = (
        ("病人", "患者", "儿童", "老人"),
        ("发热", "咳嗽", "感染病毒", "感染细菌", "头痛"),
        ("应休息", "应多饮水", "应及时就医"),
    )
    every = [f"{a}{b}时{c}，第{i}日复诊。" for i, (a, b, c) in enumerate(itertools.product(who, what, then))]
    return every[:n]


def sentencepiece_model(folder: Path, lines: list[str], vocab_size: int, name: str = "tokenizer") -> Path:
    """A SentencePiece BPE with byte fallback; returns its .model file."""
    text = folder / f"{name}.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / name), model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        character_coverage=1.0, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    text.unlink()
    return folder / f"{name}.model"


def sentencepiece_base(folder: Path) -> Path:
    """A folder with a base tokenizer as Llama-2's is shipped: tokenizer.model and its config."""
    folder.mkdir(exist_ok=True)
    sentencepiece_model(folder, ENGLISH * 10, 340)
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "chat_template": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def unigram_base(folder: Path, byte_fallback: bool = True, words_apart: bool = False) -> Any:
    """A Unigram tokenizer as SentencePiece trains it, over its fast form; `words_apart`: cut at spaces first, as XGLM's is."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n".join(ENGLISH * 10), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "unigram"), model_type="unigram", vocab_size=340 if byte_fallback else 80,
        byte_fallback=byte_fallback, character_coverage=1.0, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    trained = sentencepiece.SentencePieceProcessor(model_file=str(folder / "unigram.model"))
    pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.vocab_size())]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    if words_apart:
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(strip)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    made.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    return made


def expanded(ids: list[int], growth: Any) -> list[int]:
    """Ids of the grown tokenizer with every new piece replaced by the old ids that it stands for."""
    parts = list(growth.pieces.values())
    return [old for one in ids for old in (parts[one - growth.first_id] if one >= growth.first_id else (one,))]
