"""PPO's flags: what the user left open is filled in, what contradicts itself is refused in one line."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from posttrain.config import Config
from posttrain.model.load import hardware_dtype
from posttrain.training.resolve import CPU_FORWARD_TOKENS, GPU_FORWARD_TOKENS, HELD_OUT_FLAGS
from posttrain.types import UserError

LEARNING_RATES = (1e-5, 1e-6)  # adapter, all weights
VALUE_FACTOR = 10.0  # the value head starts at zero and has far to go
AT_LEAST_ONE = (
    "rollout_batch_size", "num_generations", "mini_batch_size", "num_ppo_epochs", "max_target_length", "logging_steps", "lora_rank",
    "kl_horizon",
)  # fmt: skip
NOT_NEGATIVE = ("init_kl_coef", "missing_eos_penalty", "eval_steps", "save_steps", "weight_decay")
ADAPTER_FLAGS = ("peft_path", "use_dora", "use_rslora", "lora_rank", "lora_alpha", "target_modules")


def resolve_ppo(config: Config) -> Config:
    """Checked, with dtype, learning rates and sizes filled in."""
    _check_numbers(config)
    _check_sizes(config)
    _check_meaning(config)
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
    config = config.replace("bf16", half).replace("use_cpu", on_cpu)
    return config if config["logging_dir"] else config.replace("logging_dir", str(Path(config["output_dir"], "logs")))


def steps(config: Config, n_prompts: int) -> int:
    """Rollouts of the run."""
    if config["max_steps"] > 0:
        return int(config["max_steps"])
    if config["max_steps"] == 0:
        raise UserError("--max_steps 0 trains nothing")
    return max(1, math.ceil(config["num_train_epochs"] * n_prompts / config["rollout_batch_size"]))


def _check_numbers(config: Config) -> None:
    for name in AT_LEAST_ONE:
        if config[name] < 1:
            raise UserError(f"--{name} {config[name]}: must be at least 1")
    for name in NOT_NEGATIVE:
        if config[name] < 0:
            raise UserError(f"--{name} {config[name]}: must not be below 0")
    for name in ("gamma", "lam"):
        if not 0 <= config[name] <= 1:
            raise UserError(f"--{name} {config[name]}: must be in [0, 1]")
    if config["max_source_length"] < 2:
        raise UserError(f"--max_source_length {config['max_source_length']}: must be at least 2 tokens")
    if config["score_clip"] is not None and config["score_clip"] <= 0:
        raise UserError(f"--score_clip {config['score_clip']}: must be above 0")


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
    if config["lora_dropout"]:
        raise UserError("--lora_dropout: PPO compares log-probs of two passes, which dropout would make differ; leave it at 0")
    if config["modules_to_save"]:
        raise UserError("--modules_to_save: the roles of PPO share the base's weights, so none of them can be trained whole")
    for name in ADAPTER_FLAGS:
        if config.given(name) and config[name] and not config["use_peft"]:
            raise UserError(f"--{name} belongs to LoRA, but --use_peft is False")
    if config["reward_adapter"] and not config["use_peft"]:
        raise UserError(
            "--reward_adapter shares the policy's base, which --use_peft False trains: merge it, then --reward_model_name_or_path"
        )
    if config.given("target_kl") and not config["early_stopping"]:
        raise UserError("--target_kl does nothing without --early_stopping True")
    for name in ("kl_horizon",):
        if config.given(name) and not config["adap_kl_ctrl"]:
            raise UserError(f"--{name} does nothing without --adap_kl_ctrl True")
    if config["kl_loss_coef"] and not config["init_kl_coef"]:
        raise UserError("--kl_loss_coef needs the reference, which --init_kl_coef 0 leaves out")
    held_out = config["validation_file_dir"] or config["validation_split_percentage"] or config["dataset_name"]
    if config["eval_steps"] and not held_out:
        raise UserError(f"--eval_steps needs held-out prompts: {HELD_OUT_FLAGS}")
