"""The models of PPO: policy and value that are trained, the frozen reference, and what gives scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain import flags
from posttrain.commands.build import build_model, source
from posttrain.commands.report import say
from posttrain.config import Config
from posttrain.data.pack_branches import collate_branches, collate_branches_padded
from posttrain.model import lora_forward
from posttrain.model.adapter import trainable_summary
from posttrain.model.attention import enable_segments, unwrap
from posttrain.model.boundary import StateCache, first_trained, freeze_below
from posttrain.model.fused import fuse
from posttrain.model.load import read_config, resize_embeddings, stores_score_head
from posttrain.model.logprobs import install_logprobs
from posttrain.model.own_generation import settle_generation
from posttrain.model.policy_value import POLICY, REFERENCE, REWARD, VALUE, PolicyAndValue, Role, reward_scores
from posttrain.model.reward import has_score_head, load_reward_model, score_head
from posttrain.model.role_adapters import add_adapter, check_plain, copy_adapter, is_of_adapter, train_only
from posttrain.training.episodes import Episode
from posttrain.training.ppo_rollout import Cutter
from posttrain.training.resolve_ppo import in_turn, measure_tokens, pass_tokens
from posttrain.training.reward_foreign import load_text_tokenizer
from posttrain.training.reward_sources import build_reward_sources, check_lineage, other_tokens
from posttrain.training.rewards import TokenReward
from posttrain.training.token_scores import Scorer, read_bias
from posttrain.types import UserError


@dataclass(frozen=True)
class Actors:
    """Everything that computes: `score` gives scores, and those of each source."""

    trained: PolicyAndValue
    reference: Role | None
    score: Callable[[Sequence[Episode]], tuple[list[float], dict[str, list[float]]]]
    cutter: Cutter


def build_actors(config: Config, tokenizer: Any, device: torch.device, world: int = 1) -> Actors:
    """Load and connect the models, for so many processes. The reference is left out where no KL is asked for."""
    policy = build_model(config, tokenizer)
    for found in settle_generation(unwrap(policy)):
        say(f"generation: {found}")
    adapters = config["use_peft"]
    roles = _adapter_roles(config, policy, tokenizer) if adapters else _whole_models(config, policy, tokenizer)
    reference, own_value, reward_head = roles
    models: list[Any] = list({id(r.model): r.model for r in (Role(policy), own_value, reference) if r is not None}.values())
    packed = _prepare(config, models, device.type)
    for model in models:
        model.to(device)
    hidden_size = unwrap(policy).config.get_text_config().hidden_size
    states = _states(config, own_value, world)
    trained = PolicyAndValue(Role(policy, POLICY if adapters else None), own_value, hidden_size, states).to(device)
    set_mode(trained, config["gradient_checkpointing"], packed)
    say(f"PPO: {trainable_summary(trained)}")
    collate = collate_branches if packed else collate_branches_padded
    cutter = Cutter(collate, pass_tokens(config, world), device, padded=not packed, measure_tokens=measure_tokens(config))
    adapter_reward = None
    if reward_head is not None:
        score = partial(reward_scores, Role(policy, REWARD), reward_head.to(device), states=states)
        episodes = config["rollout_batch_size"] * config["num_generations"]
        scorer = Scorer(policy, packed, episodes, measure_tokens(config), score)
        adapter_reward = TokenReward("reward_adapter", scorer, read_bias(config["reward_adapter"]))
    sources = build_reward_sources(
        config.group(flags.RewardSourceFlags), config.group(flags.ModelFlags), tokenizer, device, adapter_reward
    )
    return Actors(trained, reference, sources.scores_by_source, cutter)


Roles = tuple[Role | None, Role | None, nn.Linear | None]  # reference, value where it has layers of its own, score head


def _adapter_roles(config: Config, policy: Any, tokenizer: Any) -> Roles:
    """Adapters on the policy's base. The reference is a copy of the policy's adapter, or the base alone where that starts at zero."""
    reward_head, own_value, reference = None, None, None
    if config["peft_path"]:
        check_plain(policy.peft_config[POLICY], config["peft_path"])
    if config["reward_adapter"]:
        check_lineage(config["reward_adapter"], unwrap(policy), tokenizer)
        reward_head = add_adapter(policy, REWARD, config["reward_adapter"], trainable=False)
    if config["init_kl_coef"] > 0:
        if config["peft_path"]:
            copy_adapter(policy, REFERENCE)
        reference = Role(policy, REFERENCE if config["peft_path"] else None)
    if config["value_sharing"] == "adapter":
        add_adapter(policy, VALUE, config["reward_adapter"], trainable=True)
        own_value = Role(policy, VALUE)
    train_only(policy, (POLICY, VALUE))
    lora_forward.install(policy)
    return reference, own_value, reward_head


def _whole_models(config: Config, policy: Any, tokenizer: Any) -> Roles:
    """Models of their own: the reference is a frozen copy of the policy."""
    reference = Role(copy.deepcopy(policy).requires_grad_(False).eval()) if config["init_kl_coef"] > 0 else None
    own_value = Role(_value_model(config, tokenizer, unwrap(policy).config)) if config["value_sharing"] == "adapter" else None
    return reference, own_value, None


def _states(config: Config, value: Role | None, world: int) -> StateCache | None:
    """Freezes the value's lower layers as they begin, which is as the reward adapter has them. Where one process holds all, what comes
    out of them is kept for a rollout's time."""
    if value is None:
        return None
    first = first_trained(value.model, config["value_layers"], "--value_layers")
    if not first:
        return None
    freeze_below(value.model, first, lambda name: value.adapter is None or is_of_adapter(name, value.adapter))
    return StateCache(first) if in_turn(config, world) else None


