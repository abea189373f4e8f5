"""From flags to the sources of PPO's scores, and whether a reward adapter belongs to the policy's base."""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.flags import ModelFlags, RewardSourceFlags
from posttrain.model.adapter import FINGERPRINT, base_fingerprint, check_rope, is_reward_adapter, read_adapter_config
from posttrain.model.attention import enable_segments
from posttrain.model.embedded import resolve_model
from posttrain.model.fused import fuse
from posttrain.model.load import check_vocabulary, read_config, stores_score_head
from posttrain.model.reward import install_scores, load_reward_model
from posttrain.training.artifacts import RUN_FILE
from posttrain.training.episodes import Wanted
from posttrain.training.reward_foreign import (
    ForeignReward,
    load_classifier,
    load_text_tokenizer,
    longest_input_tokens,
    padding_id,
)
from posttrain.training.reward_functions import FunctionReward, load_function, wanted
from posttrain.training.rewards import RewardSource, TokenReward, Weighted
from posttrain.training.token_scores import BIAS_FILE, Scorer, read_bias
from posttrain.types import UserError

logger = logging.getLogger(__name__)

MODEL = "reward_model"  # what its scores are called


def build_reward_sources(
    chosen: RewardSourceFlags,
    how: ModelFlags,
    tokenizer: Any,
    device: torch.device | str,
    adapter: RewardSource | None = None,
) -> Weighted:
    """The sources in the order of `--reward_weights`: `adapter` (that of --reward_adapter, which the policy's own model carries), the
    reward model, the functions. `how` is how models are loaded and run, `tokenizer` the policy's.

    Raises UserError where nothing gives scores, for weights that do not fit, and as the loaders do.
    """
    if chosen.reward_batch_size < 1:
        raise UserError(f"--reward_batch_size {chosen.reward_batch_size}: must be at least 1")
    functions = _functions(chosen.reward_func)  # first: they are loaded in no time
    n_sources = (chosen.reward_adapter is not None) + (chosen.reward_model_name_or_path is not None) + len(functions)
    if n_sources == 0:
        raise UserError("nothing gives scores: name --reward_adapter, --reward_model_name_or_path or --reward_func")
    weights = _weights(chosen.reward_weights, n_sources)
    sources: list[RewardSource] = [adapter] if adapter is not None else []
    if chosen.reward_model_name_or_path is not None:
        sources.append(load_reward(chosen.reward_model_name_or_path, how, tokenizer, device, chosen.reward_batch_size))
    return Weighted((*sources, *functions), weights)


def load_reward(
    name: str, how: ModelFlags, tokenizer: Any, device: torch.device | str, batch_rows: int
) -> TokenReward | ForeignReward:
    """A reward model in a folder of its own: on the policy's tokens if it was made with them, else on the text.

    Raises UserError for an adapter, a model without a score head, a classifier of more than two labels.
    """
    folder = Path(resolve_model(name))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"--reward_model_name_or_path {name}: holds an adapter; name it with --reward_adapter, or merge it first")
    config = read_config(name, how.trust_remote_code, score_head=True)
    if not stores_score_head(config):
        raise UserError(
            f"--reward_model_name_or_path {name}: is a language model without a score head; `posttrain rm` trains a reward model"
        )
    own = load_text_tokenizer(name, how.trust_remote_code)
    difference = other_tokens(own, tokenizer) or ("it has two labels" if config.num_labels > 1 else "")
    if difference:
        return _foreign(name, config, own, how, device, batch_rows, difference)
    model = load_reward_model(name, how.dtype, trust_remote_code=how.trust_remote_code)
    check_vocabulary(model, tokenizer)
    model.requires_grad_(False).eval().to(device)
    packed = how.padding_free and enable_segments(model).packed
    install_scores(model)
    if how.fused:
        fuse(model, torch.device(device).type)
    logger.info("reward model %s: reads the policy's tokens, %s", name, "without padding" if packed else "padded")
    return TokenReward(MODEL, Scorer(model, packed, batch_rows, max(how.forward_tokens, 0)), read_bias(folder))


