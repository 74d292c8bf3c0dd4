"""Keys and values of responses in progress, in tensors that grow with them, and the attention that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from prefopt.engine.packed_attention import EXPLICIT_LENGTH, attention_named, refuse_more_than_causal

_NAME = "prefopt_decoding"
_MORE = 16  # slots of new tokens that are made at a time: most rows end before the last ones are needed


@dataclass
class Cache:
    """Keys and values [R, heads, slots, d] of every attention layer. Prompts end, right-aligned, at slot ``prompt``."""

    rows: int
    prompt: int
    size: int  # slots that are needed at most
    bias: Tensor | None  # [R, 1, prompt] -inf before a prompt's first token, else 0; None where there is no such slot
    filled: int = 0
    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    group: Group | None = None  # the prompts that are being read, None once tokens are written

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep keys and values [S, heads, L, d] of a group of prompts, for all rows with these prompts."""
        if module not in self.layers:
            self.layers[module] = self._more(key, self.prompt), self._more(value, self.prompt)
        if self.group is None:
            raise ValueError("no prompts are being read: begin with a group")
        start = self.prompt - key.shape[2]
        for kept, new in zip(self.layers[module], (key, value), strict=True):
            kept[self.group.rows, :, :start] = 0  # padding has no weight, which whatever stood there could undo
            kept[self.group.rows, :, start : self.prompt] = new[self.group.prompt]

    def _more(self, like: Tensor, filled: int) -> Tensor:
        """Room for these rows, nothing in it yet: ``filled`` slots and some new ones."""
        return like.new_empty(self.rows, like.shape[1], min(self.size, filled + _MORE), like.shape[3])

    def append(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [R, heads, 1, d] of the newest token; all so far, [R, heads, L, d]."""
        now = self.filled
        if now == self.layers[module][0].shape[2]:
            self.layers[module] = self._grown(self.layers[module][0]), self._grown(self.layers[module][1])
        found = []
        for kept, new in zip(self.layers[module], (key, value), strict=True):
            kept[:, :, now] = new[:, :, 0]
            found.append(kept[:, :, : now + 1])
        return found[0], found[1]

    def _grown(self, kept: Tensor) -> Tensor:
        more = self._more(kept, self.filled)
        more[:, :, : self.filled] = kept
        return more

    def keep(self, going: Tensor) -> Tensor:
        """Keep the rows where ``going`` [R] is true; the old number of each row from now on."""
        left = int(going.sum())
        order = torch.arange(left, device=going.device)
        holes = (~going[:left]).nonzero()[:, 0]
        order[holes] = movers = left + going[left:].nonzero()[:, 0]
        for module, layer in self.layers.items():
            for kept in layer:
                kept[holes, :, : self.filled] = kept[movers, :, : self.filled]
            self.layers[module] = layer[0][:left], layer[1][:left]
        if self.bias is not None:
            self.bias = self.bias[order]
        self.rows = left
        return order


@dataclass(frozen=True)
class Group:
    """Different prompts of like length, and the batch's rows that have them."""

    prompts: Sequence[Sequence[int]]
    rows: Tensor  # [N] row of the batch
    prompt: Tensor  # [N] its prompt's place in ``prompts``
    seen: Tensor | None  # [S, 1, L, L] which tokens a token sees; None where it is all before it


@contextmanager
def attention_set(model: PreTrainedModel) -> Iterator[None]:
    """The model with the attention that fills and reads a cache of ours."""
    AttentionInterface.register(_NAME, attention)
    with attention_named(model, _NAME):
        yield


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    decoding: Cache,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of prompts to themselves, or of one new token per row to all before it; [R, heads, L, d]."""
    refuse_more_than_causal(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.shape[1] != key.shape[1]
    if decoding.group is not None:
        decoding.store(module, key, value)
        seen = decoding.group.seen
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    key, value = decoding.append(module, key, value)
    if query.device.type == "cpu" and key.shape[2] <= EXPLICIT_LENGTH:
        return _explicit(query, key, value, decoding.bias, scaling), None
    seen = None
    if decoding.bias is not None:
        seen = F.pad(decoding.bias, (0, key.shape[2] - decoding.prompt))[:, None].to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _explicit(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of [R, heads, 1, d] to [R, fewer heads, L, d] by two products of matrices; [R, 1, heads, d]."""
    rows, heads, _, _ = query.shape
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm((query * scaling).reshape(len(key), heads * rows // len(key), -1), key.transpose(1, 2))
    if bias is not None:
        scores.view(rows, heads, -1)[:, :, : bias.shape[2]].add_(bias)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return torch.bmm(weights, value).view(rows, 1, heads, -1)
