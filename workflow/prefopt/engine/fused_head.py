"""Head, log-softmax and gather as one step of autograd, chunk by chunk: logits of all positions never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefopt.engine.products import add_weight_gradient, product, product_into

_CHUNK_LOGITS = 1 << 21  # of one chunk on a CPU: 8 MB in fp32, which its caches still hold
_FEWEST_TOKENS, _MOST_TOKENS = 128, 1024  # of one chunk
_KEPT_BYTES = 1 << 26  # probabilities that are kept for the backward pass; what is larger is computed again
_WIDER = 4  # chunks of the backward pass, where probabilities were kept, against those of the forward pass


def token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    entropy: bool = False,
    low: torch.dtype | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden W' + b)[target], nats [R], and at choice the entropy of each distribution [R].

    hidden [R, H], weight [V, H], bias [V], target [R]. Logits, log-probabilities and entropies are at least fp32; on a
    CPU their products are of the weight's type, on a GPU of type ``low``. Gradients are products of type ``low``
    (default: the weight's), added up in at least fp32. d logp[target] / d logits = 1[target] - p and
    d entropy / d logits = -p (log p + entropy).
    """
    low = low or weight.dtype
    size = hidden.shape[0] * weight.shape[0] * low.itemsize
    keep = torch.is_grad_enabled() and not entropy and size <= _KEPT_BYTES
    chunk = chunk_tokens or _chunk_of(weight)
    logp, nats = _TokenLogp.apply(hidden, weight, bias, target, entropy, low, chunk, keep)
    return logp, nats if entropy else None


def _chunk_of(weight: Tensor) -> int:
    if weight.device.type != "cpu":
        return _MOST_TOKENS
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, _CHUNK_LOGITS // weight.shape[0]))


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - as autograd calls it
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        entropy: bool,
        low: torch.dtype,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        kept = torch.empty((len(hidden), len(weight)), dtype=low, device=hidden.device) if keep else None
        factor = _inputs(weight, low)
        first, second = (_room(hidden, weight, chunk) for _ in range(2))
        found = []
        with torch.autocast(hidden.device.type, enabled=False):
            for at in _slices(len(hidden), chunk):
                logits = _logits(hidden[at], factor, bias, first)
                p = torch.softmax(logits, dim=-1, out=second[: len(logits)])
                log_total = logits.amax(dim=-1) - p.amax(dim=-1).log()  # log sum exp
                logp = logits.gather(1, target[at, None]).squeeze(1) - log_total
                if keep:
                    kept[at] = p
                nats = log_total - p.mul_(_finite_(logits)).sum(dim=-1) if entropy else torch.zeros_like(logp)
                found.append((logp, nats, log_total))
        logp, nats, log_total = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, target, log_total, nats, kept)
        ctx.low, ctx.chunk = low, chunk
        return logp, nats

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_nats: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_total, nats, kept = ctx.saved_tensors
        low, needed = ctx.low, ctx.needs_input_grad
        inputs, sides = hidden.to(low), weight.to(low)
        factor = _inputs(weight, low)
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=_at_least_fp32(weight.dtype)) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=_at_least_fp32(bias.dtype)) if needed[2] else None
        chunk = ctx.chunk if kept is None else _WIDER * ctx.chunk
        slopes = torch.zeros_like(log_total) if grad_logp is None else grad_logp
        first, second = (_room(hidden, weight, chunk) if kept is None else None for _ in range(2))
        lower = second if second is not None and second.dtype == low else _room(hidden, weight, chunk, low)
        with torch.autocast(hidden.device.type, enabled=False):
            for at in _slices(len(hidden), chunk):
                slope = slopes[at]
                d = lower[: len(slope)]
                if kept is None:
                    log_p = _logits(hidden[at], factor, bias, first).sub_(log_total[at, None])
                    p = torch.exp(log_p, out=second[: len(log_p)])
                    if grad_nats is not None:
                        log_p = _finite_(log_p).add_(nats[at, None]).mul_(p).mul_(grad_nats[at, None])
                    p.mul_(-slope[:, None])
                    d.copy_(p if grad_nats is None else p.sub_(log_p))
                else:
                    torch.mul(kept[at], -slope[:, None].to(low), out=d)
                d[torch.arange(len(d), device=d.device), target[at]] += slope.to(low)
                if grad_hidden is not None:
                    grad_hidden[at] = _product(d, sides)
                if grad_weight is not None:
                    _add_gradient(grad_weight, d, inputs[at])
                if grad_bias is not None:
                    grad_bias += d.sum(dim=0, dtype=grad_bias.dtype)
        grads = (grad_hidden, _like(grad_weight, weight), _like(grad_bias, bias))
        return *grads, None, None, None, None, None


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]


def _inputs(weight: Tensor, low: torch.dtype) -> Tensor:
    """The weight as the logits' products take it: a GPU multiplies ``low`` values into fp32, a CPU cannot."""
    return weight.to(low) if weight.is_cuda else weight


def _room(hidden: Tensor, weight: Tensor, chunk: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for one chunk of logits, used by every chunk: what is allocated anew is paged in anew, chunk by chunk."""
    dtype = dtype or _at_least_fp32(weight.dtype)
    return torch.empty((min(chunk, len(hidden)), len(weight)), dtype=dtype, device=hidden.device)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    logits = room[: len(hidden)]
    if weight.dtype == room.dtype:
        product_into(logits, hidden.to(weight.dtype), weight.t())
    else:
        logits.copy_(_product(hidden.to(weight.dtype), weight.t()))
    return logits if bias is None else logits.add_(bias)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in at least fp32, unrounded where the device can."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    found = product(left, right)
    return found.to(_at_least_fp32(found.dtype))


def _add_gradient(total: Tensor, grad: Tensor, values: Tensor) -> None:
    """total += grad' @ values, in place where the types allow it."""
    if total.dtype == grad.dtype:
        add_weight_gradient(total, grad, values)
    else:
        total += _product(grad.t(), values)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _finite_(values: Tensor) -> Tensor:
    """For products with probabilities, in place: 0 log 0 = 0 for tokens that a model rules out with -inf."""
    return values.clamp_(min=torch.finfo(values.dtype).min)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)
