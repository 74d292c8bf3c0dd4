"""Causal attention over packed rows as one step of autograd: from queries, keys and values of tokens to what they see.

Between tokens and the small products of attention stands one index each way: heads of tokens are copied to their
places in groups of rows of like length, and what they see is read from these places, by token again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from prefopt.engine.packed_attention import EXPLICIT_LENGTH, causal, later
from prefopt.engine.packing import Packing


class Readers(NamedTuple):
    """Who reads what the places of the groups see, head by head."""

    place: Tensor  # [P * heads] that each reader reads
    reader: Tensor  # [sum heads * S * L] the last one that reads a place, P * heads where there is none
    others: Tensor  # readers of places that a later one reads too


@dataclass(frozen=True)
class Layout:
    """Where attention finds the heads: of every group [h, S, L, d], those of queries, of keys and of values."""

    shapes: list[tuple[int, int]]  # [S, L] of every group
    heads: tuple[int, int, int]  # of queries, keys and values
    scaling: float
    token: Tensor  # [sum h * S * L] head of a packed token at each place
    place: Tensor  # [N * h] a place of each head of a packed token
    again: Tensor  # [M - 1, P * h] the other places of those of prompts
    turns: Tensor  # [L, d / 2] exp(i angle) of every position and frequency

    @classmethod
    def of(cls, body: nn.Module, packing: Packing, size: int) -> Layout:
        """The layout of all layers for ``size`` packed tokens."""
        config, device = body.config, packing.token.device
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        head = torch.arange(sum(heads), device=device)
        tokens, places, start = [], [], 0
        for token in packing.token.split([rows * length for rows, length in packing.shapes]):
            tokens.append((token * len(head) + head[:, None]).flatten())
            places.append(_places(len(token), head, start))
            start += len(head) * len(token)
        place = torch.cat(places, dim=1).t().contiguous()  # [sum S * L, h]
        longest = max(length for _, length in packing.shapes)
        return cls(
            packing.shapes,
            heads,
            body.layers[0].self_attn.scaling,
            torch.cat(tokens),
            place[packing.place[:size]].flatten(),
            place[packing.again].flatten(1),
            _turns(body, longest),
        )

    @cached_property
    def _seen(self) -> Tensor:
        """[sum S * L, heads] where what a place sees stands, head by head, in each group [heads, S, L, d]."""
        head, start, places = torch.arange(self.heads[0], device=self.token.device), 0, []
        for rows, length in self.shapes:
            places.append(_places(rows * length, head, start))
            start += len(head) * rows * length
        return torch.cat(places, dim=1).t()

    def readers(self, place: Tensor, more: int) -> Readers:
        """Of tokens at places of the groups [P], and of ``more`` rows after them, which nobody asks for."""
        found = self._seen[place].flatten()
        number = torch.arange(len(found), device=found.device)
        padded = F.pad(found, (0, more * self.heads[0]))
        reader = torch.full((self._seen.numel(),), len(padded), device=found.device)
        reader[found] = number
        return Readers(padded, reader, others=(reader[found] != number).nonzero()[:, 0])

    def groups(self, values: Tensor, heads: tuple[int, ...]) -> list[list[Tensor]]:
        """Views [h, S, L, d] of every group, one for each number of heads h; values [sum h * S * L, d]."""
        parts = iter(values.split([count * rows * length for rows, length in self.shapes for count in heads]))
        return [[next(parts).view(h, rows, length, -1) for h in heads] for rows, length in self.shapes]


def _places(size: int, head: Tensor, start: int) -> Tensor:
    """[h, size] numbers of heads that stand one head after the other."""
    return torch.arange(size, device=head.device) + head[:, None] * size + start


def _turns(body: nn.Module, size: int) -> Tensor:
    like = body.norm.weight
    cos, sin = body.rotary_emb(like, torch.arange(size, device=like.device)[None])
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half])


def attention(states: Tensor, lay: Layout, readers: Readers) -> Tensor:
    """What the readers' tokens see [P, heads * d]; states [N, h * d], two numbers that turn together side by side."""
    return _Attention.apply(states, lay, readers)


