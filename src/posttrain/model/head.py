"""The output projection, chunk by chunk: hidden states to log-probabilities and entropy, and back."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 << 20  # fp32 logits alive at a time


class Projection(NamedTuple):
    """What follows the head's matrix: z = c · tanh(s · head(h) / c) with soft cap c (Gemma) and scale s (Cohere, Granite)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, raw: Tensor, temperature: float) -> Tensor:
        """fp32 logits z / temperature from the head's output."""
        if self.softcap is not None:
            return torch.tanh(raw.float() * (self.scale / self.softcap)) * (self.softcap / temperature)
        factor = self.scale / temperature
        return raw.float() if factor == 1.0 else raw.float() * factor

    def slope(self, logits: Tensor, temperature: float) -> Tensor | float:
        """d logits / d head output, elementwise, from the logits at `temperature`."""
        factor = self.scale / temperature
        return factor if self.softcap is None else factor * (1 - (logits * (temperature / self.softcap)) ** 2)


def n_vocabulary(head: nn.Module) -> int:
    """Rows of the head's matrix, wrapped or not."""
    out_features = getattr(head, "out_features", None)
    return int(out_features) if out_features else max(p.shape[0] for p in head.parameters())


def chunk_tokens(n_logits: int) -> int:
    """Tokens whose logits are alive at a time."""
    return max(16, CHUNK_BYTES // (4 * n_logits))


def select_logprobs(logits_NV: Tensor, targets_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets (N) and, if asked, entropies (N) of fp32 logits."""
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    return chosen_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1) if entropy else None


def head_logprobs(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, projection: Projection, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets (N, fp32) and, if asked, entropies (N, fp32, nats), with gradients to hidden states and head."""
    if _is_plain(head):
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if torch.is_autocast_enabled(hidden_ND.device.type):
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
            hidden_ND, weight, bias = hidden_ND.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logprobs_N, entropy_N = _PlainHead.apply(
                hidden_ND.to(weight.dtype), weight, bias, targets_N, (projection, temperature, entropy)
            )
        return logprobs_N, entropy_N if entropy else None

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return select_logprobs(projection.logits(head(hidden), temperature), targets, entropy)

    size = chunk_tokens(n_vocabulary(head))
    pairs = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    results = [checkpoint(chunk, hidden, targets, use_reentrant=False) for hidden, targets in pairs]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]) if entropy else None


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is a matrix whose weight is at hand: no adapter, no quantisation, no hooks, not partitioned by DeepSpeed."""
    hooked = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
    return type(head) is nn.Linear and head.weight.is_floating_point() and not hooked and not hasattr(head.weight, "ds_id")


class _PlainHead(torch.autograd.Function):
    """Logits exist for one chunk at a time, in the forward and in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        how: tuple[Projection, float, bool],
    ) -> tuple[Tensor, Tensor]:
        projection, temperature, entropy = how
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ahead = ctx.needs_input_grad[0] and not trained
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        entropy_N = torch.empty_like(logprobs_N) if entropy else logprobs_N.new_empty(0)
        slopes = [torch.empty_like(hidden_ND) for _ in range(1 + entropy)] if ahead else []
        size = chunk_tokens(weight_VD.shape[0])
        for start in range(0, len(hidden_ND), size):
            part = slice(start, start + size)
            logits = projection.logits(F.linear(hidden_ND[part], weight_VD, bias_V), temperature)
            norm = logits.logsumexp(-1, keepdim=True)
            logprobs_N[part] = (logits.gather(1, targets_N[part, None]) - norm)[:, 0]
            if entropy:
                entropy_N[part] = _entropy(logits, norm)
            for i, slope in enumerate(slopes):
                ones = torch.ones_like(logprobs_N[part])
                grad = _grad_raw(logits, norm, targets_N[part], (ones, None) if i == 0 else (None, ones), projection, temperature)
                torch.mm(grad.to(weight_VD.dtype), weight_VD, out=slope[part])
        ctx.how, ctx.trained = how, trained
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*slopes if ahead else (hidden_ND, weight_VD, bias_V, targets_N))
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        projection, temperature, entropy = ctx.how
        grads = (grad_logprobs_N, grad_entropy_N if entropy else None)
        if not ctx.trained:
            slopes = ctx.saved_tensors
            parts = [
                slope * grad[:, None].to(slope.dtype) for slope, grad in zip(slopes, grads, strict=False) if grad is not None
            ]
            return sum(parts[1:], parts[0]) if parts else None, None, None, None, None
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32)
        size = chunk_tokens(weight_VD.shape[0])
        for start in range(0, len(hidden_ND), size):
            part = slice(start, start + size)
            logits = projection.logits(F.linear(hidden_ND[part], weight_VD, bias_V), temperature)
            norm = logits.logsumexp(-1, keepdim=True)
            scaled = tuple(None if grad is None else grad[part] for grad in grads)
            grad = _grad_raw(logits, norm, targets_N[part], scaled, projection, temperature)
            grad_bias_V += grad.sum(0)
            grad = grad.to(weight_VD.dtype)
            grad_hidden_ND[part] = grad @ weight_VD
            grad_weight_VD += grad.T @ hidden_ND[part]
        bias = grad_bias_V.to(bias_V.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), bias, None, None


def _entropy(logits: Tensor, norm: Tensor) -> Tensor:
    """H = log Σ exp z − Σ p z."""
    return norm[:, 0] - ((logits - norm).exp_() * logits).sum(-1)


def _grad_raw(
    logits: Tensor,
    norm: Tensor,
    targets: Tensor,
    grads: tuple[Tensor | None, ...],
    projection: Projection,
    temperature: float,
) -> Tensor:
    """The gradient of the head's output from those of log-probability and entropy (either None), as in the module's equations."""
    grad_logprob, grad_entropy = grads
    probability = (logits - norm).exp_()
    grad = torch.zeros_like(logits)
    if grad_logprob is not None:
        grad = probability * -grad_logprob[:, None]
        grad.scatter_add_(1, targets[:, None], grad_logprob[:, None])
    if grad_entropy is not None:
        h = _entropy(logits, norm)[:, None]
        grad -= probability * (logits - norm + h) * grad_entropy[:, None]
    return grad * projection.slope(logits, temperature)
