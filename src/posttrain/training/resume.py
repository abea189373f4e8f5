"""Going on from a checkpoint: whether its weights are of the run's kind, and the learning rate where the run's length has changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR

from posttrain.model.adapter import is_reward_adapter, read_adapter_config
from posttrain.model.adapter_file import adapted_layers
from posttrain.model.policy_value import POLICY
from posttrain.types import UserError

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # written last: what marks a checkpoint as whole
SHOWN_CHARACTERS = 120


def check_weights(checkpoint: str | None, model: Any) -> None:
    """UserError where the checkpoint's weights are not of the kind that `model` trains: an adapter of other settings, or all weights.

    Settings by which the same tensors would mean something else count too (`--lora_alpha`); dropout does not.
    """
    if checkpoint is None:
        return
    folder, adapts, start = Path(checkpoint), isinstance(model, PeftModel), f"--resume_from_checkpoint {checkpoint}:"
    holds_adapter = (folder / "adapter_config.json").is_file()
    if holds_adapter and not adapts:
        raise UserError(
            f"{start} holds an adapter, and this run trains all weights: leave out --use_peft False, or merge the adapter (posttrain"
            " merge) and start a new run from what comes out"
        )
    if adapts and not holds_adapter and (folder / "config.json").is_file():
        raise UserError(
            f"{start} holds a whole model, and this run trains an adapter: give --use_peft False, or start a new run from its weights"
            f" with --model_name_or_path {checkpoint}"
        )
    if not (adapts and holds_adapter):
        return
    saved, here = read_adapter_config(checkpoint), model.peft_config[POLICY].to_dict()
    if is_reward_adapter(saved) != is_reward_adapter(here):
        kinds = ("a reward model", "a language model")
        there, own = kinds if is_reward_adapter(saved) else kinds[::-1]
        raise UserError(f"{start} holds an adapter of {there}, and this run trains {own}: name a checkpoint of this stage")
    before, now = _flags(saved), _flags(here)
    differing = [name for name in now if before[name] != now[name]]
    if "--target_modules" in differing and adapted_layers(checkpoint) == _layers(model):
        differing.remove("--target_modules")  # other words for the same layers
    if differing:
        told = [" ".join(f"{name} {_short(flags[name])}" for name in differing) for flags in (before, now)]
        raise UserError(
            f"{start} its adapter was trained with {told[0]}, this run has {told[1]}: give the flags that it was started with, or start"
            f" a new run from its weights with --peft_path {checkpoint}"
        )


def _flags(settings: Mapping[str, Any]) -> dict[str, str]:
    """Flag → its value, of the settings of an adapter that say what its tensors are and mean."""
    modules = (_names(settings, "target_modules", "target_parameters"), _names(settings, "modules_to_save"))
    return {
        "--lora_rank": str(settings["r"]),
        "--lora_alpha": f"{settings['lora_alpha']:g}",
        "--use_rslora": str(bool(settings.get("use_rslora"))),
        "--use_dora": str(bool(settings.get("use_dora"))),
        "--target_modules": modules[0],
        "--modules_to_save": modules[1],
    }


def _names(settings: Mapping[str, Any], *keys: str) -> str:
    found: set[str] = set()
    for key in keys:
        value = settings.get(key) or ()
        found |= {value} if isinstance(value, str) else set(value)
    return ",".join(sorted(found)) or "(none)"


def _short(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}…"


def _layers(model: PeftModel) -> set[str]:
    """Names of the layers that have matrices of the trained adapter."""
    return {name for name, module in model.named_modules() if POLICY in getattr(module, "lora_A", ())}


def follow_schedule(schedule: Any, checkpoint: str, n_steps: int) -> None:
    """Give the next step the rate of this run's schedule, and tell where its length is not that which the checkpoint's run had.

    What was loaded is the rate of that run's schedule: 0 where it had ended. Where nothing has changed it is the same number.
    `schedule`: with its state loaded; one that follows a metric is left alone. `n_steps`: as --max_steps counts.
    """
    if not isinstance(schedule, LambdaLR):
        return
    parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in parts:
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
    planned = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8")).get("max_steps")
    if planned not in (None, n_steps):
        logger.info(
            "schedule: the run that saved %s was planned for %d steps, this one is for %d: from here on the learning rate is that of a"
            " run of %d steps, but the steps before had theirs; for a run planned so from the start, start over",
            checkpoint, planned, n_steps, n_steps,
        )  # fmt: skip