class _Attention(torch.autograd.Function):
    """softmax(scaling q k') v within every row, q and k turned by their positions."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, lay: Layout, readers: Readers) -> Tensor:
        width = 2 * lay.turns.shape[1]
        spread = states.view(-1, width).index_select(0, lay.token)
        _turn_(spread, lay, lay.turns)
        seen = states.new_empty(len(readers.reader), width)
        groups = zip(lay.groups(spread, lay.heads), lay.groups(seen, lay.heads[:1]), strict=True)
        see = partial(_Seen.of, scaling=lay.scaling, graded=ctx.needs_input_grad[0])
        ctx.seen = [see(query, key, value, out) for (query, key, value), (out,) in groups]
        ctx.lay, ctx.readers, ctx.size = lay, readers, len(states)
        return seen.index_select(0, readers.place).view(-1, lay.heads[0] * width)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        lay, readers, width = ctx.lay, ctx.readers, 2 * ctx.lay.turns.shape[1]
        by_reader = F.pad(grad.view(-1, width), (0, 0, 0, 1))  # the last for places that nobody reads
        grad_seen = by_reader.index_select(0, readers.reader)
        grad_seen.index_add_(0, readers.place[readers.others], by_reader[readers.others])
        found = grad.new_empty(len(lay.token), width)
        groups = zip(ctx.seen, lay.groups(grad_seen, lay.heads[:1]), lay.groups(found, lay.heads), strict=True)
        for seen, (upper,), out in groups:
            seen.write_gradients(upper, *out)
        ctx.seen = None
        _turn_(found, lay, lay.turns.conj().resolve_conj())
        heads = found.index_select(0, lay.place)
        for places in lay.again:
            heads[: len(places)] += found.index_select(0, places)
        states = heads.view(-1, sum(lay.heads) * width)
        return F.pad(states, (0, 0, 0, ctx.size - len(states))), None, None


@dataclass
class _Seen:
    """What the rows of a group see of each other, kept for its gradients; queries, keys and values [h, S, L, d]."""

    query: Tensor
    key: Tensor  # of as many heads as queries, like values
    value: Tensor
    scaling: float
    weights: Tensor | None  # [h * S, L, L] the softmax, of rows so short that matrices are multiplied
    long: Tensor | None  # of others what they see, with the graph of torch's own attention

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, scaling: float, graded: bool) -> _Seen:
        """softmax(scaling q k') v, written to ``out``; keys and values may have fewer heads."""
        if len(key) < len(query):
            key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        length = query.shape[2]
        if length > EXPLICIT_LENGTH:
            with torch.set_grad_enabled(graded):
                query, key, value = (x.detach().requires_grad_(graded) for x in (query, key, value))
                long = causal(query, key, value, scaling)
            out.copy_(long.detach())
            return cls(query, key, value, scaling, None, long)
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        weights = torch.baddbmm(later(length, q.dtype), q, k.transpose(1, 2), alpha=scaling).softmax(dim=-1)
        torch.bmm(weights, v, out=out.flatten(0, 1))
        return cls(query, key, value, scaling, weights, None)

    def write_gradients(self, upper: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Gradients of queries, keys and values, written to these, for that of what is seen, dO [h, S, L, d].

        With P the softmax, dP = dO v' and dS = P (dP - sum P dP): dv = P' dO, dq = scaling dS k, dk = scaling dS' q.
        """
        if self.weights is None:
            found = torch.autograd.grad(self.long, (self.query, self.key, self.value), upper)
            query.copy_(found[0])
            key.copy_(_summed(found[1], len(key)))
            value.copy_(_summed(found[2], len(value)))
            return
        weights, (q, k, v, o) = self.weights, (x.flatten(0, 1) for x in (self.query, self.key, self.value, upper))
        dscores = torch.ops.aten._softmax_backward_data(torch.bmm(o, v.transpose(1, 2)), weights, -1, o.dtype)
        dscores.mul_(self.scaling)
        torch.bmm(dscores, k, out=query.flatten(0, 1))
        for out, left, right in ((key, dscores, q), (value, weights, o)):
            if len(out) == len(query):
                torch.bmm(left.transpose(1, 2), right, out=out.flatten(0, 1))
            else:
                out.copy_(_summed(torch.bmm(left.transpose(1, 2), right).view_as(query), len(out)))


def _summed(grad: Tensor, heads: int) -> Tensor:
    """[h, S, L, d] over the queries' heads that share a head of keys or values: [heads, S, L, d]."""
    return grad.unflatten(0, (heads, -1)).sum(dim=1)


def _turn_(spread: Tensor, lay: Layout, turns: Tensor) -> None:
    """Queries and keys times ``turns``, in place, neighbours taken for complex numbers."""
    numbers, start = torch.view_as_complex(spread.unflatten(1, (-1, 2))), 0
    for rows, length in lay.shapes:
        end = start + sum(lay.heads[:2]) * rows * length
        numbers[start:end].view(-1, length, turns.shape[1]).mul_(turns[:length])
        start = end + lay.heads[2] * rows * length
