"""From flags to the model of a stage and its objective."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from posttrain import flags
from posttrain.commands.forward import say_rope, wanted_rope
from posttrain.commands.report import say
from posttrain.config import Config
from posttrain.data.pack import collate, collate_padded
from posttrain.data.pack_pairs import collate_pairs, collate_pairs_apart, collate_pairs_padded
from posttrain.data.template import set_stop_tokens, stop_token_ids
from posttrain.model.adapter import Lora, attach_lora, load_adapter, record_rope, trainable_summary
from posttrain.model.load import check_tokenizer, check_vocabulary, load_model, resize_embeddings
from posttrain.model.logprobs import install_logprobs
from posttrain.model.quantize import Quantization, quantization_of
from posttrain.model.reward import install_scores, load_reward_model, set_padding
from posttrain.model.router import balance_router
from posttrain.objectives.dpo import DpoLoss, Preference
from posttrain.objectives.lm import LanguageModel
from posttrain.objectives.reward import Reward
from posttrain.types import Objective, PackedBatch, UserError

logger = logging.getLogger(__name__)


def source(config: Config) -> dict[str, Any]:
    """How the named model is fetched."""
    return {"trust_remote_code": config["trust_remote_code"], "revision": config["model_revision"] or "main"}


def quantization(config: Config) -> Quantization | None:
    """How the base is loaded in training."""
    return quantization_of(config["load_in_4bit"], config["load_in_8bit"], double=config["qlora"])


def build_model(config: Config, tokenizer: Any) -> Any:
    """The model (for rm: with a score head), with room for the tokenizer's ids, and its adapter."""
    load = load_reward_model if config.command == "rm" else load_model
    how = quantization(config)
    model = load(
        config["model_name_or_path"], config["dtype"], rope=wanted_rope(config), quantization=how,
        device_map={"": "cpu"} if how and config["use_cpu"] else None, **source(config),
    )  # fmt: skip
    say_rope(model)
    wanted = config["model_type"]
    if wanted and wanted not in ("auto", model.config.model_type):
        raise UserError(f"--model_type {wanted}: {config['model_name_or_path']} is a {model.config.model_type}")
    if named := config["tokenizer_name_or_path"]:
        check_tokenizer(tokenizer, named, "--tokenizer_name_or_path", config["model_name_or_path"], **source(config))
    added = resize_embeddings(model, tokenizer) if config.command != "pt" else 0
    check_vocabulary(model, tokenizer)
    if added and config["use_peft"] and not config["modules_to_save"]:
        logger.warning("the rows of %d new tokens stay as they start: --modules_to_save embed_tokens,lm_head trains them", added)
    if config.command == "rm":
        set_padding(model, tokenizer, stop_token_ids(tokenizer))
    elif config.command != "pt":
        set_stop_tokens(tokenizer, model.generation_config)
    if config.command != "ppo":  # whose objective has no term for it
        balance = balance_router(model, config["router_aux_loss_coef"])
        if balance:
            say(f"router loss: {balance}")
    adapter = config.group(flags.AdapterFlags)
    if adapter.peft_path:
        model = load_adapter(model, adapter.peft_path)
        record_rope(model)
        say(f"adapter {adapter.peft_path}: weights only; optimizer, schedule and data start anew")
    elif adapter.use_peft:
        lora = Lora(adapter.lora_rank, adapter.lora_alpha, adapter.lora_dropout, adapter.target_modules, adapter.modules_to_save,
                    adapter.use_rslora, adapter.use_dora)  # fmt: skip
        model = attach_lora(model, lora)
    say(trainable_summary(model))
    return model


def install_head(config: Config, model: Any) -> None:
    """Let the model's forward give what the objective asks for."""
    if config.command == "rm":
        install_scores(model)
    else:
        say(f"log-probs: {install_logprobs(model).reason}")


def build_objective(config: Config) -> Objective:
    """What the stage minimises."""
    if config.command == "rm":
        return Reward(config["center_rewards_coefficient"])
    if config.command == "dpo":
        chosen = config.group(flags.DpoFlags)
        assert chosen.beta is not None  # derived in resolve
        return Preference(DpoLoss(chosen.loss_type), chosen.beta, chosen.label_smoothing, chosen.sft_weight, chosen.simpo_gamma)
    return LanguageModel()


def collator(config: Config, packed: bool) -> Callable[[Any], PackedBatch]:
    """How rows of the stage become a micro-batch."""
    if config.command in ("pt", "sft"):
        return collate if packed else collate_padded
    if not packed:
        return collate_pairs_padded
    return collate_pairs if config["prefix_sharing"] else collate_pairs_apart
