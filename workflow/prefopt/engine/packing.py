"""Responses after their prompts, laid end to end: no padding, and a prompt with several responses is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Ids = Sequence[Sequence[int]]

_LONG = 128  # from here on, padding within an attention call costs more than calls do
_GROUP_ROWS, _GROUP_FILL = (8, 2), (0.8, 0.9)  # one call, short and long: at least so many rows, others this long


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
