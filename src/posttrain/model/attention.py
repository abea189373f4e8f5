"""Segment attention for a model: registered with transformers, proved on the model at load, or padded batches instead.

The proof is the probe of `enable_segments`: short random sequences, packed into one row and apart, must give the same hidden states.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from posttrain.model.kernels import NO_MASK_SHAPE, segment_attention
from posttrain.model.own_code import is_own_code
from posttrain.model.segments import MisfitError
from posttrain.types import Segment, SegmentTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "posttrain_segments"
KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
SHORT_WINDOW_TOKENS = 256  # a longer window would make the probe slow
CHEAP_PARAMETERS = 200_000_000  # up to this size a half-precision model is probed in fp32: one copy of its weights, for a second
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Attention:
    """How the model takes batches: `packed` rows of segments, or padded; `reason` says in one line why."""

    packed: bool
    reason: str


def register(flash: Callable[..., Tensor] | None = None) -> None:
    """Make segment attention known to transformers under `NAME`. Without a segment table it is SDPA, mask and all. Safe to call again.

    `flash`: a package's variable-length kernel, to be used on CUDA in place of torch's.
    """
    AttentionInterface.register(NAME, functools.partial(segment_attention, flash=flash) if flash else segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def enable_segments(model: nn.Module, flash: Callable[..., Tensor] | None = None) -> Attention:
    """Switch `model` (or the model inside a PEFT wrapper) to segment attention if it then computes the same, else leave it as it was.

    Parameters, training flags, gradients and the random state are untouched. A model that cannot be packed is no error: the
    reason is returned. `flash` as in `register`.
    """
    core = unwrap(model)
    if core.config._attn_implementation == NAME:
        return Attention(packed=True, reason="already enabled")
    decoder = find_decoder(core)
    reason = _unsupported(core, decoder)
    if reason:
        return Attention(packed=False, reason=reason)
    register(flash)
    original = core.config._attn_implementation
    with evaluation(model):
        lengths = _probe_lengths(core.config)
        rows = _probe_rows(core, lengths)
        apart = [_hidden(decoder, row) for row in rows]
        core.set_attn_implementation(NAME)
        hook = decoder.register_forward_pre_hook(_skip_mask, with_kwargs=True)
        try:
            reason = _difference(decoder, rows, apart, lengths)
            if not reason and is_own_code(core):  # which may attend in another way in training (Baichuan-7B does, with xformers)
                _train_without_dropout(core)
                reason = _difference(decoder, rows, apart, lengths)
        except MisfitError as misfit:  # raised by our attention alone
            reason = str(misfit)
        except RuntimeError as error:  # a layer that computes with the mask itself (Doge) meets an empty one; else it is a bug
            if "size of tensor" not in str(error):
                raise
            reason = "its layers compute with the attention mask themselves"
    if reason:
        hook.remove()
        core.set_attn_implementation(original)
        return Attention(packed=False, reason=f"{type(core).__name__}: {reason}")
    return Attention(packed=True, reason="packed rows give the hidden states of separate sequences")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    wrapped: Any = model
    core = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"not a transformers model: {type(core).__name__}")
    return core


def find_decoder(core: PreTrainedModel) -> nn.Module:
    """The model without its head; `core` itself where it has none apart (Llama 4's prefix names a module of another class)."""
    candidates = (core.base_model, getattr(core, "model", core), core.get_decoder())
    return next((module for module in candidates if module is not core), core)


def _unsupported(core: PreTrainedModel, decoder: nn.Module) -> str:
    """Why the model cannot be packed, as far as it can be read off; empty if it may."""
    name = type(core).__name__
    if not core._supports_attention_backend:
        return f"{name} does not use transformers' attention interface"
    if decoder is core:
        return f"{name} has no decoder apart from its head"
    strange = sorted(set(getattr(core.config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if strange:
        return f"{name} has layers that carry state along the row ({', '.join(strange)})"
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values()):
        return f"{name} does not take further keywords"
    return ""


def _skip_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the decoder: with segments no mask is to be built. A tensor among the arguments, so that it survives
    gradient checkpointing and any thread."""
    if kwargs.get("segments") is None:
        return None
    if kwargs.get("attention_mask") is not None:
        raise ValueError("a packed row has no padding: give segments or attention_mask, not both")
    device = next(module.parameters()).device
    return args, {**kwargs, "attention_mask": torch.ones(NO_MASK_SHAPE, dtype=torch.bool, device=device)}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """No dropout, gradient or autocast inside; every module's own training flag comes back."""
    device = next(model.parameters()).device.type
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _train_without_dropout(core: nn.Module) -> None:
    """Every module in training, for the probe. Dropout that is no module makes rows differ, and then they are padded."""
    for module in core.modules():
        module.training = not isinstance(module, nn.Dropout)


def _probe_lengths(config: Any) -> list[int]:
    """Lengths of: a sequence, a prompt, its two branches. Longer than a window or chunk, where that is short."""
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((n for n in limits if n is not None and n <= SHORT_WINDOW_TOKENS), default=0)
    return [longest + 11, longest // 2 + 7, longest + 9, 5]


def _probe_rows(core: PreTrainedModel, lengths: list[int]) -> list[Tensor]:
    """The probe's sequences as they would be apart: one, prompt + first branch, prompt + second branch."""
    embedding = core.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)  # its own, so that the global random state stays
    ids = torch.randint(embedding.weight.shape[0], (sum(lengths),), generator=generator).to(embedding.weight.device)
    alone, prompt, first, second = ids.split(lengths)
    return [alone[None], torch.cat([prompt, first])[None], torch.cat([prompt, second])[None]]


def _pack(rows: list[Tensor], lengths: list[int]) -> dict[str, Any]:
    """The probe's sequences as one packed row."""
    alone, prompt, first, second = lengths
    ids = torch.cat([rows[0], rows[1], rows[2][:, prompt:]], 1)
    ends = [alone, alone + prompt, alone + prompt + first, alone + prompt + first + second]
    parents = [None, None, 1, 1]
    table = SegmentTable(tuple(Segment(a, b, p) for a, b, p in zip([0, *ends[:-1]], ends, parents, strict=True)))
    ranges = [range(alone), range(prompt + first), range(prompt, prompt + second)]
    positions = torch.tensor([i for r in ranges for i in r], device=ids.device)[None]
    return {"input_ids": ids, "position_ids": positions, "segments": table}


def _hidden(decoder: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """Last hidden states (T, D) of one row, in fp32 arithmetic where the model is small."""
    kwargs = {"input_ids": ids, "use_cache": False, **kwargs}
    weights = dict(decoder.named_parameters())
    half = {torch.bfloat16, torch.float16} & {w.dtype for w in weights.values()}
    if (
        half
        and all(w.is_floating_point() for w in weights.values())
        and sum(w.numel() for w in weights.values()) <= CHEAP_PARAMETERS
    ):
        output = torch.func.functional_call(decoder, {n: w.float() for n, w in weights.items()}, kwargs=kwargs)
    else:
        output = decoder(**kwargs)
    return output.last_hidden_state[0]


def _difference(decoder: nn.Module, rows: list[Tensor], apart: list[Tensor], lengths: list[int]) -> str:
    """Run the rows packed. Says what differs from the rows apart; empty if nothing does."""
    alone, prompt, first, _ = lengths
    packed = _pack(rows, lengths)
    got = _hidden(decoder, packed.pop("input_ids"), **packed)
    expected = torch.cat([apart[0], apart[1], apart[2][prompt:]])
    error_T = (got - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    # In half precision single tokens may flip (an expert chosen by a hair); in fp32 each token must agree.
    half = got.dtype in (torch.bfloat16, torch.float16)
    error = float(error_T.mean() if half else error_T.max())
    if not error <= TOLERANCE[got.dtype]:
        return f"packed and separate sequences differ (relative error {error:.1e} in {str(got.dtype).removeprefix('torch.')})"
    # What a segment does not see must not change it at all: other tokens in the first sequence and in the first branch.
    others = [rows[0].flip(1), torch.cat([rows[1][:, :prompt], rows[1][:, prompt:].flip(1)], 1), rows[2]]
    changed = _pack(others, lengths)
    again = _hidden(decoder, changed.pop("input_ids"), **changed)
    second = alone + prompt + first
    leak = float((got - again)[second:].float().norm() / got[second:].float().norm())
    if not leak <= TOLERANCE[got.dtype] / 10:
        return f"a segment sees tokens of another (relative change {leak:.1e})"
    return ""
