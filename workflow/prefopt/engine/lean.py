"""One token per row through a Llama by its weights alone: what its modules compute, without their Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prefopt.engine.products import is_linear, linear

_ROTATIONS = ("default", "linear", "llama3")  # position encodings that do not change with the length


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether the model is a float32 Llama as the library makes it: no adapters, biases, autocast or other parts."""
    if type(model).__name__ != "LlamaForCausalLM":  # spares other models the import
        return False
    from transformers import LlamaForCausalLM

    return type(model) is LlamaForCausalLM and is_plain_body(model.model) and _is_product(model.lm_head)


def is_plain_body(body: PreTrainedModel) -> bool:
    """Whether a body, under whatever head, is a float32 Llama's as above."""
    if type(body).__name__ != "LlamaModel":
        return False
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

    if type(body) is not LlamaModel or "forward" in vars(body) or body.dtype != torch.float32:
        return False
    config, layers = body.config, body.layers
    norms = [body.norm, *(norm for x in layers for norm in (x.input_layernorm, x.post_attention_layernorm))]
    return (
        config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in _ROTATIONS
        and all(type(layer) is LlamaDecoderLayer for layer in layers)
        and all(type(norm) is LlamaRMSNorm for norm in norms)
        and all(_is_product(part) for x in layers for part in x.modules() if hasattr(part, "in_features"))
    )


def _is_product(linear: nn.Module) -> bool:
    return is_linear(linear) and linear.bias is None


class _Layer(NamedTuple):
    """The weights of one layer, collected once, since looking one up in a module costs as much as a small product."""

    attention: nn.Module
    before: Tensor  # norms before attention and before the multilayer perceptron
    between: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def _weights(layer: nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    products = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    parts = (*norms, *products, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return _Layer(attention, *(part.weight for part in parts))


class LeanLlama:
    """Logits [R, V] after one token per row, for positions below ``size``; ``attend`` keeps keys and values.

    attend(module, query, key, value), each [R, heads, 1, d], gives [R, 1, heads, d].
    """

    def __init__(self, model: PreTrainedModel, size: int, attend: Callable[..., Tensor]) -> None:
        body = model.model
        self._attend = attend
        self._eps, self._head_dim = model.config.rms_norm_eps, body.layers[0].self_attn.head_dim
        self._embedding, self._norm, self._head = body.embed_tokens.weight, body.norm.weight, model.lm_head.weight
        self._layers = [_weights(layer) for layer in body.layers]
        cos, sin = body.rotary_emb(self._norm, torch.arange(size, device=self._norm.device)[None])
        first, second = sin[0].chunk(2, dim=-1)
        self._cos, self._sin = cos[0], torch.cat((-first, second), dim=-1)

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits for tokens [R] at positions [R]."""
        hidden = F.embedding(tokens, self._embedding)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        for layer in self._layers:
            hidden = self._layer(layer, hidden, cos, sin)
        return linear(self._normed(hidden, self._norm), self._head)

    def _layer(self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (hidden.shape[0], -1, self._head_dim)
        normed = self._normed(hidden, layer.before)
        query = _rotated(linear(normed, layer.query).view(shape), cos, sin)
        key = _rotated(linear(normed, layer.key).view(shape), cos, sin)
        value = linear(normed, layer.value).view(shape)
        seen = self._attend(layer.attention, query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2))
        hidden = hidden + linear(seen.reshape(hidden.shape[0], -1), layer.out)
        normed = self._normed(hidden, layer.between)
        gated = F.silu(linear(normed, layer.gate), inplace=True).mul_(linear(normed, layer.up))
        return hidden.add_(linear(gated, layer.down))

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.rms_norm(hidden, weight.shape, weight, self._eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [R, heads, d]; sin [R, 1, d] has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
