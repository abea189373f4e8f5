"""How a model's own code generates: found out by generating, since code for an older transformers keeps keys and values in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from posttrain.model.attention import TOLERANCE, evaluation, unwrap
from posttrain.model.own_code import MISFITS, is_own_code

PROMPT_TOKENS, PAD_TOKENS, NEW_TOKENS = 5, 3, 3


def settle_generation(model: PreTrainedModel) -> list[str]:
    """Try a model's own code with a cache and with padding on the left, and keep for `keeps_cache` and `pads_left` what it can do.

    Says what it cannot. Models of transformers are left as they are.
    """
    if not is_own_code(model):
        return []
    ids = torch.arange(1, PROMPT_TOKENS + 1, device=model.device)[None]
    with evaluation(model):
        plain = _logits(model, ids, use_cache=False)
        try:
            cached = _close(_logits(model, ids, use_cache=True), plain, model.dtype)
        except (*MISFITS, LookupError, RuntimeError):  # tuples that are none any more; positions of the whole row for one token
            cached = False
        padded = _close(_logits(model, ids, use_cache=False, pad_tokens=PAD_TOKENS), plain, model.dtype)
    own: Any = model
    own._posttrain_keeps_cache, own._posttrain_pads_left = cached, padded
    if not (cached and padded):
        own._supports_default_dynamic_cache = _no  # our own loop needs both
    said = []
    if not cached:
        said.append("slower, without a cache: the model's own code does not take that of this transformers")
    if not padded:
        said.append("one prompt at a time: the model's own code attends to padding on the left")
    return said


def keeps_cache(model: Any) -> bool:
    """Whether keys and values are kept from token to token."""
    return bool(getattr(unwrap(model), "_posttrain_keeps_cache", True))


def pads_left(model: Any) -> bool:
    """Whether prompts of unlike lengths may share a batch."""
    return bool(getattr(unwrap(model), "_posttrain_pads_left", True))


def _no() -> bool:
    return False


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return float((got - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


def _logits(model: PreTrainedModel, ids: Tensor, *, use_cache: bool, pad_tokens: int = 0) -> Tensor:
    """Logits (1, new tokens, V) of a greedy answer to ids (1, T) behind some padding."""
    ids = torch.nn.functional.pad(ids, (pad_tokens, 0))
    mask = torch.ones_like(ids)
    mask[:, :pad_tokens] = 0
    how = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    generate: Any = model.generate
    return torch.stack(generate(input_ids=ids, attention_mask=mask, generation_config=how).logits, 1).float()
