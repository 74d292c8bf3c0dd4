"""Products of fp32 matrices on a CPU by oneDNN, which is a part of torch, where torch takes its BLAS library.

Torch multiplies bf16 matrices by oneDNN and fp32 ones by MKL, which on AMD processors reaches less than half of the
rate. oneDNN makes its code for every new size, some tenths of a millisecond: small products stay with torch. Which ones
are small depends on their sizes alone, so that runs repeat. Values differ in the order of sums. The code stays in
memory: unbounded it was half a gigabyte after thirty steps on texts of all lengths.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

REPEATED = 1 << 21  # multiplications of a product that pays where its size comes again and again
_ROUNDED_FROM, _SIZES, _STEP = 256, 8, 64  # rows from which sizes come again; sizes between a power of 2 and the next
_LEAST = 1 << 26  # of one that takes longer than making its code
_MANY, _SMALL_TOTAL = 512, 1 << 22  # rows and elements of a sum that oneDNN cannot add to, but only computes beside it
_BLOCK = 1 << 20  # elements that stand beside the result on their way into it: 4 MB
_CODE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN and of torch beside it
_CODES = 256  # that are kept, of 0.6 MB each and more in the holes between them; 64 steps of a demo policy need 120
_FEW_CODES, _SMALL_MODEL = 48, 1 << 22  # where making code is little beside using it; of how many parameters that is


class Linear(nn.Linear):
    """The library's linear layer with ``linear`` as its product."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


def multiply_by_onednn(model: nn.Module) -> None:
    """Let the model's linear layers compute as ``Linear`` does; adapted and quantized ones stay as they are.

    Before the first product of a process it also bounds of how many sizes oneDNN and torch keep the code.
    """
    codes = _FEW_CODES if sum(p.numel() for p in model.parameters()) > _SMALL_MODEL else _CODES
    for cache in _CODE_CACHES:
        os.environ.setdefault(cache, str(codes))
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more: no adapter or subclass of another library."""
    return type(module) in (nn.Linear, Linear)


def rows_to_add(rows: int) -> int:
    """Rows to add to so many on a CPU, 4 % of many, so that products of few sizes are computed.

    A size costs a millisecond and 0.6 MB for its code.
    """
    return -rows % max(_STEP, (1 << rows.bit_length() - 1) // _SIZES) if rows >= _ROUNDED_FROM else 0


def least_of(values: Tensor) -> int | None:
    """Multiplications of a product of values [R, in] that pays: sizes of many rows are rounded, and come again."""
    return REPEATED if len(values) >= _ROUNDED_FROM else None


def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None, *, least: int | None = None) -> Tensor:
    """values [..., in] @ weight' [out, in] + bias [out], with first gradients; as torch has it for small products.

    Those have fewer than ``least`` multiplications: ``REPEATED`` for sizes that come again and again.
    """
    if not _pays(values, weight, weight.shape[0], least) or torch.is_autocast_enabled("cpu"):
        return F.linear(values, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (values, weight, bias)):
        return _Linear.apply(values, weight, bias, least)
    return _onednn(values, weight, bias)


def product(left: Tensor, right: Tensor, least: int | None = None) -> Tensor:
    """left [M, K] @ right [K, N], without gradients; small ones, see ``linear``, as torch has them."""
    return _onednn(left, right.t()) if _pays(left, right, right.shape[1], least) else left @ right


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """left [M, K] @ right [K, N], without gradients, written to ``out`` [M, N] with little memory beside it."""
    if not _pays(left, right, right.shape[1]):
        torch.mm(left, right, out=out)
        return
    columns = max(1, _BLOCK // len(left))
    for part, block in zip(out.split(columns, dim=1), right.t().split(columns), strict=True):
        part.copy_(_onednn(left, block))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, least: int | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.least = least
        return _onednn(values, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            product(rows, weight, ctx.least).view_as(values) if wanted[0] else None,
            weight_gradient(rows, values.flatten(0, -2), ctx.least) if wanted[1] else None,
            rows.sum(dim=0) if wanted[2] else None,
            None,
        )


def add_weight_gradient(total: Tensor, grad: Tensor, values: Tensor) -> None:
    """total [out, in] += grad' [out, R] @ values [R, in], without gradients."""
    if len(grad) < _MANY or total.numel() > _SMALL_TOTAL or not _pays(grad, values, values.shape[1]):
        total.addmm_(grad.t(), values)
    else:
        total += weight_gradient(grad, values)


def weight_gradient(grad: Tensor, values: Tensor, least: int | None = None) -> Tensor:
    """grad' [out, R] @ values [R, in], without gradients; small ones, see ``linear``, as torch has them.

    oneDNN is faster where the longer side of the result stands second.
    """
    out, inner = grad.shape[1], values.shape[1]
    if out > inner and _pays(values.t(), grad, out, least):
        return _onednn(values.t(), grad.t()).t()
    return product(grad.t(), values, least)


def _pays(values: Tensor, other: Tensor, columns: int, least: int | None = None) -> bool:
    """Whether oneDNN computes this product: plain fp32 matrices on a CPU that are not small."""
    return (
        not torch.compiler.is_compiling()
        and values.dtype == other.dtype == torch.float32
        and values.device.type == other.device.type == "cpu"
        and values.numel() * columns >= (_LEAST if least is None else least)
        and type(other) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def _onednn(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(values), _dense(weight), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, copied where it has gaps: with those, oneDNN is slower by orders of magnitude."""
    return matrix if matrix.dim() == 2 and matrix.t().is_contiguous() else matrix.contiguous()
