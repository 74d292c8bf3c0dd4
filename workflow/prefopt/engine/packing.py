"""Responses after their prompts, laid end to end: no padding, and a prompt with several responses is computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

Ids = Sequence[Sequence[int]]

_NAME = "prefopt_packed"
EXPLICIT_LENGTH = 64  # up to here a CPU multiplies small matrices faster than it runs its fused attention
_QUERIES = 256  # of one product of scores
_LONG = 128  # from here on, padding within an attention call costs more than calls do
_GROUP_ROWS, _GROUP_FILL = (8, 2), (0.8, 0.9)  # one call, short and long: at least so many rows, others this long
_NOT_PACKED = ("sliding_window", "softcap", "s_aux", "position_bias")  # attention that is more than causal

_log = logging.getLogger(__name__)
_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rows:
    """Rows as a model's body takes them, and where in its flattened output [B * L, H] their responses stand."""

    inputs: dict[str, Any]  # of the body
    before: Tensor  # [R] the token before each response token, responses in row order
    target: Tensor  # [R] the token itself
    last: Tensor  # [N] the last token of each row
    tokens: Tensor  # [N] response tokens
    mask: Tensor  # [N, T] 1 on response tokens


@dataclass(frozen=True)
class Packing:
    """Where attention finds the rows: groups of rows of like length, each row padded to its group's longest."""

    shapes: list[tuple[int, int]]  # [S, L] of every group
    token: Tensor  # [sum S * L] packed token at each place of the groups, 0 where there is padding
    place: Tensor  # [N] a place of each packed token
    again: Tensor  # [M - 1, P] the other places of the prompts' tokens, which are packed first, with M responses each


def pad(prompt_ids: Ids, response_ids: Ids, device: torch.device) -> Rows:
    """One right-padded row of prompt and response per response.

    Row i has prompt i modulo their number. Raises ValueError for an empty prompt or response, and where the number of
    responses is no multiple of that of prompts.
    """
    prompt_ids = [*prompt_ids] * _responses_per_prompt(prompt_ids, response_ids)
    starts, tokens = _lengths(prompt_ids), _lengths(response_ids)
    lengths = starts + tokens
    column = np.arange(lengths.max())
    real = column < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = _flat([part for row in zip(prompt_ids, response_ids, strict=True) for part in row])
    response = np.flatnonzero(real & (column >= starts[:, None]))
    return _rows(
        {"input_ids": ids, "attention_mask": real.astype(np.int64)},
        before=response - 1,
        target=ids.ravel()[response],
        last=np.arange(len(lengths)) * len(column) + lengths - 1,
        tokens=tokens,
        device=device,
    )


def pack(prompt_ids: Ids, response_ids: Ids, device: torch.device, *, multiple: int = 1) -> Rows:
    """All prompts and then all responses in one row of N tokens, without padding; rows and errors as in ``pad``.

    ``multiple``: N and lengths within attention are rounded up to multiples of it, for products that have to be
    compiled for every new size. The body needs ``attention_for`` around it.
    """
    repeats = _responses_per_prompt(prompt_ids, response_ids)
    starts, tokens = _lengths(prompt_ids), _lengths(response_ids)
    ids = _flat([*prompt_ids, *response_ids])
    size = starts.sum()
    prompt_at = np.tile(np.cumsum(starts) - starts, repeats)
    response_at = size + np.cumsum(tokens) - tokens
    before = np.arange(size, len(ids)) - 1
    starts = np.tile(starts, repeats)
    before[response_at - size] = prompt_at + starts - 1
    token, shapes = _grouped(prompt_at, starts, response_at, tokens, multiple)
    real = token >= 0
    target = ids[size:]
    ids = np.pad(ids, (0, -len(ids) % multiple))
    places = np.flatnonzero(real)
    places = places[np.argsort(token[places], kind="stable")]
    *again, place = places[: size * repeats].reshape(size, repeats).T
    place = np.pad(np.concatenate([place, places[size * repeats :]]), (0, -len(place) - len(target) + len(ids)))
    positions = np.zeros_like(ids)
    positions[token[real]] = np.concatenate([np.tile(np.arange(length), rows) for rows, length in shapes])[real]
    rows = _rows(
        {"input_ids": ids[None], "position_ids": positions[None]},
        before=before,
        target=target,
        last=response_at + tokens - 1,
        tokens=tokens,
        device=device,
    )
    token[~real] = 0
    others = np.array(again, dtype=np.int64).reshape(-1, size)
    rows.inputs["packing"] = Packing(shapes, *(torch.from_numpy(x).to(device) for x in (token, place, others)))
    return rows


def _grouped(
    prompt_at: np.ndarray, starts: np.ndarray, response_at: np.ndarray, tokens: np.ndarray, multiple: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Packed token at each place of the groups, -1 where there is padding, and the groups' shapes."""
    lengths = starts + tokens
    found, shapes = [], []
    for group in _groups(lengths):
        column, start = np.arange(-(-lengths[group[0]] // multiple) * multiple), starts[group, None]
        token = np.where(column < start, prompt_at[group, None] + column, response_at[group, None] + column - start)
        token[column >= lengths[group, None]] = -1
        found.append(token.ravel())
        shapes.append(token.shape)
    return np.concatenate(found), shapes


def _groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Row numbers by falling length, cut where rows become much shorter than the first of their group."""
    order = np.argsort(-lengths, kind="stable")
    starts = [0]
    for at, length in enumerate(lengths[order].tolist()):
        longest = lengths[order[starts[-1]]]
        long = int(longest > _LONG)
        if at - starts[-1] >= _GROUP_ROWS[long] and length < _GROUP_FILL[long] * longest:
            starts.append(at)
    return np.split(order, starts[1:])


def _responses_per_prompt(prompt_ids: Ids, response_ids: Ids) -> int:
    prompts, responses = len(prompt_ids), len(response_ids)
    if not prompts or not responses or responses % prompts:
        raise ValueError(f"{responses} responses to {prompts} prompts; every prompt needs as many as the others")
    for row, response in enumerate(response_ids):
        prompt = prompt_ids[row % prompts]
        if len(prompt) == 0 or len(response) == 0:
            raise ValueError(f"row {row}: {len(prompt)} prompt and {len(response)} response tokens; both need one")
    return responses // prompts


def _lengths(ids: Ids) -> np.ndarray:
    return np.array([len(row) for row in ids])


def _flat(ids: Ids) -> np.ndarray:
    return np.fromiter(chain.from_iterable(ids), dtype=np.int64)


def _rows(
    inputs: dict[str, np.ndarray],
    *,
    before: np.ndarray,
    target: np.ndarray,
    last: np.ndarray,
    tokens: np.ndarray,
    device: torch.device,
) -> Rows:
    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    mask = np.arange(tokens.max()) < tokens[:, None]
    given = {name: tensor(values) for name, values in inputs.items()}
    return Rows(given, tensor(before), tensor(target), tensor(last), tensor(tokens), tensor(mask))


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
    more = [name for name in _NOT_PACKED if kwargs.get(name) is not None]
    if more:
        raise NotImplementedError(f"attention with {more[0]}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary positions leave queries and keys in fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):
        return _by_group(
            (query, key, value), packing, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout
        ), None


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
