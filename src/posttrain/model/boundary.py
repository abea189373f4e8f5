"""Where the trained layers of a model begin: the hidden states that go into them, taken down once and started from afterwards.

Below the first trained layer nothing changes while a rollout is trained on, and no gradient is wanted there. A pass over the same tokens
that starts from the states at that layer gives what a whole pass gives, for the price of the layers above.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.model.attention import find_decoder, unwrap
from posttrain.types import UserError


@dataclass
class Boundary:
    """Rides with the inputs as the keyword `boundary` to every layer."""

    first: int  # the first layer that counts
    states_BTD: Tensor | None = None  # what goes into it. None: a whole pass, which takes it down

    def __post_init__(self) -> None:
        self.given = self.states_BTD is not None


Key = tuple[Any, tuple[int, ...]]  # the key of the segment before, and the tokens


class StateCache:
    """The states that go into one layer, of every segment that passed by since `clear`.

    Good for models whose layers below never change. A segment is known by its tokens and those that it sees before it, so it does not
    matter what it is packed with.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self._kept: dict[Key, Tensor] = {}

    def clear(self) -> None:
        """Forget all."""
        self._kept = {}

    def begin(self, inputs: dict[str, Any]) -> Boundary:
        """Where a pass over a packed row begins: with the states if all are there, else at the first layer, and they are taken down."""
        found = [self._kept.get(key) for key in self._keys(inputs)]
        if any(states_TD is None for states_TD in found):
            return Boundary(self.first)
        return Boundary(self.first, torch.cat(found)[None])  # type: ignore[arg-type]

    def keep(self, inputs: dict[str, Any], boundary: Boundary) -> None:
        """What a whole pass has taken down."""
        if boundary.given or boundary.states_BTD is None:
            return
        for key, segment in zip(self._keys(inputs), inputs["segments"].segments, strict=True):
            self._kept[key] = boundary.states_BTD[0, segment.start : segment.end].clone()

    def _keys(self, inputs: dict[str, Any]) -> list[Key]:
        ids, keys = inputs["input_ids"][0].tolist(), list[Key]()
        for segment in inputs["segments"].segments:
            before = None if segment.parent is None else keys[segment.parent]
            keys.append((before, tuple(ids[segment.start : segment.end])))
        return keys


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hidden states pass through one after the other; empty where they cannot be told."""
    lists = [module for module in find_decoder(unwrap(model)).children() if isinstance(module, nn.ModuleList)]
    found = [[*layers] for layers in lists if layers and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)]
    return found[0] if len(found) == 1 else []


def first_trained(model: nn.Module, n_last: int, flag: str) -> int:
    """The index of the first of the last `n_last` layers (0: all). Raises UserError, naming the flag, where there are not so many."""
    layers = decoder_layers(model)
    if not n_last or n_last == len(layers):
        return 0
    if not layers:
        raise UserError(f"{flag} {n_last}: the layers of {type(unwrap(model)).__name__} cannot be told apart; leave it out")
    if n_last > len(layers):
        raise UserError(f"{flag} {n_last}: the model has {len(layers)} layers")
    return len(layers) - n_last


def install_boundary(model: nn.Module) -> None:
    """Let every layer take the keyword `boundary`, and be passed by below it."""
    for index, layer in enumerate(decoder_layers(model)):
        if getattr(layer, "_posttrain_boundary", False):
            continue
        own = vars(layer).get("forward")  # set where accelerate has hooked the layer

        def forward(
            self: Any, hidden_BTD: Tensor, *args: Any, boundary: Boundary | None = None,
            index: int = index, own: Any = own, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if boundary is not None and boundary.given and index < boundary.first:
                return hidden_BTD
            if boundary is not None and index == boundary.first:
                if boundary.given:
                    assert boundary.states_BTD is not None
                    hidden_BTD = boundary.states_BTD
                else:
                    boundary.states_BTD = hidden_BTD.detach()
            # By the class as it is now: FSDP2 gives a layer another one.
            return own(hidden_BTD, *args, **kwargs) if own else type(self).forward(self, hidden_BTD, *args, **kwargs)

        layer.forward = types.MethodType(forward, layer)
        layer._posttrain_boundary = True  # type: ignore[assignment]


def freeze_below(model: nn.Module, first: int, names: Callable[[str], bool]) -> None:
    """No gradient for those parameters of these names that come before the first trained layer: of embeddings and of lower layers."""
    before = [unwrap(model).get_input_embeddings(), *decoder_layers(model)[:first]]
    below = {id(parameter) for module in before for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in below and names(name):
            parameter.requires_grad_(False)
