"""The models of PPO: policy and value that are trained, the frozen reference, and what gives scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posttrain import flags
from posttrain.commands.build import build_model, source
from posttrain.commands.report import say
from posttrain.config import Config
from posttrain.data.pack_branches import collate_branches, collate_branches_padded
from posttrain.model import lora_forward
from posttrain.model.adapter import trainable_summary
from posttrain.model.attention import enable_segments, unwrap
from posttrain.model.fused import fuse
from posttrain.model.load import load_model
from posttrain.model.logprobs import install_logprobs
from posttrain.model.policy_value import POLICY, REFERENCE, REWARD, VALUE, PolicyAndValue, Role, add_adapter, train_only
from posttrain.model.reward import load_reward_model, score_head
from posttrain.training.episodes import Episode
from posttrain.training.ppo_rollout import AdapterReward, Cutter
from posttrain.training.reward_sources import build_reward_sources, check_lineage
from posttrain.training.token_scores import read_bias
from posttrain.types import UserError


@dataclass(frozen=True)
class Actors:
    """Everything that computes: `score` gives scores, and those of each source."""

    trained: PolicyAndValue
    reference: Role | None
    score: Callable[[Sequence[Episode]], tuple[list[float], dict[str, list[float]]]]
    cutter: Cutter


def build_actors(config: Config, tokenizer: Any, device: torch.device) -> Actors:
    """Load and connect the models. The reference is left out where no KL is asked for."""
    policy = build_model(config, tokenizer)
    adapters = config["use_peft"]
    with_reference = config["init_kl_coef"] > 0
    reward_head, own_value, reference = None, None, None
    if adapters:
        if config["reward_adapter"]:
            check_lineage(config["reward_adapter"], unwrap(policy), tokenizer)
            reward_head = add_adapter(policy, REWARD, config["reward_adapter"], trainable=False)
        if with_reference:
            if config["peft_path"]:
                add_adapter(policy, REFERENCE, config["peft_path"], trainable=False)
            reference = Role(policy, REFERENCE if config["peft_path"] else None)
        if config["value_sharing"] == "adapter":
            add_adapter(policy, VALUE, config["reward_adapter"], trainable=True)
            own_value = Role(policy, VALUE)
        train_only(policy, (POLICY, VALUE))
        lora_forward.install(policy)
    else:
        if with_reference:
            frozen = load_model(config["model_name_or_path"], config["dtype"], **source(config))
            reference = Role(frozen.requires_grad_(False).eval().to(device))
        if config["value_sharing"] == "adapter":
            own_value = Role(_value_model(config, tokenizer))
    models: list[Any] = list({id(r.model): r.model for r in (Role(policy), own_value, reference) if r is not None}.values())
    packed = _prepare(config, models)
    hidden_size = unwrap(policy).config.get_text_config().hidden_size
    trained = PolicyAndValue(Role(policy, POLICY if adapters else None), own_value, hidden_size).to(device)
    _set_mode(config, trained, packed)
    say(f"PPO trains {trainable_summary(trained)}")
    cutter = Cutter(collate_branches if packed else collate_branches_padded, config["forward_tokens"], device)
    adapter_reward = None
    if reward_head is not None:
        adapter_reward = AdapterReward(Role(policy, REWARD), reward_head.to(device), cutter, read_bias(config["reward_adapter"]))
    sources = build_reward_sources(
        config.group(flags.RewardSourceFlags), config.group(flags.ModelFlags), tokenizer, device, adapter_reward
    )
    return Actors(trained, reference, sources.scores_by_source, cutter)


def _value_model(config: Config, tokenizer: Any) -> Any:
    """In full training: a decoder of its own, from the reward model where that is one of ours with the policy's shape, else the base."""
    del tokenizer
    model = load_reward_model(config["model_name_or_path"], config["dtype"], **source(config))
    score_head(model).requires_grad_(False)  # the value head is our own
    return model


def _prepare(config: Config, models: list[nn.Module]) -> bool:
    """Segments, log-probs and fused passes; returns whether rows are packed, which all models must agree on."""
    packed = config["padding_free"]
    for model in models:
        if config["padding_free"]:
            attention = enable_segments(model)
            packed = packed and attention.packed
            if model is models[0]:
                say(f"rows: {'segments without padding' if attention.packed else 'padded'} ({attention.reason})")
        if hasattr(unwrap(model), "lm_head") or unwrap(model).get_output_embeddings() is not None:
            how = install_logprobs(model)
            if model is models[0]:
                say(f"log-probs: {how.reason}")
        if config["fused"]:
            replaced = fuse(model)
            if model is models[0]:
                say(f"fused: {replaced}")
    return bool(packed)


def _set_mode(config: Config, trained: PolicyAndValue, packed: bool) -> None:
    """No dropout anywhere; training mode only where gradient checkpointing asks for it."""
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    trained.eval()
    if not config["gradient_checkpointing"]:
        return
    if config["use_peft"] and not packed:
        raise UserError(
            "--gradient_checkpointing True: needs packed rows, by which the layers know whose turn it is; leave it off"
        )
    for model in {id(m): m for m in (trained.policy_model, trained.value_model) if m is not None}.values():
        core = unwrap(model)
        enable = getattr(core, "activation_checkpointing_enable", None) or core.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if config["use_peft"]:
            core.enable_input_require_grads()
    trained.train()
