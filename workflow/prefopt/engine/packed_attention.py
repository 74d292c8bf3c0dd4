"""The attention that packed rows need in place of a model's own, and whether a model works with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prefopt.engine.packing import Packing, Rows, pack, pad
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

EXPLICIT_LENGTH = 64  # up to here a CPU multiplies small matrices faster than it runs its fused attention

_NAME = "prefopt_packed"
_QUERIES = 256  # of one product of scores
_MORE_THAN_CAUSAL = ("sliding_window", "softcap", "s_aux", "position_bias")

_log = logging.getLogger(__name__)
_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def attention_for(model: PreTrainedModel, rows: Rows) -> Iterator[None]:
    """The model with the attention that these rows need: its own one for padded rows."""
    if "packing" not in rows.inputs:
        yield
        return
    from transformers import AttentionInterface

    if _NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(_NAME, _attention)
    with attention_named(model, _NAME):
        yield


def leave_attention_uncompiled() -> None:
    """Let compiled layers call the attention of packed rows as it is: its shapes change with every batch."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, torch.compiler.disable(_attention))


@contextmanager
def attention_named(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with the attention implementation of that name."""
    own = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = own


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within every row; query, key, value [1, heads, N, d] -> [1, N, heads, d]."""
    refuse_more_than_causal(kwargs)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary positions leave queries and keys in fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):
        return _by_group(
            (query, key, value), packing, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout
        ), None


def refuse_more_than_causal(settings: Mapping[str, Any]) -> None:
    """NotImplementedError where a model's layer asks for attention that is more than causal."""
    more = [name for name in _MORE_THAN_CAUSAL if settings.get(name) is not None]
    if more:
        raise NotImplementedError(f"attention with {more[0]}")


def _by_group(heads_of: tuple[Tensor, Tensor, Tensor], packing: Packing, scaling: float, dropout: float) -> Tensor:
    query, key, value = heads_of
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sizes = [rows * length for rows, length in packing.shapes]
    gathered = [F.embedding(packing.token, x[0].transpose(0, 1).flatten(1)).split(sizes) for x in (query, key, value)]
    heads, outs = query.shape[1], []
    for (rows, length), *parts in zip(packing.shapes, *gathered, strict=True):
        q, k, v = (part.view(rows, length, heads, -1).transpose(1, 2) for part in parts)
        outs.append(causal(q, k, v, scaling, dropout).transpose(1, 2).reshape(rows * length, -1))
    out = F.embedding(packing.place, torch.cat(outs))
    return out.view(1, len(out), heads, -1)


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """Causal attention of [S, heads, L, d]; padding stands at the end, where no real token looks."""
    length = query.shape[2]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or (length > EXPLICIT_LENGTH and not half):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    step, outs = -(-length // -(-length // _QUERIES)), []
    for start in range(0, length, step):
        end = min(start + step, length)  # keys after the last of these queries are not looked at
        scores = torch.baddbmm(
            later(length, q.dtype)[start:end, :end], q[:, start:end], k[:, :end].transpose(1, 2), alpha=scaling
        )
        outs.append(torch.bmm(F.dropout(scores.softmax(dim=-1), dropout), v[:, :end]))
    return torch.cat(outs, dim=1).view(*query.shape[:3], -1)


def later(length: int, dtype: torch.dtype) -> Tensor:
    """[L, L], -inf where the key stands after the query, else 0."""
    return _later(1 << (length - 1).bit_length(), dtype)[:length, :length]


@lru_cache
def _later(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def packs(model: PreTrainedModel) -> bool:
    """Whether the model's body gives packed rows the hidden states of padded ones, seen once per model."""
    body = model.base_model
    if body not in _packs:
        reason = _why_not(model)
        _packs[body] = reason is None
        if reason is not None:
            _log.warning("%s: rows are padded, prompts are not shared (%s)", type(model).__name__, reason)
    return _packs[body]


@contextmanager
def padded(model: PreTrainedModel) -> Iterator[None]:
    """The model as if it could not pack, to compare the two ways."""
    before = packs(model)
    _packs[model.base_model] = False
    try:
        yield
    finally:
        _packs[model.base_model] = before


def _why_not(model: PreTrainedModel) -> str | None:
    body = model.base_model
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of {min(kinds)}"
    prompts, responses = [[1, 2, 3], [2]], [[3, 1], [2, 2, 3], [1, 3], [2]]
    hidden = []
    for layout in (pad, pack):
        rows = layout(
            [[token % config.vocab_size for token in prompt] for prompt in prompts],
            [[token % config.vocab_size for token in response] for response in responses],
            model.device,
        )
        try:
            with torch.no_grad(), attention_for(model, rows):
                # the class's own forward, since set_precision wraps that of the instance
                out = type(body).forward(body, **rows.inputs, use_cache=False)[0]
        except Exception as error:  # whatever an unknown architecture makes of what it does not know
            return f"{type(error).__name__}: {error}".splitlines()[0]
        hidden.append(out.flatten(0, 1)[torch.cat([rows.before, rows.last])])
    scale = float(hidden[0].abs().max())
    gap = float((hidden[0] - hidden[1]).abs().max())
    return None if gap <= 1e-4 * scale else f"hidden states differ by {gap / scale:.1g} of the largest"