def _foreign(
    name: str, config: Any, own: Any, how: ModelFlags, device: torch.device | str, batch_rows: int, difference: str
) -> ForeignReward:
    folder = Path(resolve_model(name))
    ours = (folder / BIAS_FILE).is_file() or (folder / RUN_FILE).is_file()
    if ours and config.num_labels == 1:
        model = load_reward_model(name, how.dtype, trust_remote_code=how.trust_remote_code)
    else:
        model = load_classifier(name, config, how.dtype, how.trust_remote_code)
    model.requires_grad_(False).eval().to(device)
    model.config.use_cache = False
    own.truncation_side = "left"
    logger.info(
        "reward model %s: reads the text (%s) in %s", name, difference,
        "its own chat template" if own.chat_template else "pairs of prompt and answer: its tokenizer has no chat template",
    )  # fmt: skip
    # Ours score the last token of an answer, its stop token, even where that pads, too.
    pad_id = None if ours else padding_id(model)
    return ForeignReward(MODEL, model, own, batch_rows, pad_id, longest_input_tokens(model, own), bias=read_bias(folder))


def other_tokens(own: Any, policy: Any) -> str:
    """Why a reward model's tokenizer cannot read the policy's ids; empty if it can: the same vocabulary and chat template."""
    if own.get_vocab() != policy.get_vocab():
        return "its vocabulary is not the policy's"
    return "" if own.chat_template == policy.chat_template else "its chat template is not the policy's"


def check_lineage(adapter: str, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """Raises UserError where a reward adapter was trained on another base than the policy's `model`, or with other tokens.

    `model` is the base before any adapter is attached. Where one of the hashes is not at hand (an adapter of another tool, a
    quantised base), a line in the log says that nothing was checked.
    """
    settings = read_adapter_config(adapter)
    if not is_reward_adapter(settings):
        raise UserError(f"--reward_adapter {adapter}: is not the adapter of a reward model; `posttrain rm` trains one")
    check_rope(settings, model, f"--reward_adapter {adapter}")
    trained_on, here = (settings.get("auto_mapping") or {}).get(FINGERPRINT), base_fingerprint(model)
    if trained_on is None or here is None:
        logger.warning("--reward_adapter %s: cannot be checked to be of the policy's base: no hash of the weights", adapter)
    elif trained_on != here:
        raise UserError(
            f"--reward_adapter {adapter}: was trained on another base ({settings.get('base_model_name_or_path')}, weights"
            f" {trained_on[:8]}) than the policy's ({model.name_or_path}, weights {here[:8]}); train one on the policy's base, or"
            " merge it (`posttrain merge`) and name the folder with --reward_model_name_or_path"
        )
    if tokenizer is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        difference = other_tokens(load_text_tokenizer(adapter), tokenizer)
        if difference:
            raise UserError(
                f"--reward_adapter {adapter}: {difference}; train both with the same --template_name, or merge the adapter"
                " (`posttrain merge`) and name the folder with --reward_model_name_or_path: it then reads the text"
            )


def wanted_columns(comma_separated: str | None) -> Wanted:
    """The columns of the prompts' rows that the functions ask for."""
    return functools.reduce(operator.or_, (wanted(source.function) for source in _functions(comma_separated)), Wanted())


def _functions(comma_separated: str | None) -> list[FunctionReward]:
    """The functions under the names that they have, or where two are called the same under their full ones."""
    specs = [spec.strip() for spec in (comma_separated or "").split(",") if spec.strip()]
    if twice := [spec for spec, count in Counter(specs).items() if count > 1]:
        raise UserError(f"--reward_func {twice[0]}: is named twice; --reward_weights can count it double")
    short = Counter(spec.rpartition(":")[2] for spec in specs)
    names = [last if short[last := spec.rpartition(":")[2]] == 1 and last != MODEL else spec for spec in specs]
    return [FunctionReward(name, spec, load_function(spec)) for name, spec in zip(names, specs, strict=True)]


def _weights(text: str | None, n_sources: int) -> tuple[float, ...]:
    if text is None:
        return (1.0,) * n_sources
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--reward_weights {text}: expected numbers, like 1.0,0.5") from error
    if len(weights) != n_sources or not all(map(math.isfinite, weights)):
        raise UserError(
            f"--reward_weights {text}: expected {n_sources} finite numbers, one for each source in the order adapter, model, functions"
        )
    return weights
