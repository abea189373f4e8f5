"""`posttrain ppo`: from flags to a policy that scores higher, and the run folder that says how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from transformers import get_scheduler, set_seed

from posttrain import flags
from posttrain.commands import rows
from posttrain.commands.build import source
from posttrain.commands.lengths import check_lengths, longest_row
from posttrain.commands.ppo_actors import Actors, build_actors
from posttrain.commands.ppo_report import Reporter
from posttrain.commands.report import quiet_libraries, say
from posttrain.config import Config
from posttrain.data.load import Splits
from posttrain.data.template import apply_template, stop_token_ids
from posttrain.model.embedded import resolve_model
from posttrain.model.load import load_tokenizer
from posttrain.model.policy_value import POLICY, VALUE, PolicyAndValue, Role, active
from posttrain.model.role_adapters import is_of_adapter
from posttrain.objectives.guards import Guards, GuardSettings
from posttrain.objectives.kl import AdaptiveKl, FixedKl, KlController
from posttrain.objectives.ppo import PpoLoss, PpoSettings
from posttrain.training import artifacts
from posttrain.training.audit import Audit
from posttrain.training.engine_setup import read_settings
from posttrain.training.engines import RolloutEngine, TorchEngine, VllmEngine
from posttrain.training.episodes import Episode
from posttrain.training.job import agreed_checkpoint, connect, leave_at_exit, lost_connection_told, start_over
from posttrain.training.ppo import Loop, Plan, train
from posttrain.training.ppo_rollout import RewardShape
from posttrain.training.ppo_state import load_checkpoint, save_policy, save_value, whole
from posttrain.training.resolve import HELD_OUT_FLAGS
from posttrain.training.resolve_ppo import in_turn, resolve_ppo, steps
from posttrain.training.rollout import Sampling
from posttrain.training.sharding import DeepSpeed, Engine, FullyShard, Replicated
from posttrain.types import UserError

SOURCES = (
    "model_name_or_path", "tokenizer_name_or_path", "peft_path", "train_file_dir", "validation_file_dir", "dataset_name",
    "reward_adapter", "reward_model_name_or_path", "cache_dir",
)  # fmt: skip
ROLLOUT_ROWS = 64  # answers decoded at once


def run(config: Config) -> None:
    """The flags, checked and completed, and the processes that they are for."""
    quiet_libraries()
    config = resolve_ppo(config)
    # As the library's own settings do: a stage before it may have left one.
    AcceleratorState._reset_state(reset_partial_state=True)
    connect(config["use_cpu"], None, config["ddp_timeout"])
    accelerator = Accelerator(
        cpu=config["use_cpu"], log_with=_trackers(config),
        project_dir=config["logging_dir"],
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config["ddp_timeout"]))],
    )  # fmt: skip
    leave_at_exit()
    with lost_connection_told(config["ddp_timeout"], Path(config["output_dir"])):
        run_connected(config, accelerator)


def run_connected(config: Config, accelerator: Accelerator) -> None:
    """prompts → policy, value, reference, reward → the loop → artifacts."""
    folder = Path(config["output_dir"])
    checkpoint = agreed_checkpoint(folder, config["resume_from_checkpoint"])
    resuming = artifacts.resumes(config["resume_from_checkpoint"])
    if accelerator.is_main_process:
        named = {f"--{name}": config[name] for name in SOURCES}
        artifacts.open_run_folder(folder, config["overwrite_output_dir"], resuming, named)
    say(f"posttrain ppo: settings that are not defaults\n{config.table()}")
    tokenizer = load_tokenizer(config["tokenizer_name_or_path"] or config["model_name_or_path"], **source(config))
    say(f"template: {apply_template(tokenizer, config['template_name']).name}")
    prompts = load_prompts(config, accelerator, tokenizer)
    set_seed(config["seed"])  # before anything is drawn: new adapters start from the seed
    actors = build_actors(config, tokenizer, accelerator.device, accelerator.num_processes)
    answer_tokens = config["max_target_length"]
    check_lengths(config, actors.trained.policy_model, (prompts.train, prompts.validation), answer_tokens=answer_tokens)
    reporter = Reporter(folder, accelerator, config["save_total_limit"], tokenizer)
    loop = build_loop(config, accelerator, actors, prompts, tokenizer, reporter)
    start_over(folder, config["overwrite_output_dir"] and not resuming, accelerator.is_main_process)
    if accelerator.is_main_process:
        parents = {name: artifacts.parent(config[flag], _local(config[flag])) for name, flag in PARENTS.items() if config[flag]}
        artifacts.write_run(folder, "ppo", config.saved(), parents=parents, resumed_from=checkpoint)
        ledgers = {"train": prompts.train.ledger} | ({"validation": prompts.validation.ledger} if prompts.validation else {})
        text = json.dumps({name: ledger.to_json() for name, ledger in ledgers.items()}, indent=2, ensure_ascii=False)
        (folder / "ledger.json").write_text(f"{text}\n", encoding="utf-8")
    if checkpoint:
        load_checkpoint(loop, checkpoint)
        say(
            f"resuming from {checkpoint}: policy, value, optimizer, schedule and KL weight; samples and order follow from the step"
        )
    reporter.begin(loop.step)
    finish(loop, train(loop), folder, tokenizer)
    reporter.results()


PARENTS = {
    "base": "model_name_or_path", "adapter": "peft_path", "reward_adapter": "reward_adapter",
    "reward_model": "reward_model_name_or_path",
}  # fmt: skip


def _local(name: str) -> str:
    return name if Path(name).is_dir() else resolve_model(name)


def _trackers(config: Config) -> list[str] | None:
    return None if config["report_to"] == "none" else [config["report_to"]]


def load_prompts(config: Config, accelerator: Accelerator, tokenizer: Any) -> Splits:
    """Training and held-out prompts. One process of a node prepares, the others wait."""
    with accelerator.local_main_process_first():
        splits = rows.load(config, "ppo", tokenizer)
    for loaded, name in ((splits.train, "trained"), (splits.validation, "held out")):
        if loaded is not None:
            loaded.ledger.assert_identity()
            say(loaded.ledger.summary(name))
    if splits.validation is not None and len(splits.validation.dataset) < accelerator.num_processes:
        raise UserError(f"{len(splits.validation.dataset)} held-out prompts for {accelerator.num_processes} processes: give more")
    return splits


def build_loop(
    config: Config, accelerator: Accelerator, actors: Actors, prompts: Splits, tokenizer: Any, reporter: Reporter
) -> Loop:
    """The loop with its numbers, optimizer and schedule."""
    chosen = config.group(flags.PpoFlags)
    if chosen.rollout_batch_size % accelerator.num_processes or (
        chosen.mini_batch_size // chosen.num_generations % accelerator.num_processes
    ):
        raise UserError(
            f"--rollout_batch_size {chosen.rollout_batch_size} and the prompts of --mini_batch_size {chosen.mini_batch_size} must be"
            f" multiples of the {accelerator.num_processes} processes"
        )
    if config["eval_steps"] and prompts.validation is None:
        raise UserError(f"--eval_steps needs held-out prompts: {HELD_OUT_FLAGS}")
    plan = Plan(
        steps(config, len(prompts.train.dataset)), chosen.rollout_batch_size, chosen.mini_batch_size, chosen.num_ppo_epochs,
        config["seed"], config["logging_steps"], config["save_steps"], config["eval_steps"],
        chosen.target_kl if chosen.early_stopping else None,
    )  # fmt: skip
    engine = shard(config, accelerator, actors.trained)
    schedule = build_schedule(config, engine.optimizer, plan.optimizer_steps(chosen.num_generations))
    settings = PpoSettings(
        chosen.cliprange, chosen.dual_clip, chosen.cliprange_value, chosen.vf_coef, chosen.entropy_coef, chosen.kl_loss_coef,
        chosen.temperature,
    )  # fmt: skip
    shape = RewardShape(
        chosen.gamma, chosen.lam, chosen.missing_eos_penalty, chosen.reward_baseline, chosen.score_clip, chosen.whiten_rewards,
        chosen.whiten_advantages,
    )  # fmt: skip
    sampling = Sampling(
        config["max_target_length"], tuple(stop_token_ids(tokenizer)), tokenizer.pad_token_id, chosen.temperature,
        num_generations=chosen.num_generations, batch_rows=ROLLOUT_ROWS,
    )  # fmt: skip
    kl: KlController = FixedKl(chosen.init_kl_coef)
    if chosen.adap_kl_ctrl:
        kl = AdaptiveKl(chosen.init_kl_coef, chosen.kl_target, chosen.kl_horizon)
    guards = Guards(GuardSettings(kl_target_nats=chosen.kl_target)) if chosen.guards else None
    audit = Audit(least_gradient=config["adam_epsilon"]) if config["audit"] else None
    held_out = prompts.validation.dataset if prompts.validation is not None else None
    return Loop(
        accelerator, actors.trained, engine, actors.reference, schedule, prompts.train.dataset, held_out,
        partial(answer, build_engine(config, actors.trained), actors.trained.policy, tokenizer), actors.score, sampling, actors.cutter, PpoLoss(settings), shape,
        kl, guards, plan, reporter.log, reporter.save, audit, say, config["bf16"],
        in_turn(config, accelerator.num_processes),
    )  # fmt: skip


def shard(config: Config, accelerator: Accelerator, trained: PolicyAndValue) -> Engine:
    """The trained module as its processes hold it, with its optimizer."""
    parts = (accelerator, trained, partial(build_optimizer, config, trained), config["max_grad_norm"])
    if config["deepspeed"]:
        return DeepSpeed(*parts, read_settings(config["deepspeed"]))
    return FullyShard(*parts) if config["fsdp"] else Replicated(*parts)


def build_engine(config: Config, trained: PolicyAndValue) -> RolloutEngine:
    """What samples the answers."""
    if config["rollout_engine"] == "torch":
        return TorchEngine(trained.policy_model)
    return VllmEngine(
        trained.policy_model, POLICY, resolve_model(config["model_name_or_path"]),
        longest_row(config, trained.policy_model), trust_remote_code=config["trust_remote_code"],
    )  # fmt: skip


def build_optimizer(config: Config, trained: PolicyAndValue) -> torch.optim.Optimizer:
    """AdamW over policy and value, each with a learning rate of its own."""
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            of_value = name.startswith(("value_head.", "value_model.")) or is_of_adapter(name, VALUE)
            groups[of_value].append(parameter)
    rates = {False: config["learning_rate"], True: config["value_learning_rate"]}
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rates[of_value]} for of_value, parameters in groups.items()],
        betas=(config["adam_beta1"], config["adam_beta2"]), eps=config["adam_epsilon"], weight_decay=config["weight_decay"],
    )  # fmt: skip


NEED_METRICS = ("reduce_lr_on_plateau", "greedy")


def build_schedule(config: Config, optimizer: Any, n_steps: int) -> Any:
    """Of transformers, by its names."""
    if config["lr_scheduler_type"] in NEED_METRICS:
        raise UserError(f"--lr_scheduler_type {config['lr_scheduler_type']}: follows a metric of held-out rows; take another")
    warmup = config["warmup_steps"]
    try:
        return get_scheduler(
            config["lr_scheduler_type"], optimizer, int(warmup if warmup >= 1 else warmup * n_steps), num_training_steps=n_steps
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"--lr_scheduler_type {config['lr_scheduler_type']}: {' '.join(str(error).split())}") from error


def answer(
    engine: RolloutEngine, policy: Role, tokenizer: Any, prompts: Sequence[dict[str, Any]], sampling: Sampling, seed: int,
    numbers: Sequence[int],
) -> list[Episode]:  # fmt: skip
    """Sample answers of the policy to rows of prompts."""
    ids = [list(row["prompt_ids"]) for row in prompts]
    with active(policy):  # whatever layers a backward pass computed last
        engine.sync()
        responses = engine.generate(ids, sampling, seed, numbers)
    k = sampling.num_generations
    episodes = []
    for index, response in enumerate(responses):
        row = prompts[index // k]
        said = response.ids[:-1] if response.stopped else response.ids
        text = tokenizer.decode(said, skip_special_tokens=True)
        episodes.append(
            Episode(row["source"], json.loads(row["messages"]), json.loads(row["tools"]), ids[index // k], response.ids, text,
                    response.stopped, json.loads(row["columns"]))
        )  # fmt: skip
    return episodes


def finish(loop: Loop, objection: str | None, folder: Path, tokenizer: Any) -> None:
    """Save the policy and its value; a run that a guard ended keeps its last checkpoint and says so."""
    if loop.accelerator.log_with:
        loop.accelerator.end_training()
    if objection:
        kept = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        last = (
            f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint to go back to: --save_steps makes some"
        )
        raise UserError(f"{objection}; {last}")
    trainable = whole(loop)
    if loop.accelerator.is_main_process:
        save_policy(loop.trained, trainable, folder)
        save_value(trainable, folder / "value")
        tokenizer.save_pretrained(folder)
    loop.accelerator.wait_for_everyone()
    say(f"run folder: {folder}")
