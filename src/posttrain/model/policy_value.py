"""Policy and value as one trained module with one forward, so that DDP, FSDP and DeepSpeed wrap it as they wrap any model.

With adapters, one frozen base carries up to four (policy, value, reward, reference); each role switches its own on. In full training
policy and value are models of their own. Values are read off a zero-initialised linear head: where a token is predicted, so that
values_M holds V of the state before the token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.model.attention import find_decoder, unwrap
from posttrain.model.boundary import StateCache, install_boundary
from posttrain.model.logprobs import accepted_inputs
from posttrain.types import Half, PackedBatch

POLICY = "default"  # peft's name for the first adapter: it is saved at the top of the folder, where any tool looks
VALUE, REWARD, REFERENCE = "value", "reward", "reference"


class Role(NamedTuple):
    """A model as one role sees it: `adapter` is on and all others are off. None: the base alone."""

    model: nn.Module
    adapter: str | None = None


class PolicyValues(NamedTuple):
    """What the forward returns. A named tuple, so that DDP, FSDP and DeepSpeed find the tensors in it."""

    logprobs_N: Tensor | None  # None where values alone were asked for
    entropy_N: Tensor | None
    values_N: Tensor | None  # at predict_N; None where log-probs alone were asked for
    last_values_S: Tensor | None  # at last_S, where asked for
    router_loss: Tensor | None = None


class PolicyAndValue(nn.Module):
    """The module that PPO trains."""

    def __init__(self, policy: Role, value: Role | None, hidden_size: int, states: StateCache | None = None):
        """value None: the head reads the policy's own hidden states, one pass for both (`--value_sharing trunk`).

        `states`: where the value's trained layers begin, kept over the passes of a rollout; None where they are computed each time.
        """
        super().__init__()
        self.policy_model = policy.model
        self.value_model = value.model if value is not None else None
        self.policy, self.value, self.states = policy, value, states
        self.value_head = nn.Linear(hidden_size, 1)  # float32
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        for role in {id(r.model): r for r in (policy, value) if r is not None and r.adapter is not None}.values():
            install_switch(role.model)
        if value is not None and states is not None:
            install_boundary(value.model)

    def forward(
        self,
        predict_N: Tensor,
        targets_N: Tensor,
        last_S: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        only: Half | None = None,
        **inputs: Any,
    ) -> PolicyValues:
        """Log-probs of the targets under the policy, and values; the rows as `PackedBatch.model_inputs()` describes them.

        `only` one half is computed where the value has layers of its own.
        """
        value_at_M = predict_N if last_S is None else torch.cat([predict_N, last_S])
        logprobs_N = entropy_N = hidden_MD = router_loss = None
        if only != "value":
            asked: dict[str, Any] = {"predict_N": predict_N, "targets_N": targets_N}
            asked |= {"temperature": temperature, "entropy": entropy}
            if self.value is None:
                asked["hidden_at_M"] = value_at_M
            with active(self.policy):
                output = self.policy_model(**inputs, **_riding(self.policy), **asked)
            logprobs_N, entropy_N, router_loss, hidden_MD = (
                output.logprobs_N, output.entropy_N, output.router_loss, output.hidden_MD
            )  # fmt: skip
        if only == "policy":
            return PolicyValues(logprobs_N, entropy_N, None, None, router_loss)
        if self.value is not None:
            hidden_MD = hidden_states(self.value, inputs, value_at_M, self.states)
        assert hidden_MD is not None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            values_M = self.value_head(hidden_MD.float()).squeeze(-1)
        values_N, last_values_S = values_M[: len(predict_N)], values_M[len(predict_N) :]
        return PolicyValues(logprobs_N, entropy_N, values_N, None if last_S is None else last_values_S, router_loss)

    def forget_states(self) -> None:
        """Those of the rollout before."""
        if self.states is not None:
            self.states.clear()


def hidden_states(role: Role, inputs: dict[str, Any], at_M: Tensor, states: StateCache | None = None) -> Tensor:
    """The role's last hidden states at flat positions, (M, D); from `states` on, where those of all rows are there."""
    decoder = find_decoder(unwrap(role.model))
    if states is None or not _hands_on(role):
        with active(role):
            output = decoder(**accepted_inputs(decoder, inputs), **_riding(role))
    else:
        boundary = states.begin(inputs)
        with active(role):
            output = decoder(**inputs, **_riding(role), boundary=boundary)
        states.keep(inputs, boundary)
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
def reward_scores(role: Role, head: nn.Linear, batch: PackedBatch, states: StateCache | None = None) -> Tensor:
    """Scores of the sequences under the reward adapter, read at their last tokens and nowhere else, (S) float32.

    `states`: the value's, where its lower layers are the reward model's.
    """
    hidden_SD = hidden_states(role, batch.model_inputs(), batch.last_S(), states)
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
    return {"adapter_on": role.adapter or ""} if _hands_on(role) and getattr(role.model, "_posttrain_switch", False) else {}


def _hands_on(role: Role) -> bool:
    return bool(unwrap(role.model).config._attn_implementation == "posttrain_segments")


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
