"""Log-probabilities of the predicted tokens from inside the model's forward, without the logits of the whole row.

Only the positions asked for are projected, in chunks; peak memory is independent of vocabulary × length. With z = W·h / τ, p = softmax(z):

- frozen head: ∂ log p_t / ∂h = (W_t − Σ_v p_v W_v) / τ is computed in the forward pass of the chunk, while its logits exist, and kept (N×D).
- trainable head: the backward pass computes the chunk's logits again and accumulates the gradients of hidden states, weight and bias.
- entropy H = −Σ_v p_v log p_v: ∂H/∂z_v = −p_v (log p_v + H).
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from posttrain.model.attention import evaluation, find_decoder, unwrap
from posttrain.model.head import Projection, head_logprobs, select_logprobs
from posttrain.model.router import balance_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

CAP_NAMES = ("final_logit_softcapping", "final_logits_soft_cap", "logits_soft_cap", "output_logit_soft_cap")
FACTOR_NAMES = ("logit_scale", "lm_head_multiplier")
DIVISOR_NAMES = ("logits_scaling",)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class TokenLogprobs(NamedTuple):
    """What the forward returns when asked for tokens. A named tuple, so that DDP, FSDP and DeepSpeed find the tensors in it."""

    logprobs_N: Tensor
    entropy_N: Tensor | None = None
    router_loss: Tensor | None = None  # mixture of experts with output_router_logits: coefficient × load balancing loss (a mean)
    hidden_MD: Tensor | None = None  # last hidden states at `hidden_at_M`, where asked for


class Logprobs(NamedTuple):
    """How a model computes its log-probabilities. `projection` is None where its own full forward must; `reason` says why, in one line."""

    projection: Projection | None
    reason: str


def install_logprobs(model: nn.Module) -> Logprobs:
    """Let the forward of the causal LM (inside a PEFT wrapper or not) also take `predict_N`, `targets_N`, `temperature`, `entropy`,
    and `hidden_at_M` (flat indices whose last hidden states are wanted too).

    With `predict_N` (flat indices into B·T, repeats allowed) it returns TokenLogprobs, without it what it always did. The method is
    replaced on the instance, so that DDP, FSDP and DeepSpeed still wrap one module and call one forward.
    """
    core = unwrap(model)
    known = core.__dict__.get("_posttrain_logprobs")
    if known is not None:
        return cast("Logprobs", known)
    own = core.__dict__.get("forward")  # set where accelerate has hooked the model
    original: Callable[..., Any] = own or type(core).forward
    with evaluation(model):
        how = _probe(core, core.forward)

    @functools.wraps(original)  # keeps the signature, which generation reads
    def forward(self: PreTrainedModel, *args: Any, predict_N: Tensor | None = None, **kwargs: Any) -> Any:
        run = own or functools.partial(original, self)
        if predict_N is None:
            return run(*args, **kwargs)
        if args:
            raise TypeError("with predict_N every input is a keyword")
        return _token_forward(self, run, how, predict_N, **kwargs)

    core.forward = types.MethodType(forward, core)
    core._posttrain_logprobs = how
    return how


def _token_forward(
    core: PreTrainedModel,
    run: Callable[..., Any],
    how: Logprobs,
    predict_N: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    **inputs: Any,
) -> TokenLogprobs:
    """The forward for tokens: decoder, then the head at `predict_N`."""
    inputs = {key: value for key, value in inputs.items() if value is not None and key != "return_dict"}  # PEFT passes None
    hidden_at_M: Tensor | None = inputs.pop("hidden_at_M", None)
    balanced = bool(inputs.pop("output_router_logits", getattr(core.config, "output_router_logits", False)))
    if balanced:
        inputs["output_router_logits"] = True
    balance = balance_function(core) if balanced else None
    if how.projection is None or (balanced and balance is None):
        output = run(**inputs, **({} if hidden_at_M is None else {"output_hidden_states": True}))
        hidden_BTD = None if hidden_at_M is None else output.hidden_states[-1]
        logits_NV = output.logits.flatten(0, 1).index_select(0, predict_N).float() / temperature
        logprobs_N, entropy_N = select_logprobs(logits_NV, targets_N, entropy)
        router_loss = getattr(output, "aux_loss", None) if balanced else None
    else:
        decoder = find_decoder(core)
        output = decoder(**accepted_inputs(decoder, inputs))
        hidden_BTD = output.last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, predict_N)
        head = core.get_output_embeddings()
        logprobs_N, entropy_N = head_logprobs(hidden_ND, head, targets_N, how.projection, temperature, entropy)
        router_loss = balance(output.router_logits, attention_mask=inputs.get("attention_mask")) if balance is not None else None
    if router_loss is not None:
        router_loss = core.config.router_aux_loss_coef * router_loss
    hidden_MD = None
    if hidden_at_M is not None and hidden_BTD is not None:
        hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, hidden_at_M)
    return TokenLogprobs(logprobs_N, entropy_N, router_loss, hidden_MD)


def accepted_inputs(decoder: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without positions and mask where the decoder of a model's own code knows neither (Baichuan-13B, which has ALiBi).

    Only where it computes the same: positions that count from 0, and padding on the right, which no token before it attends to.
    """
    known = inspect.signature(decoder.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return inputs
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    needless = set()
    if positions is not None:
        counted = positions == torch.arange(positions.shape[-1], device=positions.device)
        if bool((counted if mask is None else counted | (mask == 0)).all()):
            needless.add("position_ids")
    if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        needless.add("attention_mask")
    return {name: value for name, value in inputs.items() if name in known or name not in needless}


def _probe(core: PreTrainedModel, run: Callable[..., Any]) -> Logprobs:
    """Find how the model's logits follow from its head, by comparing with its own forward on a short random row."""
    head = core.get_output_embeddings()
    if head is None or find_decoder(core) is core:
        return Logprobs(None, f"{type(core).__name__} has no output projection of its own: full logits, slower")
    embedding = core.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.shape[0], (1, 8), generator=generator).to(embedding.device)
    expected = run(input_ids=ids, use_cache=False).logits[0].float()
    hidden = find_decoder(core)(input_ids=ids, use_cache=False).last_hidden_state[0]
    raw = head(hidden)
    tolerance = TOLERANCE.get(raw.dtype, 2e-2)
    for projection in _candidates(core):
        error = float((projection.logits(raw, 1.0) - expected).norm() / expected.norm())
        if error <= tolerance:
            return Logprobs(projection, "the head's logits, in chunks")
    return Logprobs(None, f"{type(core).__name__} changes its logits in a way of its own: full logits, slower")


def _candidates(core: PreTrainedModel) -> list[Projection]:
    """Projections worth a try, the most particular first: a soft cap far above small logits looks like none."""
    places = (core, find_decoder(core), core.config)
    caps = [getattr(place, name, None) for name in CAP_NAMES for place in places]
    factors = [getattr(place, name, None) for name in FACTOR_NAMES for place in places]
    divisors = [getattr(place, name, None) for name in DIVISOR_NAMES for place in places]
    scales = [float(f) for f in factors if f] + [1 / float(d) for d in divisors if d]
    return [Projection(scale, cap) for cap in [*(float(c) for c in caps if c), None] for scale in [*scales, 1.0]]
