"""Tokenizers built in process, of the kinds that cut text differently, and their pieces as bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_TEXT = [
    "USER: Hello ASSISTANT: Yes, of course.\n\n### Response:\nThe sky over Rome is sunny.\n\n\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\nHuman: 你好，世界\n\nBelle: {\"name\": \"sky\"}\n  indented\n",
    "[Round 1]\n\n问：天气\n\n答：晴 Assistant: é è ñ system user model tool_call \t tabs \u00a0 and   spaces",
] * 20  # fmt: skip


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(words: str | None = LLAMA3_WORDS) -> Tokenizer:
    """Llama 3's and Qwen's kind: every byte has a piece, a space belongs to the word after it, line breaks stay together."""
    core = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_only])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_TEXT, trainer)
    return core


def gpt2() -> Tokenizer:
    """GPT-2's kind: the last of several line breaks goes with the word after it."""
    return byte_level(words=None)


def sentencepiece_bpe() -> Tokenizer:
    """Llama 2's kind: a space is put before every stretch of text, ▁ stands for spaces, unknown characters fall to bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(model["vocab"], key=model["vocab"].get),
    ]
    merges = [tuple(m) for m in model["merges"] if "\n" not in "".join(m)]
    vocabulary = {piece: i for i, piece in enumerate(p for p in pieces if "\n" not in p)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def unigram() -> Tokenizer:
    """T5's and XLM's kind: composes characters, a space only before the first stretch, most probable cut."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        _TEXT, trainers.UnigramTrainer(vocab_size=260, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return core


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "gpt2": gpt2,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
}


@cache
def _built(kind: str) -> PreTrainedTokenizerFast:
    core = KINDS[kind]()
    core.add_special_tokens(["<s>", "</s>"])
    unknown = {} if kind in ("byte_level", "gpt2") else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **unknown)


def make_tokenizer(kind: str = "byte_level", adds_bos: bool = False) -> Any:
    """A fresh tokenizer; with `adds_bos` it puts <s> before a text by itself, as Llama's does."""
    tokenizer = copy.deepcopy(_built(kind))
    if adds_bos:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def written(tokenizer: Any, ids: list[int]) -> bytes:
    """What the ids say, byte for byte: pieces read by hand, not by the tokenizer's decoder, which trims and joins."""
    back = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = tokenizer.added_tokens_decoder
    is_byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    out = b""
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if i in special:
            out += piece.encode()
        elif is_byte_level:
            out += bytes(back[letter] for letter in piece)
        elif piece.startswith("<0x") and len(piece) == 6:
            out += bytes([int(piece[3:5], 16)])
        else:
            out += piece.replace("▁", " ").encode()
    return out
