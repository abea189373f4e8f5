"""Policy and value as one trained module with one forward, so that DDP, FSDP and DeepSpeed wrap it as they wrap any model.

With adapters, one frozen base carries up to four (policy, value, reward, reference); each role switches its own on. In full training
policy and value are models of their own. Values are read off a zero-initialised linear head: where a token is predicted, so that
values_M holds V of the state before the token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.model.adapter import read_adapter_config
from posttrain.model.adapter_file import layers_by_name, read_adapter_weights
from posttrain.model.attention import find_decoder, unwrap
from posttrain.types import PackedBatch, UserError

POLICY = "default"  # peft's name for the first adapter: it is saved at the top of the folder, where any tool looks
VALUE, REWARD, REFERENCE = "value", "reward", "reference"


class Role(NamedTuple):
    """A model as one role sees it: `adapter` is on and all others are off. None: the base alone."""

    model: nn.Module
    adapter: str | None = None


class PolicyValues(NamedTuple):
    """What the forward returns. A named tuple, so that DDP, FSDP and DeepSpeed find the tensors in it."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    values_N: Tensor  # at predict_N
    last_values_S: Tensor | None  # at last_S, where asked for
    router_loss: Tensor | None = None


class PolicyAndValue(nn.Module):
    """The module that PPO trains."""

    def __init__(self, policy: Role, value: Role | None, hidden_size: int):
        """value None: the head reads the policy's own hidden states, one pass for both (`--value_sharing trunk`)."""
        super().__init__()
        self.policy_model = policy.model
        self.value_model = value.model if value is not None else None
        self.policy, self.value = policy, value
        self.value_head = nn.Linear(hidden_size, 1)  # float32
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        for role in {id(r.model): r for r in (policy, value) if r is not None and r.adapter is not None}.values():
            install_switch(role.model)

    def forward(
        self,
        predict_N: Tensor,
        targets_N: Tensor,
        last_S: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        **inputs: Any,
    ) -> PolicyValues:
        """Log-probs of the targets under the policy, and values; the rows as `PackedBatch.model_inputs()` describes them."""
        value_at_M = predict_N if last_S is None else torch.cat([predict_N, last_S])
        asked: dict[str, Any] = {"predict_N": predict_N, "targets_N": targets_N, "temperature": temperature, "entropy": entropy}
        if self.value is None:
            asked["hidden_at_M"] = value_at_M
        with active(self.policy):
            output = self.policy_model(**inputs, **_riding(self.policy), **asked)
        hidden_MD = output.hidden_MD if self.value is None else hidden_states(self.value, inputs, value_at_M)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            values_M = self.value_head(hidden_MD.float()).squeeze(-1)
        values_N, last_values_S = values_M[: len(predict_N)], values_M[len(predict_N) :]
        return PolicyValues(
            output.logprobs_N, output.entropy_N, values_N, None if last_S is None else last_values_S, output.router_loss
        )


def hidden_states(role: Role, inputs: dict[str, Any], at_M: Tensor) -> Tensor:
    """The role's last hidden states at flat positions, (M, D)."""
    with active(role):
        output = find_decoder(unwrap(role.model))(**inputs, **_riding(role))
    return output.last_hidden_state.flatten(0, 1).index_select(0, at_M)


@torch.no_grad()
def reference_logprobs(role: Role, batch: PackedBatch, temperature: float) -> Tensor:
    """Log-probs of the targets under the frozen reference, (N)."""
    with active(role):
        inputs = {**batch.model_inputs(), **_riding(role)}
        output = role.model(**inputs, predict_N=batch.predict_N, targets_N=batch.targets_N, temperature=temperature)
    logprobs_N: Tensor = output.logprobs_N
    return logprobs_N


@torch.no_grad()
def reward_scores(role: Role, head: nn.Linear, batch: PackedBatch) -> Tensor:
    """Scores of the sequences under the reward adapter, read at their last tokens and nowhere else, (S) float32."""
    hidden_SD = hidden_states(role, batch.model_inputs(), batch.last_S())
    with torch.autocast(hidden_SD.device.type, enabled=False):
        scores_S: Tensor = head(hidden_SD.to(head.weight.dtype)).squeeze(-1).float()
    return scores_S


# --- switching adapters ---------------------------------------------------------------------------------------------------


def install_switch(model: nn.Module) -> None:
    """Make every decoder layer switch to the adapter that rides along as the keyword `adapter_on`.

    Under gradient checkpointing a layer is computed again in the backward pass, when another role's adapter may be on: the keyword is
    replayed with the layer's other arguments, so that it computes what it computed before. The hook sits on the layer's children,
    of which attention, the first to compute, is handed all keywords: hooks of the layer itself run outside the checkpoint.
    """
    if getattr(model, "_posttrain_switch", False):
        return
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for child in layer.children():
                child.register_forward_pre_hook(functools.partial(_switch_layer, layer=layer), with_kwargs=True)
    model._posttrain_switch = True  # type: ignore[assignment]


