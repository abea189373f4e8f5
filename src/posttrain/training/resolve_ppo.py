"""PPO's flags: what the user left open is filled in, what contradicts itself is refused in one line."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from posttrain.config import Config
from posttrain.model.load import hardware_dtype
from posttrain.training.engine_setup import check_engines
from posttrain.training.resolve import CPU_FORWARD_TOKENS, GPU_FORWARD_TOKENS, HELD_OUT_FLAGS, check_reporting, check_sources
from posttrain.training.resolve_quantized import resolve_quantized
from posttrain.types import UserError

logger = logging.getLogger(__name__)

LEARNING_RATES = (1e-5, 1e-6)  # adapter, all weights
VALUE_FACTOR = 10.0  # the value head starts at zero and has far to go
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("rollout_batch_size", "num_generations", "mini_batch_size", "num_ppo_epochs", "max_target_length", "logging_steps",
         "save_total_limit", "lora_rank", "kl_horizon", "ddp_timeout"), lambda x: x >= 1, "at least 1",
    ),
    (
        ("init_kl_coef", "missing_eos_penalty", "eval_steps", "save_steps", "weight_decay", "warmup_steps", "max_grad_norm", "seed"),
        lambda x: x >= 0, "at least 0",
    ),
    (
        ("learning_rate", "value_learning_rate", "adam_epsilon", "num_train_epochs", "kl_target", "target_kl", "score_clip", "temperature"),
        lambda x: x > 0, "above 0",
    ),
    (("gamma", "lam"), lambda x: 0 <= x <= 1, "in [0, 1]"),
    (("adam_beta1", "adam_beta2"), lambda x: 0 <= x < 1, "in [0, 1)"),
    (("max_source_length",), lambda x: x >= 2, "at least 2 tokens"),
    (("value_layers",), lambda x: x >= 0, "a number of layers, or 0: all"),
)  # fmt: skip
ADAPTER_FLAGS = ("peft_path", "use_dora", "use_rslora", "lora_rank", "lora_alpha", "target_modules")


MEASURE_FACTOR = 4  # a pass without gradients keeps the activations of one layer: it can be so many times as long


def in_turn(config: Config, world: int) -> bool:
    """Whether the passes of a policy and of a value with layers of its own follow one another, each with its backward pass. Where
    processes exchange gradients, both are computed side by side: every exchange sees the whole module."""
    return config["value_sharing"] == "adapter" and world == 1 and not config["fsdp"] and not config["deepspeed"]


def pass_tokens(config: Config, world: int) -> int:
    """Most tokens of a micro-batch (0: no limit): a policy and a value side by side halve it."""
    tokens: int = config["forward_tokens"]
    beside = config["value_sharing"] == "adapter" and not in_turn(config, world)
    return max(1, tokens // 2) if tokens > 0 and beside else tokens


def measure_tokens(config: Config) -> int:
    """The same of a pass without gradients."""
    return int(config["forward_tokens"]) * (1 if config["gradient_checkpointing"] else MEASURE_FACTOR)


def resolve_ppo(config: Config) -> Config:
    """Checked, with dtype, learning rates and sizes filled in."""
    _check_numbers(config)
    config = _fit_mini_batch(config)
    _check_sizes(config)
    check_sources(config, _idle(config))
    _check_meaning(config)
    _check_engine(config)
    config = resolve_quantized(config)
    check_reporting([config["report_to"]])
    on_cpu = config["use_cpu"] or not torch.accelerator.is_available()
    native = torch.bfloat16 if on_cpu and torch.cpu._is_avx512_bf16_supported() else hardware_dtype()
    half = native is torch.bfloat16 if config["bf16"] is None else config["bf16"]
    if config["bf16"] is None and config["dtype"] == "float32":
        half = False
    if config["dtype"] == "auto":
        config = config.replace("dtype", "bfloat16" if half and config["use_peft"] else "float32")
    if config["forward_tokens"] < 0:
        config = config.replace("forward_tokens", CPU_FORWARD_TOKENS if on_cpu else GPU_FORWARD_TOKENS)
    if config["learning_rate"] is None:
        config = config.replace("learning_rate", LEARNING_RATES[0 if config["use_peft"] else 1])
    if config["value_learning_rate"] is None:
        config = config.replace("value_learning_rate", VALUE_FACTOR * config["learning_rate"])
    if config["lora_dropout"]:
        logger.warning(
            "note: --lora_dropout %s is 0 in ppo: dropout would make the log-probs of two passes differ", config["lora_dropout"]
        )
        config = config.replace("lora_dropout", 0.0)
    config = config.replace("bf16", half).replace("use_cpu", on_cpu)
    return config if config["logging_dir"] else config.replace("logging_dir", str(Path(config["output_dir"], "logs")))


def _check_engine(config: Config) -> None:
    """Sharding: what it needs, and what cannot be sharded."""
    check_engines(config["deepspeed"], config["fsdp"])
    for flag in ("deepspeed", "fsdp"):
        if config[flag] and (config["load_in_4bit"] or config["load_in_8bit"]):
            raise UserError(
                f"--{flag}: a quantised base stays whole on every process: leave --{flag} out, only adapters are exchanged"
            )
        if config[flag] and config["rollout_engine"] == "vllm":
            raise UserError(f"--{flag}: vLLM is handed whole adapters only: use --rollout_engine torch, or leave --{flag} out")


def steps(config: Config, n_prompts: int) -> int:
    """Rollouts of the run."""
    if config["max_steps"] > 0:
        return int(config["max_steps"])
    if config["max_steps"] == 0:
        raise UserError("--max_steps 0 trains nothing")
    return max(1, math.ceil(config["num_train_epochs"] * n_prompts / config["rollout_batch_size"]))


def _check_numbers(config: Config) -> None:
    for name in config.values:
        if isinstance(config[name], float) and not math.isfinite(config[name]):
            raise UserError(f"--{name} {config[name]}: must be a finite number")
    if config["max_steps"] < -1:
        raise UserError(
            f"--max_steps {config['max_steps']}: must be a number of rollouts, or -1: as many as --num_train_epochs has"
        )
    for names, fits, said in RANGES:
        for name in names:
            if config[name] is not None and not fits(config[name]):
                raise UserError(f"--{name} {config[name]}: must be {said}")


def _fit_mini_batch(config: Config) -> Config:
    """An open --mini_batch_size becomes the largest share of a rollout that is not above its default."""
    answers = config["num_generations"]
    episodes = config["rollout_batch_size"] * answers
    if config.given("mini_batch_size") or episodes % config["mini_batch_size"] == config["mini_batch_size"] % answers == 0:
        return config
    fitting = [n for n in range(answers, max(answers, config["mini_batch_size"]) + 1, answers) if episodes % n == 0]
    return config.replace("mini_batch_size", fitting[-1])


def _check_sizes(config: Config) -> None:
    episodes = config["rollout_batch_size"] * config["num_generations"]
    if config["mini_batch_size"] % config["num_generations"]:
        raise UserError(
            f"--mini_batch_size {config['mini_batch_size']}: must be a multiple of --num_generations {config['num_generations']}:"
            " the answers to a prompt stay together"
        )
    if episodes % config["mini_batch_size"]:
        raise UserError(
            f"--mini_batch_size {config['mini_batch_size']}: must divide the {episodes} episodes of a rollout"
            " (--rollout_batch_size × --num_generations)"
        )


def _check_meaning(config: Config) -> None:
    """Flags that would do nothing, or harm."""
    if config["modules_to_save"]:
        raise UserError("--modules_to_save: the roles of PPO share the base's weights, so none of them can be trained whole")
    for name in ADAPTER_FLAGS:
        if config.given(name) and config[name] and not config["use_peft"]:
            raise UserError(f"--{name} belongs to LoRA, but --use_peft is False")
    if config["reward_adapter"] and not config["use_peft"]:
        raise UserError(
            "--reward_adapter shares the policy's base, which --use_peft False trains: merge it, then --reward_model_name_or_path"
        )
    if config["kl_loss_coef"] and not config["init_kl_coef"]:
        raise UserError("--kl_loss_coef needs the reference, which --init_kl_coef 0 leaves out")
    if config["adap_kl_ctrl"] and not config["init_kl_coef"]:
        raise UserError("--adap_kl_ctrl scales β, which --init_kl_coef 0 keeps at 0: start above it")


def _idle(config: Config) -> dict[str, str | bool]:
    """What a flag does nothing without; False where it acts."""
    held_out = config["validation_file_dir"] or config["validation_split_percentage"] or config["dataset_name"]
    measured = config["init_kl_coef"] > 0 and (config["adap_kl_ctrl"] or config["guards"])
    return {
        "target_kl": not config["early_stopping"] and "--early_stopping True",
        "kl_horizon": not config["adap_kl_ctrl"] and "--adap_kl_ctrl True",
        "kl_target": not measured and "--init_kl_coef above 0, and --adap_kl_ctrl True or --guards True",
        "value_layers": config["value_sharing"] == "trunk" and "--value_sharing adapter",
        "reward_batch_size": not config["reward_model_name_or_path"] and "--reward_model_name_or_path",
        "save_total_limit": not config["save_steps"] and "--save_steps",
        "eval_steps": config["eval_steps"] > 0 and not held_out and f"held-out prompts: {HELD_OUT_FLAGS}",
    }
