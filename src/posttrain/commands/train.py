"""One training run of the shared trainer (pt, sft), from flags to a run folder."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from posttrain import flags
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.data.load import DataPlan, DataSource, Splits, load_splits
from posttrain.data.pack import best_fit, collate, collate_padded
from posttrain.data.sources import parse_weights
from posttrain.data.template import apply_template, set_stop_tokens
from posttrain.data.tokenize import EncodeChat, EncodeText, fingerprint, prove_masks
from posttrain.model.adapter import Lora, attach_lora, load_adapter, trainable_summary
from posttrain.model.attention import enable_segments
from posttrain.model.embedded import resolve_model
from posttrain.model.load import check_vocabulary, load_model, load_tokenizer, resize_embeddings
from posttrain.model.logprobs import install_logprobs
from posttrain.objectives import OBJECTIVES
from posttrain.training import artifacts
from posttrain.training.audit import GradientAudit
from posttrain.training.batches import Groups
from posttrain.training.callbacks import MetricsFile, Progress
from posttrain.training.resolve import check_steps, resolve, training_arguments
from posttrain.training.trainer import ObjectiveTrainer, TrainingData, use_callbacks
from posttrain.types import UserError

logger = logging.getLogger(__name__)


def run(config: Config) -> None:
    """config → data → template → tokenize → pack → model + adapter → objective → trainer → artifacts."""
    quiet_libraries()
    config = resolve(config)
    folder = Path(config["output_dir"])
    checkpoint = artifacts.find_checkpoint(folder, config["resume_from_checkpoint"])
    args = training_arguments(config)
    if args.process_index == 0:
        artifacts.open_run_folder(folder, config["overwrite_output_dir"], resuming=bool(config["resume_from_checkpoint"]))
    say(f"posttrain {config.command}: settings that are not defaults\n{config.table()}")
    tokenizer = load_tokenizer(config["tokenizer_name_or_path"] or config["model_name_or_path"], **_source(config))
    if config.command == "sft":
        say(f"template: {apply_template(tokenizer, config['template_name']).name}")
    with args.main_process_first(desc="preparing data"):
        splits = prepare(config, tokenizer)
    report_data(config, splits, tokenizer, folder)
    model = build_model(config, tokenizer)
    trainer = build_trainer(config, args, model, splits, tokenizer)
    parents = {"base": artifacts.parent(config["model_name_or_path"], resolve_model(config["model_name_or_path"]))}
    if config["peft_path"]:
        parents["adapter"] = artifacts.parent(config["peft_path"], config["peft_path"])
    if args.process_index == 0:
        artifacts.write_run(folder, config.command, config.saved(), parents=parents, resumed_from=checkpoint)
    train_and_evaluate(config, trainer, folder, checkpoint)


def _source(config: Config) -> dict[str, Any]:
    return {"trust_remote_code": config["trust_remote_code"], "revision": config["model_revision"] or "main"}


def prepare(config: Config, tokenizer: Any) -> Splits:
    """Training and held-out rows, tokenized, from the cache where the same was prepared before."""
    data = config.group(flags.DataFlags)
    weights = parse_weights(data.dataset_weights)
    train = DataSource(data.train_file_dir, data.dataset_name, data.dataset_config_name, data_format=data.data_format, weights=weights)
    held_out = (
        DataSource(data.validation_file_dir, data_format=data.data_format, flag="--validation_file_dir")
        if data.validation_file_dir
        else None
    )
    is_text = config.command == "pt"
    longest = config["block_size"] if is_text else config["model_max_length"]
    encode = EncodeText(tokenizer, longest) if is_text else EncodeChat(tokenizer, longest)
    plan = DataPlan(
        kind="text" if is_text else "chat", bad_rows=data.bad_rows, max_rows=data.max_train_samples, seed=config["seed"],
        workers=data.preprocessing_num_workers, cache_dir=config["cache_dir"], overwrite_cache=data.overwrite_cache,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    key = fingerprint(tokenizer, longest=longest, kind=plan.kind)
    return load_splits(train, held_out, plan, encode, key, data.validation_split_percentage, data.max_eval_samples)


def report_data(config: Config, splits: Splits, tokenizer: Any, folder: Path) -> None:
    """The ledger, on the terminal and in the run folder, and (for chats) the proof of the masks."""
    ledgers = {"train": splits.train.ledger}
    if splits.validation is not None:
        ledgers["validation"] = splits.validation.ledger
    for ledger in ledgers.values():
        ledger.assert_identity()
    say(splits.train.ledger.summary())
    if splits.validation is not None:
        say(splits.validation.ledger.summary("held out"))
    (folder / "ledger.json").write_text(
        json.dumps({name: ledger.to_json() for name, ledger in ledgers.items()}, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )
    check_steps(config["max_steps"], len(splits.train.dataset))
    if config.command == "sft":
        say(prove_masks(splits.train.dataset, tokenizer, config["model_max_length"]))


def build_model(config: Config, tokenizer: Any) -> Any:
    """The model, with room for the tokenizer's ids, its adapter, segment attention and log-probs inside its forward."""
    model = load_model(config["model_name_or_path"], config["dtype"], **_source(config))
    wanted = config["model_type"]
    if wanted and wanted != model.config.model_type:
        raise UserError(f"--model_type {wanted}: {config['model_name_or_path']} is a {model.config.model_type}")
    added = resize_embeddings(model, tokenizer) if config.command == "sft" else 0
    check_vocabulary(model, tokenizer)
    if added and config["use_peft"] and not config["modules_to_save"]:
        logger.warning("the rows of %d new tokens stay as they start: --modules_to_save embed_tokens,lm_head trains them", added)
    if config.command == "sft":
        set_stop_tokens(tokenizer, model.generation_config)
    adapter = config.group(flags.AdapterFlags)
    if adapter.peft_path:
        model = load_adapter(model, adapter.peft_path)
        say(f"adapter {adapter.peft_path}: weights only; optimizer, schedule and data start anew")
    elif adapter.use_peft:
        lora = Lora(adapter.lora_rank, adapter.lora_alpha, adapter.lora_dropout, adapter.target_modules, adapter.modules_to_save,
                    adapter.use_rslora, adapter.use_dora)  # fmt: skip
        model = attach_lora(model, lora)
    say(trainable_summary(model))
    return model


