"""Scores of whole tables: rows in length-grouped batches, without gradients, put back in the table's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prefopt.progress import Progress
from prefopt.scoring import length_batches, response_scores, reward_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[Sequence[int]]

SIDES = ("chosen", "rejected")
_CPU_TOKENS = 2048  # of one pass: larger ones gain nothing on a CPU and leave its caches


def _batches(model: PreTrainedModel, prompt_ids: Ids, responses: Sequence[Ids], batch_size: int, what: str):
    """Rows by length, their prompts, and all responses to them, the first of every row before the second."""
    lengths = [len(prompt) + sum(map(len, answers)) for prompt, *answers in zip(prompt_ids, *responses, strict=True)]
    budget = _CPU_TOKENS if model.device.type == "cpu" else None
    batches = list(_by_length(lengths, max(1, batch_size // len(responses)), budget))
    with Progress(len(batches), what) as bar:
        for rows in batches:
            yield rows, [prompt_ids[row] for row in rows], [ids[row] for ids in responses for row in rows]
            bar.advance()


def _by_length(lengths: Sequence[int], size: int, tokens: int | None) -> Iterator[list[int]]:
    """Row numbers, longest rows first, at most ``size`` rows and ``tokens`` tokens at a time, a longer row alone."""
    part, used = [], 0
    for (row,) in length_batches(lengths, 1):
        if part and (len(part) == size or (tokens is not None and used + lengths[row] > tokens)):
            yield part
            part, used = [], 0
        part.append(row)
        used += lengths[row]
    if part:
        yield part


def score_responses(
    model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int
) -> dict[str, np.ndarray]:
    """``logp`` (nats, summed), ``tokens`` (count) and ``entropy`` (mean nats per token) of every response, each [N]."""
    return {name: values[:, 0] for name, values in _score(model, prompt_ids, [response_ids], batch_size).items()}


def score_pairs(
    model: PreTrainedModel, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids, *, batch_size: int
) -> dict[str, np.ndarray]:
    """What ``score_responses`` tells of chosen and rejected responses, as ``chosen_logp`` and so on, each [N].

    Both are scored in one pass, at most ``batch_size`` responses at a time, with the prompt computed once.
    """
    found = _score(model, prompt_ids, [chosen_ids, rejected_ids], batch_size)
    return {f"{side}_{name}": values[:, at] for at, side in enumerate(SIDES) for name, values in found.items()}


def _score(model: PreTrainedModel, prompt_ids: Ids, responses: Sequence[Ids], batch_size: int) -> dict[str, np.ndarray]:
    """Each [N, responses per prompt]."""
    import torch

    shape = len(prompt_ids), len(responses)
    out = {"logp": np.empty(shape), "tokens": np.empty(shape, dtype=np.int64), "entropy": np.empty(shape)}
    with torch.no_grad():
        for rows, prompts, answers in _batches(model, prompt_ids, responses, batch_size, "score"):
            scores = response_scores(model, prompts, answers, entropy=True)
            for name, column in out.items():
                column[rows] = getattr(scores, name).view(len(responses), -1).T.cpu().numpy()
    return out


def reward_responses(model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int) -> np.ndarray:
    """Reward of every response [N]."""
    return _reward(model, prompt_ids, [response_ids], batch_size)[:, 0]


def reward_pairs(
    model: PreTrainedModel, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids, *, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of chosen and of rejected responses, each [N], or [N, K] for K heads on one body; passes as above."""
    found = _reward(model, prompt_ids, [chosen_ids, rejected_ids], batch_size)
    return found[:, 0], found[:, 1]


def _reward(model: PreTrainedModel, prompt_ids: Ids, responses: Sequence[Ids], batch_size: int) -> np.ndarray:
    """[N, responses per prompt], or [N, responses per prompt, K]."""
    import torch

    out = None
    with torch.no_grad():
        for rows, prompts, answers in _batches(model, prompt_ids, responses, batch_size, "reward"):
            scores = reward_scores(model, prompts, answers)
            scores = scores.unflatten(0, (len(responses), -1)).transpose(0, 1).cpu().numpy()
            if out is None:
                out = np.empty((len(prompt_ids), *scores.shape[1:]))
            out[rows] = scores
    return out
