"""The layers of a plain Llama over packed rows by their weights alone: what its modules compute, in fewer steps.

The modules of the library spend half of a small model's time outside of products of matrices. Here rotations are
complex products, what stands around products is done in one step of autograd, sizes repeat so that their code is made
once (``products``), and the last layer goes on with the wanted positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from prefopt.engine.lean import is_plain_body
from prefopt.engine.lean_steps import gated_product, normed, normed_products
from prefopt.engine.packing import Packing, Rows, causal
from prefopt.engine.products import REPEATED, linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MULTIPLE = 64  # sizes of products
_FEWEST = 512  # tokens from which sizes are rounded up


def runs_lean(model: PreTrainedModel, rows: Rows) -> bool:
    """Whether ``lean_states`` is what the body gives: packed rows, and layers that nobody changes or hooks."""
    body = model.base_model
    return (
        "packing" in rows.inputs
        and body.device.type == "cpu"
        and is_plain_body(body)
        and not body.training
        and not torch.is_autocast_enabled("cpu")
        and not any("forward" in vars(part) or _hooked(part) for layer in body.layers for part in layer.modules())
    )


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def lean_states(model: PreTrainedModel, rows: Rows, places: Tensor) -> Tensor:
    """Last hidden states [P, H] of the packed tokens at ``places`` [P]."""
    body, packing = model.base_model, rows.inputs["packing"]
    hidden = body.embed_tokens(rows.inputs["input_ids"])[0]
    lay = _Layout.of(body, packing, len(hidden))
    everywhere = F.pad(packing.place, (0, _more(len(hidden))))
    hidden = F.pad(hidden, (0, 0, 0, _more(len(hidden))))
    *layers, last = body.layers
    for layer in layers:
        hidden = _layer(layer, hidden, hidden, lay, everywhere)
    wanted = F.pad(places, (0, _more(len(places))))
    hidden = _layer(last, hidden, F.embedding(wanted, hidden), lay, packing.place[wanted])
    return normed(hidden[: len(places)], body.norm)


def _more(size: int) -> int:
    """Rows to add, so that products of few sizes are computed."""
    return -size % _MULTIPLE if size >= _FEWEST else 0


@dataclass(frozen=True)
class _Layout:
    """Where attention finds the heads: of every group [h, S, L, d], those of queries, of keys and of values."""

    shapes: list[tuple[int, int]]  # [S, L] of every group
    heads: tuple[int, int, int]  # of queries, keys and values
    token: Tensor  # [sum h * S * L] head of a packed token at each place
    place: Tensor  # [N * h] a place of each head of a packed token
    again: Tensor  # [M - 1, P * h] the other places of those of prompts
    turns: Tensor  # [L, d / 2] exp(i angle) of every position and frequency

    @classmethod
    def of(cls, body: nn.Module, packing: Packing, size: int) -> _Layout:
        """The layout of all layers for ``size`` packed tokens."""
        config, device = body.config, packing.token.device
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        head = torch.arange(sum(heads), device=device)
        tokens, places, start = [], [], 0
        for token in packing.token.split([rows * length for rows, length in packing.shapes]):
            tokens.append((token * len(head) + head[:, None]).flatten())
            places.append(torch.arange(len(token), device=device) + head[:, None] * len(token) + start)
            start += len(head) * len(token)
        place = torch.cat(places, dim=1).t().contiguous()  # [sum S * L, h]
        longest = max(length for _, length in packing.shapes)
        return cls(
            packing.shapes,
            heads,
            torch.cat(tokens),
            place[packing.place[:size]].flatten(),
            place[packing.again].flatten(1),
            _turns(body, longest),
        )


def _turns(body: nn.Module, size: int) -> Tensor:
    like = body.norm.weight
    cos, sin = body.rotary_emb(like, torch.arange(size, device=like.device)[None])
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half])


def _layer(layer: nn.Module, hidden: Tensor, kept: Tensor, lay: _Layout, place: Tensor) -> Tensor:
    """The layer's output [P, H] at places of the groups [P], whose inputs are ``kept`` [P, H]; hidden [N, H]."""
    attention, mlp = layer.self_attn, layer.mlp
    weights = _side_by_side(attention, lay.turns.shape[1])
    (states,) = normed_products(hidden, layer.input_layernorm, weights, least=_least(hidden))
    seen = F.embedding(place, _attention(states, lay, attention.scaling))
    kept = kept + linear(seen, attention.o_proj.weight, least=_least(kept))
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight)
    gate, up = normed_products(kept, layer.post_attention_layernorm, *weights, least=_least(kept))
    return kept + gated_product(gate, up, mlp.down_proj.weight, least=_least(kept))


def _least(states: Tensor) -> int | None:
    """Multiplications of a product of states [N, H] that pays: sizes of many tokens are rounded, and come again."""
    return REPEATED if len(states) >= _FEWEST else None


def _side_by_side(attention: nn.Module, half: int) -> Tensor:
    """Weights of queries, keys and values; the two numbers that turn together stand beside each other."""
    turned = (
        weight.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
        for weight in (attention.q_proj.weight, attention.k_proj.weight)
    )
    return torch.cat([*turned, attention.v_proj.weight])


def _attention(states: Tensor, lay: _Layout, scaling: float) -> Tensor:
    """Attention [sum S * L, heads * d] at all places of the groups; states [N, h * d]."""
    sizes = [heads * rows * length for rows, length in lay.shapes for heads in lay.heads]
    parts = iter(_Spread.apply(states, lay).split(sizes))
    repeats, outs = lay.heads[0] // lay.heads[1], []
    for rows, length in lay.shapes:
        query, key, value = (next(parts).view(heads, rows, length, -1) for heads in lay.heads)
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=0), value.repeat_interleave(repeats, dim=0)
        outs.append(causal(query, key, value, scaling).permute(1, 2, 0, 3).reshape(rows * length, -1))
    return torch.cat(outs)


class _Spread(torch.autograd.Function):
    """Heads at all places of the groups [sum h * S * L, d], queries and keys turned by their positions."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, lay: _Layout) -> Tensor:
        ctx.lay, ctx.size = lay, len(states)
        spread = states.view(-1, 2 * lay.turns.shape[1]).index_select(0, lay.token)
        _turn(spread, spread, lay, lay.turns)
        return spread

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        lay = ctx.lay
        turned = grad.clone()
        _turn(grad, turned, lay, lay.turns.conj().resolve_conj())
        heads = turned.index_select(0, lay.place)
        for places in lay.again:
            heads[: len(places)] += turned.index_select(0, places)
        states = heads.view(-1, sum(lay.heads) * grad.shape[1])
        return F.pad(states, (0, 0, 0, ctx.size - len(states))), None


def _turn(spread: Tensor, out: Tensor, lay: _Layout, turns: Tensor) -> None:
    """Queries and keys times ``turns``, neighbours taken for complex numbers, written to ``out``."""
    given, found = (torch.view_as_complex(x.unflatten(1, (-1, 2))) for x in (spread, out))
    start = 0
    for rows, length in lay.shapes:
        end = start + sum(lay.heads[:2]) * rows * length
        shape = (-1, length, turns.shape[1])
        torch.mul(given[start:end].view(shape), turns[:length], out=found[start:end].view(shape))
        start = end + lay.heads[2] * rows * length
