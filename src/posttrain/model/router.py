"""The load balancing loss of a mixture of experts, from the router logits that its decoder gives out."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from posttrain.model.attention import find_decoder
from posttrain.types import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what families call them


def is_mixture(config: Any) -> bool:
    """Whether a config is that of a mixture of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in EXPERT_COUNTS)


def balance_router(model: PreTrainedModel, coefficient: float | None) -> str:
    """Switch the load balancing loss on, at the model's own weight where `coefficient` is None; off at 0. Says so, "" without a router.

    transformers leaves it off, and a router whose input drifts then sends ever more tokens to few experts. Raises UserError for a
    coefficient that the model has no use for.
    """
    config = model.config
    own = getattr(config, "router_aux_loss_coef", None)
    if own is None or balance_function(model) is None:
        if coefficient is not None:
            raise UserError(f"--router_aux_loss_coef {coefficient}: {type(model).__name__} has no load balancing loss")
        return ""
    config.router_aux_loss_coef = own if coefficient is None else coefficient
    config.output_router_logits = config.router_aux_loss_coef > 0
    return f"load balancing x {config.router_aux_loss_coef:g}" if config.output_router_logits else "off"


def balance_function(core: PreTrainedModel) -> Callable[..., Tensor] | None:
    """(router logits of the layers, attention_mask=…) → the family's own loss over real tokens; None where it has none of the usual form."""
    function = getattr(sys.modules[type(find_decoder(core)).__module__], "load_balancing_loss_func", None)
    # A causal model keeps the numbers itself; one with a score head has only the config.
    places = (core, core.config.get_text_config())
    n_experts = next((n for place in places for name in EXPERT_COUNTS if (n := getattr(place, name, None))), None)
    per_token = next((n for place in places if (n := getattr(place, "num_experts_per_tok", None))), None)
    if function is None or not n_experts or not per_token:
        return None
    return functools.partial(function, num_experts=n_experts, top_k=per_token)
