"""Rows beyond the positions that a model has: told with the remedy, or refused where the model would have nothing to look up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from posttrain.commands.report import say
from posttrain.config import Config
from posttrain.data.load import LoadedRows
from posttrain.data.stream import RowStream
from posttrain.model.attention import unwrap
from posttrain.model.rope import context_tokens, own_positions, rope_scaling
from posttrain.training.resolve_context import row_tokens
from posttrain.types import UserError

TABLES = {"wpe", "embed_positions", "position_embeddings", "position_embedding"}  # what families call learned positions
FLAGS = {"pt": "--block_size {0}", "sft": "--model_max_length {0}"}
OF_PAIRS = "--max_source_length and --max_target_length of {0} together"


def check_lengths(config: Config, model: Any, data: Iterable[LoadedRows | RowStream | None], *, answer_tokens: int = 0) -> None:
    """Say how many rows the model has no positions for. Packed examples count by themselves: each begins at position 0.

    data            rows as the stage has them, tokenized; None among them is left out, and a stream, which has none yet, counts as
                    one row of the longest that the flags allow
    answer_tokens   what is still to be added to each, in tokens

    Raises UserError where positions are a table, or computed by an engine that has no more of them.
    """
    core = unwrap(model)
    known = context_tokens(core.config.get_text_config())
    if known is None or row_tokens(config) <= known:
        return
    lengths = [tokens + answer_tokens for rows in data if rows is not None for tokens in _lengths(rows, row_tokens(config))]
    beyond = [tokens for tokens in lengths if tokens > known]
    if not beyond:
        return
    whose = "prompts with --max_target_length" if answer_tokens else "rows"
    found = f"{len(beyond):,} of {len(lengths):,} {whose} are longer than the {known:,} positions of the model (up to {max(beyond):,} tokens)"
    shorter = FLAGS.get(config.command, OF_PAIRS).format(known)
    table = has_table(core)
    if table or (config.command == "ppo" and config["rollout_engine"] == "vllm"):
        why = "it has a table of them and no more" if table else "vLLM computes no more"
        raise UserError(f"{config['model_name_or_path']}: {found}, and {why}: use {shorter}")
    say(f"positions: {found}, beyond which it has not been trained; {_remedy(config, core)}, or use {shorter}")


def longest_row(config: Config, model: Any) -> int:
    """The most tokens of a row, prompt and answer: what the flags allow, as far as the model has positions for it."""
    allowed = row_tokens(config)
    return min(allowed, context_tokens(unwrap(model).config.get_text_config()) or allowed)


def has_table(model: nn.Module) -> bool:
    """Whether positions are learned, one row of a table each: beyond its end there are none."""
    config: Any = getattr(model, "config", None)
    if own_positions(config) and not getattr(config, "max_position_embeddings", None):
        return True
    return any(path.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding) for path, module in model.named_modules())


def _remedy(config: Config, core: Any) -> str:
    if config.command == "ppo":
        return "train it with --rope_scaling in the stages before"
    scaled = rope_scaling(core.config)
    return (
        "--rope_scaling stretches them (docs/long_context.md)"
        if scaled is None
        else "a larger --rope_factor stretches them further"
    )


def _lengths(loaded: LoadedRows | RowStream, longest: int) -> list[int]:
    """Tokens of each row: of a pair its prompt and its longer answer, of a prompt its own."""
    if isinstance(loaded, RowStream):
        return [longest]
    rows, names = loaded.dataset, loaded.dataset.column_names
    if "input_ids" in names:
        return [len(ids) for ids in rows["input_ids"]]
    prompts = [len(ids) for ids in rows["prompt_ids"]]
    if "chosen_ids" not in names:
        return prompts
    answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return [prompt + max(len(one), len(other)) for prompt, (one, other) in zip(prompts, answers, strict=True)]
