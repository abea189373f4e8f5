"""The output projection, chunk by chunk: hidden states to log-probabilities and entropy, and back."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# fp32 logits alive at a time. On a CPU they should stay in the last-level cache; an accelerator wants tall products.
CPU_CHUNK_BYTES, CHUNK_BYTES = 24 << 20, 512 << 20


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


def chunk_tokens(n_logits: int, device: torch.device) -> int:
    """Tokens whose logits are alive at a time; not so few that the products only wait for the weight."""
    return max(96, (CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES) // (4 * n_logits))


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
                hidden_ND.to(weight.dtype), weight, bias, targets_N, _How(projection, temperature, entropy)
            )
        return logprobs_N, entropy_N if entropy else None

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return select_logprobs(projection.logits(head(hidden), temperature), targets, entropy)

    size = chunk_tokens(n_vocabulary(head), hidden_ND.device)
    pairs = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    results = [checkpoint(chunk, hidden, targets, use_reentrant=False) for hidden, targets in pairs]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]) if entropy else None


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is a matrix whose weight is at hand: no adapter, no quantisation, no hooks, not partitioned by DeepSpeed."""
    hooked = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
    return type(head) is nn.Linear and head.weight.is_floating_point() and not hooked and not hasattr(head.weight, "ds_id")


class _How(NamedTuple):
    """What is asked of the head, apart from tensors."""

    projection: Projection
    temperature: float
    entropy: bool


class _Chunk(NamedTuple):
    """The distributions of n tokens: logits z and p = softmax(z), (n, V), log Σ exp z, (n, 1), and the targets, (n,)."""

    logits: Tensor  # overwritten by p where nothing needs them after it
    p: Tensor
    norm: Tensor
    targets: Tensor

    def entropy(self) -> Tensor:
        """H = log Σ exp z − Σ p z, (n, 1)."""
        return self.norm - torch.bmm(self.p[:, None], self.logits[:, :, None])[:, 0]

    def grad_raw(self, grad_logprob: Tensor | None, grad_entropy: Tensor | None, how: _How) -> Tensor:
        """The gradient of the head's output, (n, V), from those (n, 1) of log-probability and entropy."""
        factor = torch.zeros_like(self.norm) if grad_logprob is None else -grad_logprob
        if grad_entropy is None:
            grad = self.p * factor
        else:  # log p + H = z − (norm − H)
            grad = (self.logits - (self.norm - self.entropy())).mul_(-grad_entropy).add_(factor).mul_(self.p)
        if grad_logprob is not None:
            grad.scatter_add_(1, self.targets[:, None], grad_logprob)
        return grad.mul_(how.projection.slope(self.logits, how.temperature))

    def slopes(self, weight_VD: Tensor, how: _How) -> list[Tensor]:
        """∂ log p_t / ∂h and, if entropies are asked for, ∂H / ∂h, each (n, D)."""
        ones = torch.ones_like(self.norm)
        if how.projection.softcap is None:  # (W_t − Σ_v p_v W_v) s / τ
            difference = weight_VD.index_select(0, self.targets).float() - torch.mm(self.p.to(weight_VD.dtype), weight_VD).float()
            of_logprob = difference.mul_(how.projection.scale / how.temperature)
        else:
            of_logprob = torch.mm(self.grad_raw(ones, None, how).to(weight_VD.dtype), weight_VD)
        if not how.entropy:
            return [of_logprob]
        return [of_logprob, torch.mm(self.grad_raw(None, ones, how).to(weight_VD.dtype), weight_VD)]


def _distributions(
    hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Tensor, how: _How, keep: bool
) -> tuple[_Chunk, Tensor]:
    """The distributions of a chunk and the log-probabilities of its targets, (n,). `keep`: the logits are needed after p.

    At the largest logit z = log p + log Σ exp z, where p ≥ 1/V cannot underflow: so the softmax, one pass, gives the norm too.
    """
    logits = how.projection.logits(F.linear(hidden, weight_VD, bias_V), how.temperature)
    of_target = logits.gather(1, targets[:, None])
    top = logits.amax(-1, keepdim=True)
    p = torch.softmax(logits, -1) if keep else torch.softmax(logits, -1, out=logits)
    norm = top - p.amax(-1, keepdim=True).log()
    return _Chunk(logits, p, norm, targets), (of_target - norm)[:, 0]


def _parts(hidden_ND: Tensor, weight_VD: Tensor, trained: bool) -> list[slice]:
    """The chunks. A trained head takes larger ones: every chunk adds once to the whole gradient of the weight."""
    size = chunk_tokens(len(weight_VD), hidden_ND.device) * (4 if trained else 1)
    return [slice(start, start + size) for start in range(0, len(hidden_ND), size)]


class _PlainHead(torch.autograd.Function):
    """Logits exist for one chunk at a time, in the forward and in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ahead = ctx.needs_input_grad[0] and not trained
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        entropy_N = torch.empty_like(logprobs_N) if how.entropy else logprobs_N.new_empty(0)
        slopes_ND = [torch.empty_like(hidden_ND) for _ in range(1 + how.entropy)] if ahead else []
        keep = how.entropy or how.projection.softcap is not None
        for part in _parts(hidden_ND, weight_VD, trained):
            chunk, logprobs_N[part] = _distributions(hidden_ND[part], weight_VD, bias_V, targets_N[part], how, keep)
            if how.entropy:
                entropy_N[part] = chunk.entropy()[:, 0]
            for slope_ND, slope in zip(slopes_ND, chunk.slopes(weight_VD, how) if ahead else [], strict=True):
                slope_ND[part] = slope
        ctx.how, ctx.trained = how, trained
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*slopes_ND if ahead else (hidden_ND, weight_VD, bias_V, targets_N))
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g[:, None] for g in (grad_logprobs_N, grad_entropy_N if ctx.how.entropy else None)]
        if not ctx.trained:
            parts = [slope * g.to(slope.dtype) for slope, g in zip(ctx.saved_tensors, grads, strict=False) if g is not None]
            return sum(parts[1:], parts[0]) if parts else None, None, None, None, None
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32)
        for part in _parts(hidden_ND, weight_VD, ctx.trained):
            chunk, _ = _distributions(hidden_ND[part], weight_VD, bias_V, targets_N[part], ctx.how, keep=True)
            of_logprob, of_entropy = (None if g is None else g[part] for g in grads)
            grad = chunk.grad_raw(of_logprob, of_entropy, ctx.how)
            grad_bias_V += grad.sum(0)
            grad = grad.to(weight_VD.dtype)
            grad_hidden_ND[part] = grad @ weight_VD
            grad_weight_VD += grad.T @ hidden_ND[part]
        bias = grad_bias_V.to(bias_V.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), bias, None, None