def build_trainer(config: Config, args: TrainingArguments, model: Any, splits: Splits, tokenizer: Any) -> ObjectiveTrainer:
    """Rows grouped and collated as the model allows, and the trainer with our callbacks."""
    packed = False
    if config["padding_free"]:
        attention = enable_segments(model)
        packed = attention.packed
        say(f"rows: {'segments without padding' if packed else 'padded'} ({attention.reason})")
    say(f"log-probs: {install_logprobs(model).reason}")
    capacity = config["block_size"] if config.command == "pt" else config["model_max_length"] if config["packing"] else None
    if capacity is not None and not packed:
        say("packing is off: padded batches hold one example a row")
    groups = best_fit([len(ids) for ids in splits.train.dataset["input_ids"]], capacity) if capacity and packed else None
    if groups is not None:
        say(f"packed: {len(splits.train.dataset):,} examples in {len(groups):,} rows of at most {capacity} tokens")
    data = TrainingData(
        Groups(splits.train.dataset, groups),
        Groups(splits.validation.dataset) if splits.validation is not None else None,
        collate if packed else collate_padded,
    )
    os.environ["TENSORBOARD_LOGGING_DIR"] = config["logging_dir"]  # where the library's callback looks
    trainer = ObjectiveTrainer(model, args, data, OBJECTIVES[config.command], tokenizer)  # type: ignore[index]
    audit = [GradientAudit()] if config["audit"] else []
    use_callbacks(trainer, [Progress(None if not args.disable_tqdm else False), MetricsFile(Path(args.output_dir)), *audit])
    return trainer


def train_and_evaluate(config: Config, trainer: ObjectiveTrainer, folder: Path, checkpoint: str | None) -> None:
    """Train, save, evaluate, and write what came out."""
    wants = {name: config[name] if config.given(name) else True for name in ("do_train", "do_eval")}
    if wants["do_train"]:
        if checkpoint:
            say(f"resuming from {checkpoint}: weights, optimizer, schedule, order of the data and random state")
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder))
        trainer.save_state()
        if trainer.args.process_index == 0:
            artifacts.write_results(folder, "train", trainer.state.log_history[-1])
    if wants["do_eval"] and trainer.data.held_out is not None:
        metrics = trainer.evaluate()
        if trainer.args.process_index == 0:
            artifacts.write_results(folder, "eval", metrics)
    elif config.given("do_eval") and config["do_eval"]:
        raise UserError("--do_eval True needs held-out rows: --validation_file_dir or --validation_split_percentage")
    say(f"run folder: {folder}")
