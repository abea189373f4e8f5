"""Autograd functions of the CPU path: a linear with its low-rank term, a gated MLP and an RMS norm, over blocks of rows.

What lies between two matrix products (activation, product, low-rank term, casts to float32) is done on rows that are still in the
second-level cache, and only what the backward pass cannot cheaply compute again is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 512  # per thread: threads share a block, and each has a cache of its own


class Weights(NamedTuple):
    """The tensors of y = W x + b + s·U (D x), s given apart; `down` and `up` are None without an adapter."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None


@dataclass
class _Map:
    """An affine map in the type of the computation, with sums of its gradients over blocks of rows."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None  # s·U
    scaling: float
    sums: list[Tensor | None]  # float32: of weight, bias, down, up (transposed); None where no gradient is asked for

    def apply(self, x: Tensor, out: Tensor) -> Tensor | None:
        """Write y (n, out) and return D x (n, rank)."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        if self.down is None or self.up is None:
            return None
        low = torch.mm(x, self.down.t())
        out.addmm_(low, self.up.t())
        return low

    def back(self, grad: Tensor, x: Tensor, low: Tensor | None, into: Tensor | None = None) -> Tensor:
        """The gradient of x, added to `into` if given; gradients of the tensors are added to the sums."""
        grad_x = torch.mm(grad, self.weight) if into is None else into.addmm_(grad, self.weight)
        of_weight, of_bias, of_down, of_up = self.sums
        if self.down is not None and self.up is not None and low is not None:
            grad_low = torch.mm(grad, self.up)
            grad_x.addmm_(grad_low, self.down)
            if of_down is not None:
                of_down += torch.mm(grad_low.t(), x)
            if of_up is not None:
                of_up += torch.mm(low.t(), grad)
        if of_weight is not None:
            of_weight += torch.mm(grad.t(), x)
        if of_bias is not None:
            of_bias += grad.sum(0)
        return grad_x

    def gradients(self, weights: Weights) -> list[Tensor | None]:
        """The sums as gradients of the tensors, in their types."""
        of_weight, of_bias, of_down, of_up = self.sums
        sums = (of_weight, of_bias, of_down, None if of_up is None else of_up.t() * self.scaling)
        return [None if g is None or w is None else g.to(w.dtype) for g, w in zip(sums, weights, strict=True)]


def affine_map(weights: Weights, scaling: float, dtype: torch.dtype, needs_grad: tuple[bool, ...] = (False,) * 4) -> _Map:
    """The map in `dtype`, with sums for the tensors that need a gradient."""
    weight = weights.weight.to(dtype)
    bias, down, up = (None if w is None else w.to(dtype) for w in (weights.bias, weights.down, _scaled(weights.up, scaling)))
    shapes = [None if w is None else w.shape for w in (weight, bias, down, None if up is None else up.t())]
    sums = [
        weight.new_zeros(s, dtype=torch.float32) if s is not None and n else None for s, n in zip(shapes, needs_grad, strict=True)
    ]
    return _Map(weight, bias, down, up, scaling, sums)


def _scaled(up: Tensor | None, scaling: float) -> Tensor | None:
    return None if up is None else up * scaling


def _blocks(n_rows: int, *maps: _Map) -> list[slice]:
    """Rows of a block; more where a whole weight's gradient is summed, which costs a pass over it per block."""
    size = BLOCK_ROWS * torch.get_num_threads() * (8 if any(m.sums[0] is not None for m in maps) else 1)
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


