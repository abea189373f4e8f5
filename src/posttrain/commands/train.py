"""One training run of the shared trainer (pt, sft, rm, dpo), from flags to a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from posttrain.commands import rows
from posttrain.commands.build import build_model, build_objective, collator, install_head, quantization, source
from posttrain.commands.forward import prepare_forward
from posttrain.commands.lengths import check_lengths
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.data.load import LoadedRows
from posttrain.data.pack import best_fit
from posttrain.data.pack_pairs import collate_pairs_padded
from posttrain.data.pack_stream import PackedStream
from posttrain.data.stream import RowStream
from posttrain.data.template import apply_template
from posttrain.data.tokenize import prove_masks
from posttrain.data.tokenize_pairs import prove_pairs
from posttrain.model.embedded import resolve_model
from posttrain.model.fused import fuse
from posttrain.model.load import load_tokenizer
from posttrain.model.rope import rope_scaling
from posttrain.objectives.dpo import Preference
from posttrain.training import artifacts
from posttrain.training.audit import GradientAudit
from posttrain.training.batches import Groups
from posttrain.training.callbacks import MetricsFile, Progress
from posttrain.training.engine_setup import check_layout, load_whole, shard
from posttrain.training.job import agreed_checkpoint, connect, leave_at_exit, lost_connection_told, start_over
from posttrain.training.reference import ReferencePass
from posttrain.training.resolve import HELD_OUT_FLAGS, check_steps, resolve, training_arguments
from posttrain.training.resolve_context import row_tokens
from posttrain.training.resume import check_weights
from posttrain.training.token_scores import Scorer, chosen_statistics, write_bias
from posttrain.training.trainer import ObjectiveTrainer, TrainingData, use_callbacks
from posttrain.types import Stage, UserError

SOURCES = (
    "model_name_or_path", "tokenizer_name_or_path", "peft_path", "train_file_dir", "validation_file_dir", "dataset_name", "cache_dir",
)  # fmt: skip


def run(config: Config) -> None:
    """The flags, checked and completed, and the processes that they are for."""
    quiet_libraries()
    config = resolve(config)
    connect(config["use_cpu"], config["ddp_backend"], config["ddp_timeout"])
    args = training_arguments(config)
    load_whole(args)
    leave_at_exit()
    with lost_connection_told(config["ddp_timeout"], Path(config["output_dir"])):
        run_connected(config, args)


def run_connected(config: Config, args: TrainingArguments) -> None:
    """data → template → tokenize → pack → model + adapter → objective → trainer → artifacts."""
    folder = Path(config["output_dir"])
    checkpoint = agreed_checkpoint(folder, config["resume_from_checkpoint"])
    check_layout(checkpoint, args)
    resuming = artifacts.resumes(config["resume_from_checkpoint"])
    if args.should_save:  # the first process, or with --save_on_each_node that of each node
        sources = {f"--{name}": config[name] for name in SOURCES}
        artifacts.open_run_folder(folder, config["overwrite_output_dir"], resuming, sources)
    for unfinished in artifacts.cut_short(folder) if resuming else ():
        say(f"{folder / unfinished}: cut short before it was whole, passed over")
    say(f"posttrain {config.command}: settings that are not defaults\n{config.table()}")
    tokenizer = load_tokenizer(config["tokenizer_name_or_path"] or config["model_name_or_path"], **source(config))
    if config.command != "pt":
        say(f"template: {apply_template(tokenizer, config['template_name']).name}")
    train, held_out = prepare(config, args, tokenizer)
    report_data(config, train, held_out, tokenizer)
    set_seed(config["seed"])  # before anything is drawn: a new adapter starts from the seed
    model = build_model(config, tokenizer)
    check_weights(checkpoint, model)
    check_lengths(config, model, (train, held_out))
    parents = {"base": artifacts.parent(config["model_name_or_path"], resolve_model(config["model_name_or_path"]))}
    if config["peft_path"]:
        parents["adapter"] = artifacts.parent(config["peft_path"], config["peft_path"])
    trainer = build_trainer(config, args, model, (train, held_out), tokenizer, parents)
    start_over(folder, config["overwrite_output_dir"] and not resuming, args.should_save)
    if args.should_save:
        artifacts.write_run(folder, config.command, config.saved(), parents=parents, resumed_from=checkpoint)
        if isinstance(train, LoadedRows):
            write_ledger(folder, train, held_out)
    train_and_evaluate(config, trainer, folder, checkpoint)
    if args.should_save and isinstance(train, RowStream):
        write_ledger(folder, train, held_out)  # it grew while the stream was read
    say(f"run folder: {folder}")


def prepare(config: Config, args: TrainingArguments, tokenizer: Any) -> tuple[Any, LoadedRows | None]:
    """(training rows, held-out rows): loaded, or for a stream its place to read from. One rank of a node prepares, the others wait."""
    stage: Stage = config.command  # type: ignore[assignment]
    with args.main_process_first(desc="preparing data"):
        if stage == "pt" and config["streaming"]:
            held_out = rows.load_held_out(config, stage, tokenizer)
            seed = config["seed"] if config["data_seed"] is None else config["data_seed"]
            return rows.stream(
                config, stage, tokenizer, seed, config["shuffle_buffer_rows"],
                rank=args.process_index, world_size=args.world_size,
            ), held_out  # fmt: skip
        splits = rows.load(config, stage, tokenizer)
    return splits.train, splits.validation


def report_data(config: Config, train: Any, held_out: LoadedRows | None, tokenizer: Any) -> None:
    """The ledgers on the terminal and (but for plain text) the proof of the masks."""
    if isinstance(train, LoadedRows):
        train.ledger.assert_identity()
        say(train.ledger.summary())
        check_steps(config["max_steps"], len(train.dataset))
    if held_out is not None:
        held_out.ledger.assert_identity()
        say(held_out.ledger.summary("held out"))
    elif config.given("do_eval") and config["do_eval"]:
        raise UserError(f"--do_eval True needs held-out rows: {HELD_OUT_FLAGS}")
    if config.command == "sft":
        say(prove_masks(train.dataset, tokenizer, config["model_max_length"]))
    elif config.command in rows.PAIR_STAGES:
        say(prove_pairs(train.dataset, tokenizer, config["max_target_length"]))


def write_ledger(folder: Path, train: Any, held_out: LoadedRows | None) -> None:
    """`ledger.json`; that of a stream grows while it is read, so it is written (and only then shown) at the end."""
    if isinstance(train, RowStream):
        say(train.ledger.summary())
    ledgers = {"train": train.ledger} | ({"validation": held_out.ledger} if held_out is not None else {})
    content = {name: ledger.to_json() for name, ledger in ledgers.items()}
    (folder / "ledger.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_trainer(
    config: Config, args: TrainingArguments, model: Any, loaded: tuple[Any, LoadedRows | None], tokenizer: Any, parents: Any
) -> ObjectiveTrainer:
    """Rows grouped and collated as the model allows, and the trainer with our callbacks. `loaded`: training and held-out rows."""
    packed = prepare_forward(config, model, args)
    install_head(config, model)
    if config["fused"]:
        say(f"fused: {fuse(model, args.device.type)}")
    objective, collate = build_objective(config), collator(config, packed)
    if isinstance(objective, Preference) and objective.loss.needs_reference:
        weights = [*(parent["hash"] for parent in parents.values()), *filter(None, [quantization(config)])]
        made_of = (*weights, getattr(model.config, "_commit_hash", None), config["dtype"], rope_scaling(model.config))
        reference = ReferencePass(
            model, collate, packed, config["forward_tokens"], (*map(str, made_of), str(args.bf16)), config["cache_dir"],
            sys.stderr.isatty(),
        )  # fmt: skip
        loaded = tuple(None if rows is None else add_reference(rows, reference, args) for rows in loaded)  # type: ignore[assignment]
    train, held_out = loaded
    data = TrainingData(
        group_rows(config, train, packed),
        Groups(held_out.dataset) if held_out is not None else None,
        collate,
        config["forward_tokens"],
    )
    os.environ["TENSORBOARD_LOGGING_DIR"] = config["logging_dir"]  # where the library's callback looks
    shard(model, args)
    trainer = ObjectiveTrainer(model, args, data, objective, tokenizer)
    audit = [GradientAudit()] if config["audit"] else []
    # Not args.disable_tqdm, which is true whenever the library's log lines are off.
    bar = None if config["disable_tqdm"] is None else not config["disable_tqdm"]
    use_callbacks(trainer, [Progress(bar), MetricsFile(Path(args.output_dir)), *audit])
    return trainer


def add_reference(loaded: LoadedRows, reference: ReferencePass, args: TrainingArguments) -> LoadedRows:
    """The rows with the log-probs of the policy as it starts."""
    dataset, line = reference.add_columns(loaded.dataset, args)
    say(line)
    return dataclasses.replace(loaded, dataset=dataset)


def group_rows(config: Config, train: Any, packed: bool) -> Groups | PackedStream:
    """Which rows share a packed row: best fit for documents and with --packing, else each stands alone."""
    wanted = config.command == "pt" or (config.command == "sft" and config["packing"])
    capacity = row_tokens(config) if wanted and packed else None
    if wanted and not packed:
        say("packing is off: a padded batch holds one example a row")
    if isinstance(train, RowStream):
        return PackedStream(train, capacity)
    if capacity is None:
        return Groups(train.dataset)
    groups = best_fit([len(ids) for ids in train.dataset["input_ids"]], capacity)
    say(f"packed: {len(train.dataset):,} examples in {len(groups):,} rows of at most {capacity} tokens")
    return Groups(train.dataset, groups)


def train_and_evaluate(config: Config, trainer: ObjectiveTrainer, folder: Path, checkpoint: str | None) -> None:
    """Train, save, evaluate, and write what came out."""
    if config["do_train"]:
        if checkpoint:
            say(f"resuming from {checkpoint}: weights, optimizer, schedule, order of the data and random state")
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            artifacts.write_results(folder, "train", trainer.state.log_history[-1])
        if config.command == "rm":
            centre_scores(config, trainer, folder)
    if config["do_eval"] and trainer.data.held_out is not None:
        metrics = trainer.evaluated_now() or trainer.evaluate()
        if trainer.args.should_save:
            artifacts.write_results(folder, "eval", metrics)


def centre_scores(config: Config, trainer: ObjectiveTrainer, folder: Path) -> None:
    """`reward.json`: what PPO adds to the scores, so that the chosen answers of the training pairs have mean 0."""
    assert isinstance(trainer.data.train, Groups)
    packed = trainer.data.collate is not collate_pairs_padded
    scorer = Scorer(trainer.model, packed, trainer.args.per_device_eval_batch_size, config["forward_tokens"])
    found = chosen_statistics(scorer, trainer.data.train.rows)
    if trainer.args.should_save:
        write_bias(folder, found)
    say(
        f"scores of {found.rows:,} chosen answers: mean {found.mean:.3f}, standard deviation {found.std:.3f}; PPO takes the mean as 0"
    )