def _value_model(config: Config, tokenizer: Any, policy: Any) -> Any:
    """A decoder for the value: the reward model's where that has the policy's shape (`policy`: its config) and tokens, else the base's."""
    name, how = config["model_name_or_path"], source(config)
    reward, code = config["reward_model_name_or_path"], {"trust_remote_code": config["trust_remote_code"]}
    twin = reward and _is_twin(read_config(reward, **code, score_head=True), policy)
    if twin and not other_tokens(load_text_tokenizer(reward, **code), tokenizer):
        name, how = reward, code
    model = load_reward_model(name, config["dtype"], **how)
    resize_embeddings(model, tokenizer)
    score_head(model).requires_grad_(False)  # the value has a head of its own
    say(f"value: starts from {name}")
    return model


def _is_twin(reward: Any, policy: Any) -> bool:
    """Whether configs are those of a reward model and of a policy with the same layers."""
    texts = [config.get_text_config() for config in (reward, policy)]
    shapes = [(text.model_type, text.hidden_size, text.num_hidden_layers) for text in texts]
    return stores_score_head(reward) and reward.num_labels == 1 and shapes[0] == shapes[1]


def _prepare(config: Config, models: list[nn.Module], device: str) -> bool:
    """Segments, log-probs and fused passes; returns whether rows are packed, which all models must agree on."""
    packed = config["padding_free"]
    for model in models:
        if config["padding_free"]:
            attention = enable_segments(model)
            packed = packed and attention.packed
            if model is models[0]:
                say(f"rows: {'segments without padding' if attention.packed else 'padded'} ({attention.reason})")
        if not has_score_head(model):
            how = install_logprobs(model)
            if model is models[0]:
                say(f"log-probs: {how.reason}")
        if config["fused"]:
            replaced = fuse(model, device)
            if model is models[0]:
                say(f"fused: {replaced}")
    return bool(packed)


DROPOUTS = (
    "attention_dropout",
    "dropout",
    "attn_dropout",
    "activation_dropout",
    "layerdrop",
    "router_jitter_noise",
    "jitter_noise",
)


def set_mode(trained: PolicyAndValue, checkpointing: bool, packed: bool) -> None:
    """No dropout anywhere: evaluation mode, but for the layers themselves where they are to be checkpointed."""
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    trained.eval()
    if not checkpointing:
        return
    models = {id(m): m for m in (trained.policy_model, trained.value_model) if m is not None}.values()
    if trained.policy.adapter is not None and not packed:
        raise UserError(
            "--gradient_checkpointing True: needs packed rows, by which the layers know whose turn it is; leave it off"
        )
    for model in models:
        core = unwrap(model)
        enable = getattr(core, "activation_checkpointing_enable", None) or core.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        layers = [module for module in core.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UserError(
                f"--gradient_checkpointing True: {type(core).__name__} has no layers that can be checkpointed; leave it off"
            )
        for layer in layers:
            layer.training = True
        if trained.policy.adapter is not None:
            core.enable_input_require_grads()