def _riding(role: Role) -> dict[str, Any]:
    """The keyword that rides along with the inputs, for a model whose layers take it (those of transformers that hand segments on)."""
    if role.adapter is None and not isinstance(role.model, PeftModel):
        return {}
    segmented = unwrap(role.model).config._attn_implementation == "posttrain_segments"
    return {"adapter_on": role.adapter or ""} if segmented and getattr(role.model, "_posttrain_switch", False) else {}


def _switch_layer(
    _child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, layer: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if "adapter_on" not in kwargs:
        return None
    kwargs = dict(kwargs)
    _switch(_tuners(layer), kwargs.pop("adapter_on") or None)
    return args, kwargs


@contextmanager
def active(role: Role) -> Iterator[None]:
    """The role's adapter on, all others off; afterwards the policy's again, which generation and saving expect."""
    if not isinstance(role.model, PeftModel):
        yield
        return
    tuners = _tuners(role.model)
    _switch(tuners, role.adapter)
    try:
        yield
    finally:
        _switch(tuners, POLICY)


def _tuners(module: nn.Module) -> list[Any]:
    known: list[Any] | None = module.__dict__.get("_posttrain_tuners")
    if known is None:
        known = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        object.__setattr__(module, "_posttrain_tuners", known)
    return known


def _switch(tuners: list[Any], adapter: str | None) -> None:
    """Only a look-up name changes: peft's set_adapter would freeze every other adapter, too."""
    for tuner in tuners:
        tuner._active_adapter = [adapter or POLICY]
        tuner._disable_adapters = adapter is None


# --- adapters -------------------------------------------------------------------------------------------------------------


def add_adapter(model: PeftModel, name: str, folder: str | None, *, trainable: bool) -> nn.Linear | None:
    """Add a copy of a saved adapter under a name (folder None: a new one like the policy's, whose product is zero).

    Returns the score head that a reward adapter brings along, frozen float32, else None. Raises UserError for a folder without
    adapter weights, and for an adapter that is more than low-rank matrices and a score head: the roles share all other weights.
    """
    if folder is None:
        _add(model, name, model.peft_config[POLICY])
        _finish(model, name, trainable)
        return None
    read_adapter_config(folder)
    config = LoraConfig.from_pretrained(folder)
    check_plain(config, folder)
    weights = read_adapter_weights(folder)
    heads = [key for key in weights if key.endswith("score.weight")]
    head = _frozen_head(weights.pop(heads[0])) if heads else None
    try:
        _add(model, name, config)
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (RuntimeError, ValueError) as error:  # other layers, or layers of another size
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{folder}: does not fit the policy's base ({lines[min(1, len(lines) - 1)]})") from error
    if loaded.unexpected_keys:
        raise UserError(f"{folder}: holds weights that the model has no place for, the first is {loaded.unexpected_keys[0]}")
    if lacking := [key for key in loaded.missing_keys if is_of_adapter(key, name)]:
        raise UserError(f"{folder}: lacks weights of the adapter it describes, the first is {lacking[0]}")
    _finish(model, name, trainable)
    return head


def copy_adapter(model: PeftModel, name: str) -> None:
    """Add a frozen copy of the policy's adapter as it is now."""
    _add(model, name, model.peft_config[POLICY])
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in tensors.items():
            if is_of_adapter(key, name):
                parameter.copy_(tensors[key.replace(f".{name}", f".{POLICY}")])
    _finish(model, name, trainable=False)


def check_plain(config: Any, folder: str) -> None:
    """Raises UserError for an adapter with layers that are trained whole, or with biases: all roles would share them."""
    whole = sorted({*(config.modules_to_save or [])} - {"score", "classifier"})
    if whole or config.bias != "none":
        what = f"layers that are trained whole ({', '.join(whole)})" if whole else "trained biases of the base"
        raise UserError(f"{folder}: holds {what}, which the roles of PPO would share; merge it first and name the merged model")


def is_of_adapter(key: str, name: str) -> bool:
    """Whether a parameter is one of an adapter's: `….lora_A.<name>.weight`."""
    return re.search(rf"\.lora_\w+\.{name}(\.|$)", key) is not None


def _add(model: PeftModel, name: str, config: Any) -> None:
    with layers_by_name():
        model.add_adapter(name, _plain_config(config))


def _plain_config(config: Any) -> LoraConfig:
    """The same shape of adapter, new: no modules that are trained whole, no dropout, no start that changes the base."""
    return LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=config.target_modules,
        exclude_modules=config.exclude_modules, target_parameters=config.target_parameters, rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern, layers_to_transform=config.layers_to_transform, layers_pattern=config.layers_pattern,
        use_rslora=config.use_rslora, use_dora=config.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip


def _frozen_head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.float(), requires_grad=False)
    return head


def _finish(model: nn.Module, name: str, trainable: bool) -> None:
    """float32 matrices, trainable or not; and layers may have gained tuners."""
    for key, parameter in model.named_parameters():
        if is_of_adapter(key, name):
            parameter.requires_grad_(trainable)
            parameter.data = parameter.data.float()
    for module in model.modules():
        module.__dict__.pop("_posttrain_tuners", None)


def train_only(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Make exactly these adapters trainable: adding one freezes the others."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_of_adapter(key, name) for name in adapters))
