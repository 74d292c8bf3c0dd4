"""Norms, gates and products after them, each one step of autograd that keeps its inputs and computes the rest again.

What is computed again for the backward pass are sums, roots and sigmoids over matrices that were just read: a fiftieth
of a layer's time, and two fifths of what its steps would keep. No product is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from prefopt.engine.products import linear, product, weight_gradient


def normed(states: Tensor, norm: nn.Module) -> Tensor:
    """The root-mean-square norm of states [N, H]."""
    return _Normed.apply(states, norm.weight, norm.variance_epsilon)


def normed_products(states: Tensor, norm: nn.Module, *weights: Tensor, least: int | None) -> tuple[Tensor, ...]:
    """norm(states) @ weight' of states [N, H] and every weight [out, H]; ``least`` as in ``products.linear``."""
    return _NormedProducts.apply(states, norm.weight, norm.variance_epsilon, least, *weights)


def gated_product(gate: Tensor, up: Tensor, weight: Tensor, *, least: int | None) -> Tensor:
    """(silu(gate) * up) @ weight' of gate and up [N, I] and weight [H, I]; ``least`` as in ``products.linear``."""
    return _GatedProduct.apply(gate, up, weight, least)


def _inverse_root(states: Tensor, epsilon: float) -> Tensor:
    """1 / r [N, 1] with r = sqrt(mean x^2 + epsilon)."""
    norm = torch.linalg.vector_norm(states, dim=1, keepdim=True)
    return norm.square_().div_(states.shape[1]).add_(epsilon).rsqrt_()


def _norm_gradients(grad: Tensor, scaled: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx = (w dy - (x / r) mean(w dy x / r)) / r and dw = sum dy x / r for y = w x / r; ``scaled`` is x / r."""
    both = grad * scaled
    mean = (both @ weight)[:, None] / len(weight)
    return (grad * weight).addcmul_(scaled, mean, value=-1).mul_(inverse), both.sum(dim=0)


class _Normed(torch.autograd.Function):
    """y = w x / r."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = _inverse_root(states, epsilon)
        ctx.save_for_backward(states, inverse, weight)
        return (states * inverse).mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, inverse, weight = ctx.saved_tensors
        return *_norm_gradients(grad, states * inverse, inverse, weight), None


class _NormedProducts(torch.autograd.Function):
    """y W' for every weight W, with y = w x / r."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, scale: Tensor, epsilon: float, least: int | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        inverse = _inverse_root(states, epsilon)
        ctx.save_for_backward(states, inverse, scale, *weights)
        ctx.least = least
        values = (states * inverse).mul_(scale)
        return tuple(linear(values, weight, least=least) for weight in weights)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, inverse, scale, *weights = ctx.saved_tensors
        scaled = states * inverse
        values = scaled * scale
        given = list(zip(grads, weights, ctx.needs_input_grad[4:], strict=True))
        of_weights = [weight_gradient(grad, values, ctx.least) if wanted else None for grad, _, wanted in given]
        total, *others = (product(grad, weight, ctx.least) for grad, weight, _ in given)
        for other in others:
            total += other
        return *_norm_gradients(total, scaled, inverse, scale), None, None, *of_weights


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) W'."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, least: int | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.least = least
        return linear(F.silu(gate).mul_(up), weight, least=least)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        opened = F.silu(gate)
        of_weight = weight_gradient(grad, opened * up, ctx.least) if ctx.needs_input_grad[2] else None
        part = product(grad, weight, ctx.least)
        of_up = opened.mul_(part)
        return torch.ops.aten.silu_backward(part.mul_(up), gate), of_up, of_weight, None
