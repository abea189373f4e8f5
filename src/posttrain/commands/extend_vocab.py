"""`posttrain extend-vocab`: a base model whose tokenizer has pieces of a domain."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from posttrain import flags
from posttrain.commands.report import quiet_libraries, say
from posttrain.commands.rows import held_out_source, train_source
from posttrain.config import Config
from posttrain.data.grow import Growth, grow_by_corpus, grow_by_model
from posttrain.data.load import DataPlan, EncodedRows, Splits, load_splits
from posttrain.data.pieces import take_apart
from posttrain.model.embedded import resolve_model
from posttrain.model.load import load_model, load_tokenizer, read_config
from posttrain.model.vocabulary import grow_rows, total_nats
from posttrain.training import artifacts
from posttrain.types import Text, UserError

logger = logging.getLogger(__name__)

LOSS_CHARACTERS = 1000  # of a held-out row, where the loss is measured
EXAMPLES = 10


@dataclass(frozen=True)
class Measured:
    """Held-out text under one tokenizer and model. `nats` is over `loss_characters`; None where it was not measured."""

    characters: int
    tokens: int
    loss_characters: int
    nats: float | None

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def nats_per_character(self) -> float | None:
        return None if self.nats is None else self.nats / self.loss_characters


class EncodeRaw:
    """A document as it is: the pieces are trained on text."""

    def __call__(self, text: Text) -> EncodedRows:
        return EncodedRows([{"text": text.text}])


def run(config: Config) -> None:
    """Grow tokenizer and model, write them, say what it brought."""
    quiet_libraries()
    chosen = config.group(flags.VocabularyFlags)
    output = Path(chosen.output_dir)
    check_growth(config)
    _check_output(config, output, chosen.overwrite_output_dir)
    settings = read_config(chosen.model_name_or_path, chosen.trust_remote_code)
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(f"--model_name_or_path {chosen.model_name_or_path}: is stored quantised; name the full-precision model")
    tokenizer = load_tokenizer(chosen.model_name_or_path, trust_remote_code=chosen.trust_remote_code)
    growth = Growth(take_apart(tokenizer, chosen.model_name_or_path), chosen.vocab_size)
    splits = _read(config, chosen)
    assert splits.validation is not None
    say(splits.train.ledger.summary("read"))
    held_out = list(splits.validation.dataset["text"])
    if chosen.domain_sp_model:
        left_out = grow_by_model(growth, chosen.domain_sp_model)
        say(f"{chosen.domain_sp_model}: {left_out:,} pieces left out (no room, or cut or had by the base in another way)")
    else:
        grow_by_corpus(growth, (row["text"] for row in splits.train.dataset), chosen.min_frequency)
    if not growth.pieces:
        raise UserError(
            f"no new piece occurs {chosen.min_frequency} times in the corpus; lower --min_frequency or name more text"
        )
    stored = str(settings.dtype or torch.float32).removeprefix("torch.")
    model = load_model(chosen.model_name_or_path, stored, trust_remote_code=chosen.trust_remote_code)  # type: ignore[arg-type]
    rows = held_out if chosen.max_eval_samples < 0 else held_out[: chosen.max_eval_samples]
    before = measure(model, tokenizer, held_out, rows)
    old_rows = model.get_input_embeddings().weight.shape[0]
    old_tokens = len(tokenizer)
    tokenizer = grown_tokenizer(tokenizer, growth)
    added_rows = grow_rows(model, growth.first_id, list(growth.pieces.values()))
    after = measure(model, tokenizer, held_out, rows)
    _write(chosen, output, model, tokenizer, held_out)
    examples = shown(growth)
    splits.train.ledger.write(output / "ledger.json")
    facts: dict[str, Any] = {
        "parents": _parents(chosen),
        "vocabulary": {
            "tokens": [old_tokens, len(tokenizer)], "pieces": len(growth.pieces), "merges": len(growth.ranks),
            "first_id": growth.first_id, "embedding_rows": [old_rows, old_rows + added_rows], "examples": examples,
        },
        "held_out": {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)},
    }  # fmt: skip
    artifacts.write_run(output, "extend-vocab", config.saved(), **facts)
    print(report(facts["vocabulary"], len(held_out), len(rows), before, after))
    print(f"model: {output}")


def check_growth(config: Config) -> None:
    """Raises UserError for what cannot work, before anything is read."""
    chosen = config.group(flags.VocabularyFlags)
    if chosen.vocab_size < 1:
        raise UserError(f"--vocab_size {chosen.vocab_size}: expected how many pieces may be added, at least 1")
    if chosen.min_frequency < 1:
        raise UserError(f"--min_frequency {chosen.min_frequency}: expected at least 1")
    if chosen.max_eval_samples < -1:
        raise UserError(f"--max_eval_samples {chosen.max_eval_samples}: expected a number of rows, 0 for none or -1 for all")
    if chosen.validation_file_dir is None and not 0 < chosen.validation_split_percentage < 100:
        raise UserError(
            f"--validation_split_percentage {chosen.validation_split_percentage}: expected more than 0 and less than 100, or held-out"
            " text named by --validation_file_dir; the gain is measured on it"
        )
    if chosen.domain_sp_model and not Path(chosen.domain_sp_model).is_file():
        raise UserError(f"--domain_sp_model {chosen.domain_sp_model}: no such file")


def _check_output(config: Config, output: Path, overwrite: bool) -> None:
    """Raises UserError where the new model would take the place of what it is made from, or of something else."""
    sources = [resolve_model(config["model_name_or_path"]), config["domain_sp_model"], config["validation_file_dir"]]
    for name in [*sources, *(config["train_file_dir"] or "").split(",")]:
        path = Path((name or "").strip()).expanduser()
        if name and path.exists() and path.resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output_dir {output}: holds {name}, which the new model is made from; name another folder")
    if output.is_file():
        raise UserError(f"--output_dir {output}: is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"--output_dir {output}: is not empty; name another folder or use --overwrite_output_dir True")


def _read(config: Config, chosen: flags.VocabularyFlags) -> Splits:
    """Training and held-out text, with the account of every row."""
    data = config.group(flags.DataFlags)
    plan = DataPlan("text", data.bad_rows, data.max_train_samples, cache_dir=chosen.cache_dir, progress=sys.stderr.isatty())
    percentage = 0.0 if chosen.validation_file_dir else chosen.validation_split_percentage
    return load_splits(train_source(config), held_out_source(config), plan, EncodeRaw(), "raw-text-1", percentage)


def grown_tokenizer(tokenizer: Any, growth: Growth) -> Any:
    """The tokenizer with the new pieces; its special tokens, template and settings stay."""
    grown = copy.copy(tokenizer)
    grown._tokenizer = Tokenizer.from_str(json.dumps(growth.tokenizer_state(), ensure_ascii=False))
    return grown


def measure(model: Any, tokenizer: Any, held_out: Sequence[str], loss_rows: Sequence[str]) -> Measured:
    """Tokens of all held-out rows, and the loss on the beginnings of `loss_rows`."""
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in held_out)
    texts = [text[:LOSS_CHARACTERS] for text in loss_rows]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    nats = total_nats(model, ids, start) if texts else None
    return Measured(sum(map(len, held_out)), tokens, sum(map(len, texts)), nats)


def shown(growth: Growth) -> list[list[Any]]:
    """Some new pieces that are whole characters, from the most frequent on: [text, tokens before]."""
    found: list[list[Any]] = []
    for ids in growth.pieces.values():
        text = growth.base.text(ids)
        if text is not None and len(found) < EXAMPLES:
            found.append([text, len(ids)])
    return found


def report(vocabulary: dict[str, Any], n_held_out: int, n_loss: int, before: Measured, after: Measured) -> str:
    """The lines for the terminal."""
    (old, new), (old_rows, new_rows) = vocabulary["tokens"], vocabulary["embedding_rows"]
    gain = 1 - after.tokens_per_character / before.tokens_per_character
    reached = f"reached by {vocabulary['merges']:,} merges" if vocabulary["merges"] else "chosen by their scores"
    lines = [
        f"vocabulary: {old:,} -> {new:,} tokens, {vocabulary['pieces']:,} new pieces {reached};"
        f" embedding rows {old_rows:,} -> {new_rows:,}",
        f"tokens per character: {before.tokens_per_character:.4f} -> {after.tokens_per_character:.4f} ({gain:.1%} fewer;"
        f" {n_held_out:,} held-out rows, {before.characters:,} characters)",
    ]
    if before.nats_per_character is not None and after.nats_per_character is not None:
        lines.append(
            f"loss before any training: {before.nats_per_character:.4f} -> {after.nats_per_character:.4f} nats per character"
            f" ({n_loss:,} rows, {before.loss_characters:,} characters); posttrain pt brings it down"
        )
    pieces = ", ".join(f"{text!r} ({tokens} -> 1)" for text, tokens in vocabulary["examples"])
    return "\n".join([*lines, f"examples: {pieces}"])


def _parents(chosen: flags.VocabularyFlags) -> dict[str, dict[str, str]]:
    parents = {"base": artifacts.parent(chosen.model_name_or_path, resolve_model(chosen.model_name_or_path))}
    if chosen.domain_sp_model:
        parents["domain_sp_model"] = {
            "name": chosen.domain_sp_model, "hash": artifacts.content_hash(Path(chosen.domain_sp_model)),
        }  # fmt: skip
    return parents


def _write(chosen: flags.VocabularyFlags, output: Path, model: Any, tokenizer: Any, held_out: Sequence[str]) -> None:
    """Model and tokenizer into `output`, once the written tokenizer has been read back and cuts the held-out text alike."""
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = model.generation_config
    if settings.temperature is not None or settings.top_p is not None or settings.top_k is not None:
        settings.do_sample = True  # older folders say how to sample but not that, and transformers refuses to save them
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as parent:
        work = Path(parent, "model")
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "tokenizer.model").unlink(missing_ok=True)  # the base's: it knows nothing of the new pieces
        if chosen.trust_remote_code:
            for code in Path(resolve_model(chosen.model_name_or_path)).glob("*.py"):
                shutil.copy(code, work)
        again = load_tokenizer(str(work), trust_remote_code=chosen.trust_remote_code)
        for text in held_out:
            if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
                raise RuntimeError(f"the written tokenizer cuts text in another way; nothing was written: {text[:80]!r}")
        for file in work.glob("*.safetensors"):
            shutil.copymode(work / "config.json", file)  # safetensors writes for the owner only; a server runs as somebody else
        if output.is_dir():
            shutil.rmtree(output)
        os.replace(work, output)
