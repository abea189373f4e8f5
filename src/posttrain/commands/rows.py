"""From flags to rows: the source, how an example is encoded, and the prepared or streamed data of a stage."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from posttrain import flags
from posttrain.config import Config
from posttrain.data.formats import KIND_OF_STAGE
from posttrain.data.load import DataPlan, DataSource, Encode, Splits, load_rows, load_splits, stream_rows
from posttrain.data.sources import parse_weights
from posttrain.data.stream import RowStream
from posttrain.data.tokenize import EncodeChat, EncodeText, fingerprint
from posttrain.data.tokenize_pairs import EncodePair
from posttrain.training.episodes import EncodePrompt, Wanted
from posttrain.training.resolve_context import row_tokens
from posttrain.training.reward_sources import wanted_columns
from posttrain.types import Stage, UserError

PAIR_STAGES = ("rm", "dpo")


def encoder(config: Config, stage: Stage, tokenizer: Any) -> Encode:
    """How an example of the stage becomes columns."""
    if stage == "ppo":
        return EncodePrompt(tokenizer, config["max_source_length"], _wanted(config))
    if stage in PAIR_STAGES:
        return EncodePair(tokenizer, config["max_source_length"], config["max_target_length"], keep_stop=stage == "rm")
    longest = row_tokens(config, stage)
    return EncodeText(tokenizer, longest) if stage == "pt" else EncodeChat(tokenizer, longest)


def _wanted(config: Config) -> Wanted:
    return wanted_columns(config["reward_func"]) if "reward_func" in config.values else Wanted()


def _key(config: Config, stage: Stage, tokenizer: Any) -> str:
    """Changes whenever `encoder` would give other columns."""
    lengths = {name: config[name] for name in ("max_source_length", "max_target_length")} if stage not in ("pt", "sft") else {}
    if stage == "ppo":
        lengths["columns"] = _wanted(config).key()
    return fingerprint(tokenizer, longest=row_tokens(config, stage), stage=stage, **lengths)


def train_source(config: Config) -> DataSource:
    """The training data that the user named. UserError when there is none."""
    data = config.group(flags.DataFlags)
    if not (data.train_file_dir or data.dataset_name):
        raise UserError(f"posttrain {config.command} needs data: --train_file_dir or --dataset_name")
    return DataSource(
        data.train_file_dir, data.dataset_name, data.dataset_config_name,
        data_format=data.data_format, weights=parse_weights(data.dataset_weights),
    )  # fmt: skip


def held_out_source(config: Config) -> DataSource | None:
    """The held-out data that the user named, if any."""
    if not config["validation_file_dir"]:
        return None
    return DataSource(config["validation_file_dir"], data_format=config["data_format"], flag="--validation_file_dir")


def plan(config: Config, stage: Stage, seed: int) -> DataPlan:
    """How rows become examples as they are read."""
    data = config.group(flags.DataFlags)
    return DataPlan(KIND_OF_STAGE[stage], data.bad_rows, data.max_train_samples, seed)


def prepared_plan(config: Config, stage: Stage) -> DataPlan:
    """How rows become examples that are kept: in several processes, with a cache."""
    return dataclasses.replace(
        plan(config, stage, config["seed"]), workers=config["preprocessing_num_workers"], cache_dir=config["cache_dir"],
        overwrite_cache=config["overwrite_cache"], progress=sys.stderr.isatty(),
    )  # fmt: skip


def load(config: Config, stage: Stage, tokenizer: Any) -> Splits:
    """Training and held-out rows, tokenized, from the cache where the same was prepared before."""
    return load_splits(
        train_source(config), held_out_source(config), prepared_plan(config, stage), encoder(config, stage, tokenizer),
        _key(config, stage, tokenizer), config["validation_split_percentage"], config["max_eval_samples"],
    )  # fmt: skip


def load_held_out(config: Config, stage: Stage, tokenizer: Any) -> Any:
    """Only the held-out rows (beside a stream), or None."""
    source = held_out_source(config)
    if source is None:
        return None
    limited = dataclasses.replace(prepared_plan(config, stage), max_rows=config["max_eval_samples"])
    return load_rows(source, limited, encoder(config, stage, tokenizer), _key(config, stage, tokenizer))


def stream(config: Config, stage: Stage, tokenizer: Any, seed: int = 42, shuffle_buffer_rows: int = 0, **ranks: int) -> RowStream:
    """Training rows that are read and encoded as they are asked for."""
    encode = encoder(config, stage, tokenizer)
    return stream_rows(train_source(config), plan(config, stage, seed), encode, shuffle_buffer_rows, **ranks)
