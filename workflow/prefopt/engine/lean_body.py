"""The layers of a plain Llama over packed rows by their weights alone: what its modules compute, in fewer steps.

The modules of the library spend half of a small model's time outside of products of matrices. Here rotations are
complex products, what stands around products is done in one step of autograd, sizes repeat so that their code is made
once (``products``), and the last layer goes on with the wanted positions alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.engine.lean import is_plain_body
from prefopt.engine.lean_attention import Layout, Readers, attention
from prefopt.engine.lean_steps import gated_product, normed, normed_products
from prefopt.engine.packing import Rows
from prefopt.engine.products import least_of, linear, rows_to_add

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    lay = Layout.of(body, packing, len(hidden))
    more = rows_to_add(len(hidden))
    everywhere = lay.readers(packing.place, more)
    hidden = F.pad(hidden, (0, 0, 0, more))
    *layers, last = body.layers
    for layer in layers:
        hidden = _layer(layer, hidden, hidden, lay, everywhere)
    more = rows_to_add(len(places))
    kept = F.embedding(F.pad(places, (0, more)), hidden)
    hidden = _layer(last, hidden, kept, lay, lay.readers(packing.place[places], more))
    return normed(hidden[: len(places)], body.norm)


def _layer(layer: nn.Module, hidden: Tensor, kept: Tensor, lay: Layout, readers: Readers) -> Tensor:
    """The layer's output [P, H] for tokens [P] whose inputs are ``kept`` [P, H]; hidden [N, H]."""
    mlp, weights = layer.mlp, _side_by_side(layer.self_attn, lay.turns.shape[1])
    (states,) = normed_products(hidden, layer.input_layernorm, weights, least=least_of(hidden))
    kept = kept + linear(attention(states, lay, readers), layer.self_attn.o_proj.weight, least=least_of(kept))
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight)
    gate, up = normed_products(kept, layer.post_attention_layernorm, *weights, least=least_of(kept))
    return kept + gated_product(gate, up, mlp.down_proj.weight, least=least_of(kept))


def _side_by_side(attention: nn.Module, half: int) -> Tensor:
    """Weights of queries, keys and values; the two numbers that turn together stand beside each other."""
    turned = (
        weight.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
        for weight in (attention.q_proj.weight, attention.k_proj.weight)
    )
    return torch.cat([*turned, attention.v_proj.weight])
