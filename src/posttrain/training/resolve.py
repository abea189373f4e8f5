"""The one place where values are worked out from other values and from the hardware, and contradictions are refused."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import trainer_log_levels

from posttrain import hf_flags
from posttrain.config import Config
from posttrain.model.load import hardware_dtype
from posttrain.objectives.dpo import DpoLoss
from posttrain.training.engine_setup import check_engines, engine_arguments
from posttrain.training.resolve_context import resolve_context
from posttrain.training.resolve_quantized import resolve_optimizer, resolve_quantized
from posttrain.types import UserError

# (adapter, all weights). A preference loss has its best policy close by; likelihoods do not.
LEARNING_RATES: dict[str, tuple[float, float]] = {
    "pt": (2e-4, 2e-5),
    "sft": (2e-4, 2e-5),
    "rm": (1e-4, 1e-5),
    "dpo": (2e-5, 1e-6),
}
CPU_FORWARD_TOKENS = 1024  # where matrix products have reached their full speed on a few cores
GPU_FORWARD_TOKENS = 16384


AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_rank")
CHECKPOINT_KEYS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")  # of torch's checkpoint()
NEED_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
LOWER_IS_BETTER = ("loss", "nll_nats", "perplexity", "nll_chosen_nats", "calibration_error", "kl_nats")
HELD_OUT_FLAGS = "--validation_file_dir or --validation_split_percentage"


def resolve(config: Config) -> Config:
    """Fill in what the user left open. Each value it sets shows up as `derived`."""
    on_cpu = config["use_cpu"] or not torch.accelerator.is_available()
    _check_numbers(config)
    _check_data(config)
    _check_adapter(config)
    _check_library(config, on_cpu)
    config = resolve_optimizer(resolve_quantized(config), on_cpu)
    config = resolve_context(config)
    if config.command == "dpo":
        config = _resolve_dpo(config)
    if config.command == "rm" and config["center_rewards_coefficient"] < 0:
        raise UserError(f"--center_rewards_coefficient {config['center_rewards_coefficient']}: must be at least 0")
    native = torch.bfloat16 if on_cpu and torch.cpu._is_avx512_bf16_supported() else hardware_dtype()
    half = native is torch.bfloat16 and not config["fp16"]
    if config.given("dtype") and config["dtype"] != "auto":
        half = half and config["dtype"] != "float32"
    if config.given("bf16"):
        half = config["bf16"]
    if config["dtype"] == "auto":
        # A frozen base loses nothing it still needs in bf16; weights that are trained keep fp32, or small updates vanish.
        frozen_half = half and config["use_peft"]
        config = config.replace("dtype", "bfloat16" if frozen_half else "float32")
    stage = config.command
    if config["forward_tokens"] < 0:
        config = config.replace("forward_tokens", CPU_FORWARD_TOKENS if on_cpu else GPU_FORWARD_TOKENS)
    if (config["metric_for_best_model"] or "").endswith(LOWER_IS_BETTER):  # the library knows it of names in -loss only
        config = config.derive(greater_is_better=False)
    strategies = {f"{what}_strategy": "steps" for what in ("save", "eval") if config.given(f"{what}_steps")}
    return config.derive(
        use_cpu=on_cpu,
        bf16=half,
        learning_rate=LEARNING_RATES[stage][0 if config["use_peft"] else 1],
        output_dir=str(Path("outputs", stage)),
        **strategies,
    ).derive(logging_dir=config["logging_dir"] or str(Path(config["output_dir"] or Path("outputs", stage), "logs")))


def _resolve_dpo(config: Config) -> Config:
    """Fill in beta; refuse what the loss would not use."""
    loss = DpoLoss(config["loss_type"])
    if config["beta"] is None:
        config = config.replace("beta", loss.default_beta)
    if config["beta"] <= 0:
        raise UserError(f"--beta {config['beta']}: must be greater than 0")
    if not 0 <= config["label_smoothing"] < 0.5:
        raise UserError(f"--label_smoothing {config['label_smoothing']}: must be in [0, 0.5)")
    if config["label_smoothing"] and not loss.takes_smoothing:
        takers = ", ".join(other.value for other in DpoLoss if other.takes_smoothing)
        raise UserError(f"--label_smoothing does nothing with --loss_type {loss.value}: it is for {takers}")
    if config["sft_weight"] < 0:
        raise UserError(f"--sft_weight {config['sft_weight']}: must be at least 0")
    if config.given("simpo_gamma") and loss is not DpoLoss.SIMPO:
        raise UserError("--simpo_gamma does nothing without --loss_type simpo")
    return config


def _check_numbers(config: Config) -> None:
    for name in AT_LEAST_ONE:
        if config[name] < 1:
            raise UserError(f"--{name} {config[name]}: must be at least 1")
    if config["num_train_epochs"] <= 0:
        raise UserError(f"--num_train_epochs {config['num_train_epochs']}: must be greater than 0")
    if not 0 <= config["lora_dropout"] < 1:
        raise UserError(f"--lora_dropout {config['lora_dropout']}: must be in [0, 1)")
    for name in ("block_size", "model_max_length", "max_source_length", "max_target_length"):
        if name in config.values and config[name] < 2:
            raise UserError(f"--{name} {config[name]}: must be at least 2 tokens")


def check_sources(config: Config, idle: Mapping[str, str | bool] | None = None) -> None:
    """Raises UserError for sources that contradict each other. `idle`: flag → what it does nothing without, or False."""
    if config["train_file_dir"] and config["dataset_name"]:
        raise UserError("--train_file_dir and --dataset_name both name the training data: give one")
    if not (config["train_file_dir"] or config["dataset_name"]):
        raise UserError(f"posttrain {config.command} needs training data: --train_file_dir or --dataset_name")
    if config["validation_file_dir"] and config["validation_split_percentage"]:
        raise UserError("--validation_file_dir and --validation_split_percentage both name the held-out rows: give one")
    if not 0 <= config["validation_split_percentage"] < 100:
        raise UserError(f"--validation_split_percentage {config['validation_split_percentage']}: must be in [0, 100)")
    held_out = config["validation_file_dir"] or config["validation_split_percentage"] or config["dataset_name"]
    needs: dict[str, str | bool] = {
        "dataset_config_name": not config["dataset_name"] and "--dataset_name",
        "dataset_weights": not config["train_file_dir"] and "several datasets in --train_file_dir",
        "max_eval_samples": not held_out and HELD_OUT_FLAGS,
        **(idle or {}),
    }
    for name, needed in needs.items():
        if needed and config.given(name):
            raise UserError(f"--{name} does nothing without {needed}")


def _check_data(config: Config) -> None:
    stage = config.command
    check_sources(
        config,
        {
            "shuffle_buffer_rows": stage == "pt" and not config["streaming"] and "--streaming True",
            "prefix_sharing": stage in ("rm", "dpo") and not config["padding_free"] and "--padding_free True",
        },
    )
    workers = config["dataloader_num_workers"]
    if workers < 0:
        raise UserError(f"--dataloader_num_workers {workers}: must be at least 0")
    for name in NEED_WORKERS:
        if config[name] and not workers:
            raise UserError(f"--{name} is about loader processes: it needs --dataloader_num_workers of at least 1")
    how, known = config["dataloader_multiprocessing_context"], multiprocessing.get_all_start_methods()
    if how and how not in known:
        raise UserError(f"--dataloader_multiprocessing_context {how}: expected one of {', '.join(known)}")
    if stage == "pt" and config["streaming"]:
        _check_stream(config)


def _check_stream(config: Config) -> None:
    if config["max_steps"] < 1:
        raise UserError("--streaming does not know how many rows there are: say --max_steps")
    if config["validation_split_percentage"]:
        raise UserError("--streaming cannot hold out a share of rows it has not read: name --validation_file_dir")
    if config["dataloader_num_workers"]:
        raise UserError(
            "--streaming reads in the training process, so that it can go on at the same row: --dataloader_num_workers 0"
        )


def _check_adapter(config: Config) -> None:
    for name in (
        "peft_path",
        "modules_to_save",
        "use_dora",
        "use_rslora",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
    ):
        if config.given(name) and config[name] and not config["use_peft"]:
            raise UserError(f"--{name} belongs to LoRA, but --use_peft is False")
    if config["fp16"] and not config["use_peft"]:
        raise UserError("--fp16 cannot train all weights: small gradients vanish in it; use --bf16, or --use_peft True")
    if config["bf16"] and config["fp16"]:
        raise UserError("--bf16 and --fp16 exclude each other")


def _check_library(config: Config, on_cpu: bool) -> None:
    """What the library would answer with a traceback, late, or not at all."""
    if config["fp16"] and on_cpu:
        raise UserError("--fp16 needs a GPU: on a CPU use --bf16")
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
        if isinstance(config[name], str):
            raise UserError(f"--{name} {config[name]!r}: expected a JSON object")
    unknown = sorted({*map(str, config["gradient_checkpointing_kwargs"] or {})} - {*CHECKPOINT_KEYS})
    if unknown:
        raise UserError(f"--gradient_checkpointing_kwargs {unknown[0]}: expected one of {', '.join(CHECKPOINT_KEYS)}")
    for name in ("log_level", "log_level_replica"):
        if config[name] not in trainer_log_levels:
            raise UserError(f"--{name} {config[name]}: expected one of {', '.join(trainer_log_levels)}")
    check_engines(config["deepspeed"], config["fsdp"])
    check_reporting(config["report_to"])


def check_reporting(names: Sequence[str]) -> None:
    """Raises UserError where a place for metrics is not known or its package not installed."""
    wanted = {*names} - {"none", "all", "tensorboard", "flyte"}
    missing = wanted - {*get_available_reporting_integrations()} if wanted else set()
    if missing:
        raise UserError(f"--report_to {min(missing)}: not known or not installed")


def training_arguments(config: Config) -> TrainingArguments:
    """The library's own settings object. UserError for a combination that it refuses."""
    accepted = set(inspect.signature(TrainingArguments).parameters)
    # Every trainable parameter takes part in every step (the gradient audit checks it), so DDP need not search for idle ones.
    chosen: dict[str, Any] = {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
    }
    for name in hf_flags.library_flags():
        if name in config.values and (config.values[name].origin != "default" or name in hf_flags.DEFAULTS):
            chosen[name] = config[name]
    for old, new in (("gradient_checkpointing", "activation_checkpointing"),
                     ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")):  # fmt: skip
        if new in accepted and old in chosen:  # transformers 5.23 renamed them
            chosen[new] = chosen.pop(old)
    chosen.pop("resume_from_checkpoint", None)
    chosen |= engine_arguments(config["deepspeed"], config["fsdp"], config["use_cpu"], config["ddp_timeout"])
    if isinstance(chosen.get("debug"), list):
        chosen["debug"] = " ".join(chosen["debug"])
    if chosen.get("optim_target_modules") == ["all-linear"]:  # a word of the library's, not a name
        chosen["optim_target_modules"] = "all-linear"
    try:
        return TrainingArguments(**chosen)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"transformers.TrainingArguments: {' '.join(str(error).split())}") from error


def check_steps(max_steps: int, n_rows: int) -> None:
    """UserError when there is nothing to train."""
    if n_rows == 0:
        raise UserError("no row is left to train on: see the ledger above for what was dropped and why")
    if max_steps == 0:
        raise UserError("--max_steps 0 trains nothing")