class LoraLinearFunction(torch.autograd.Function):
    """A linear with a low-rank term: (n, in) → (n, out). Keeps the input and D x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, scaling: float, *tensors: Tensor | None) -> Tensor:
        weights = Weights(*tensors)  # type: ignore[arg-type]
        y = x.new_empty(len(x), len(weights.weight), dtype=dtype)
        low = affine_map(weights, scaling, dtype).apply(x.to(dtype), y)
        ctx.dtype, ctx.scaling = dtype, scaling
        ctx.save_for_backward(x, low, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, *tensors = ctx.saved_tensors
        weights = Weights(*tensors)
        linear = affine_map(weights, ctx.scaling, ctx.dtype, ctx.needs_input_grad[3:])
        grad_x = linear.back(grad, x.to(ctx.dtype), low)
        return grad_x.to(x.dtype), None, None, *linear.gradients(weights)


class GatedMlpFunction(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)): (n, D) → (n, D), block by block. Keeps the input, gate(x), up(x) and the low-rank products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, scalings: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        gate, up, down = (affine_map(w, s, dtype) for w, s in zip(_three(tensors), scalings, strict=True))
        gates, ups = (x.new_empty(len(x), len(m.weight), dtype=dtype) for m in (gate, up))
        y = x.new_empty(len(x), len(down.weight), dtype=dtype)
        lows: list[list[Tensor | None]] = [[], [], []]
        for part in _blocks(len(x)):
            block = x[part].to(dtype)
            lows[0].append(gate.apply(block, gates[part]))
            lows[1].append(up.apply(block, ups[part]))
            lows[2].append(down.apply(F.silu(gates[part]).mul_(ups[part]), y[part]))
        joined = [None if not low or low[0] is None else torch.cat(low) for low in lows]  # type: ignore[arg-type]
        ctx.dtype, ctx.scalings = dtype, scalings
        ctx.save_for_backward(x, gates, ups, *joined, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, ups, *rest = ctx.saved_tensors
        low_gate, low_up, low_down = rest[:3]
        weights = _three(rest[3:])
        needs = ctx.needs_input_grad[3:]
        gate, up, down = maps = [
            affine_map(w, s, ctx.dtype, needs[4 * i : 4 * i + 4])
            for i, (w, s) in enumerate(zip(weights, ctx.scalings, strict=True))
        ]
        grad_x = torch.empty_like(x)
        for part in _blocks(len(x), *maps):
            block, lows = x[part].to(ctx.dtype), [None if low is None else low[part] for low in (low_gate, low_up, low_down)]
            active = F.silu(gates[part])
            grad_product = down.back(grad[part], active * ups[part], lows[2])
            grad_up = active.mul_(grad_product)
            grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(ups[part]), gates[part])
            grad_x[part] = up.back(grad_up, block, lows[1], into=gate.back(grad_gate, block, lows[0]))
        return grad_x, None, None, *(g for m, w in zip(maps, weights, strict=True) for g in m.gradients(w))


def _three(tensors: Any) -> list[Weights]:
    """Gate, up and down out of twelve tensors."""
    return [Weights(*tensors[i : i + 4]) for i in (0, 4, 8)]


class RmsNormFunction(torch.autograd.Function):
    """w · x / √(mean x² + ε), in float32 as Llama's, (n, D). Keeps only the input. With r = 1/√…: ∂/∂x = r (g w − x r² mean(g w x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        for part in _blocks(len(x)):
            x32 = x[part].float() if x.dtype != torch.float32 else x[part].clone()
            y[part] = x32.mul_(_rms_inverse(x32, eps))
            y[part].mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        weight32 = weight.float()
        for part in _blocks(len(x)):
            x32, grad32 = x[part].float(), grad[part].float()
            r = _rms_inverse(x32, ctx.eps)
            if grad_weight is not None:
                grad_weight += (grad32 * x32).mul_(r).sum(0)
            scaled = grad32 * weight32
            mean = torch.linalg.vecdot(scaled, x32)[:, None].mul_(r * r / -x.shape[1])
            grad_x[part] = scaled.addcmul_(x32, mean).mul_(r)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _rms_inverse(x32: Tensor, eps: float) -> Tensor:
    return torch.linalg.vecdot(x32, x32)[:, None].div_(x32.shape[1]).add_(eps).rsqrt_()
