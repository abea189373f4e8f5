"""Flags of long rows and of noise: what the user left open, and what would do nothing."""

from __future__ import annotations

from posttrain.config import Config
from posttrain.types import UserError

SHIFT_SHARE = 4  # groups of a quarter of the row: the paper's choice


def row_tokens(config: Config, stage: str | None = None) -> int:
    """The longest row of a stage (the command's own, but for one that knows the flags of several): of a pair its prompt and one
    answer, of an episode prompt and answer."""
    stage = stage or config.command
    if stage in ("rm", "dpo", "ppo"):
        return int(config["max_source_length"] + config["max_target_length"])
    return int(config["block_size"] if stage == "pt" else config["model_max_length"])


def resolve_context(config: Config) -> Config:
    """Checked, with the groups of shifted attention filled in."""
    check_factor(config["rope_scaling"], config["rope_factor"])
    if config["neft_alpha"] < 0:
        raise UserError(f"--neft_alpha {config['neft_alpha']}: must be at least 0")
    return _resolve_shift(config) if "shift_attn" in config.values else config


def check_factor(kind: str | None, factor: float | None) -> None:
    """Raises UserError for a --rope_factor that would do nothing."""
    if factor is not None and not kind:
        raise UserError("--rope_factor does nothing without --rope_scaling")
    if factor is not None and factor <= 1:
        raise UserError(f"--rope_factor {factor}: must be above 1")


def _resolve_shift(config: Config) -> Config:
    group, longest = config["shift_group_tokens"], row_tokens(config)
    if not config["shift_attn"]:
        if group is not None:
            raise UserError("--shift_group_tokens does nothing without --shift_attn True")
        return config
    if not config["padding_free"]:
        raise UserError("--shift_attn True works on rows of segments: it needs --padding_free True")
    if group is None:
        group = max(2, longest // SHIFT_SHARE)
        config = config.replace("shift_group_tokens", group)
    if not 2 <= group < longest:
        raise UserError(f"--shift_group_tokens {group}: must be at least 2 and less than the longest row, {longest} tokens")
    return config
