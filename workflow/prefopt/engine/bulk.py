"""Scores of whole tables: rows in length-grouped batches, without gradients, put back in the table's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.processes.rows import Column, Kept, over_batches
from prefopt.scoring import length_batches, response_scores, reward_scores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Ids = Sequence[Sequence[int]]

SIDES = ("chosen", "rejected")
_CPU_TOKENS = 2048  # of one pass: larger ones gain nothing on a CPU and leave its caches


def _over_rows(
    model: PreTrainedModel,
    prompt_ids: Ids,
    responses: Sequence[Ids],
    *,
    batch_size: int,
    compute: Callable[[Ids, Ids], Mapping[str, Tensor]],
    what: str,
    kept: Kept | None,
) -> dict[str, np.ndarray]:
    """What ``compute`` gives for all responses to some prompts, over all rows: by name, [N, responses, numbers].

    ``compute`` gets rows' prompts and the responses to them, the first of every row before the second.
    """
    import torch

    lengths = [len(prompt) + sum(map(len, answers)) for prompt, *answers in zip(prompt_ids, *responses, strict=True)]
    budget = _CPU_TOKENS if model.device.type == "cpu" else None

    def columns(rows: Sequence[int]) -> dict[str, np.ndarray]:
        found = compute([prompt_ids[row] for row in rows], [ids[row] for ids in responses for row in rows])
        return {
            f"{name}.{at}.{number}": column
            for name, values in found.items()
            for at, part in enumerate(values.cpu().numpy().reshape(len(responses), len(rows), -1))
            for number, column in enumerate(part.T)
        }

    batches = list(_by_length(lengths, max(1, batch_size // len(responses)), budget))
    with torch.no_grad():
        flat = over_batches(columns, batches, lengths, what=what, kept=kept)
    by_name: dict[str, list[Column]] = {}
    for name, column in flat.items():
        by_name.setdefault(name.split(".", maxsplit=1)[0], []).append(column)
    return {name: np.stack(each, axis=-1).reshape(len(lengths), len(responses), -1) for name, each in by_name.items()}


def _by_length(lengths: Sequence[int], size: int, tokens: int | None) -> Iterator[list[int]]:
    """Row numbers, longest rows first, at most ``size`` rows and ``tokens`` tokens at a time, a longer row alone."""
    part: list[int] = []
    used = 0
    for (row,) in length_batches(lengths, 1):
        if part and (len(part) == size or (tokens is not None and used + lengths[row] > tokens)):
            yield part
            part, used = [], 0
        part.append(row)
        used += lengths[row]
    if part:
        yield part


def score_responses(
    model: PreTrainedModel,
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    batch_size: int,
    kept: Kept | None = None,
) -> dict[str, np.ndarray]:
    """``logp`` (nats, summed), ``tokens`` (count) and ``entropy`` (mean nats per token) of responses [N].

    ``kept``, also below, is that of ``rows.over_batches``.
    """
    found = _score(model, prompt_ids, [response_ids], batch_size, kept)
    return {name: values[:, 0] for name, values in found.items()}


def score_draws(
    model: PreTrainedModel, prompt_ids: Ids, draws: Sequence[Ids], *, batch_size: int, kept: Kept | None = None
) -> np.ndarray:
    """log-probability (nats, summed) [N, draws] of several responses to each of ``batch_size`` prompts at a time."""
    return _score(model, prompt_ids, draws, batch_size * len(draws), kept, entropy=False)["logp"]


def score_pairs(
    model: PreTrainedModel,
    prompt_ids: Ids,
    chosen_ids: Ids,
    rejected_ids: Ids,
    *,
    batch_size: int,
    kept: Kept | None = None,
) -> dict[str, np.ndarray]:
    """What ``score_responses`` tells of chosen and rejected responses, as ``chosen_logp`` and so on, each [N].

    Both are scored in one pass, at most ``batch_size`` responses at a time, with the prompt computed once.
    """
    found = _score(model, prompt_ids, [chosen_ids, rejected_ids], batch_size, kept)
    return {f"{side}_{name}": values[:, at] for at, side in enumerate(SIDES) for name, values in found.items()}


def _score(
    model: PreTrainedModel,
    prompt_ids: Ids,
    responses: Sequence[Ids],
    batch_size: int,
    kept: Kept | None,
    *,
    entropy: bool = True,
) -> dict[str, np.ndarray]:
    """Each [N, responses per prompt]."""

    def compute(prompts: Ids, answers: Ids) -> dict[str, Tensor]:
        scores = response_scores(model, prompts, answers, entropy=entropy)
        found = {"logp": scores.logp.double(), "tokens": scores.tokens}
        return found if scores.entropy is None else found | {"entropy": scores.entropy.double()}

    settings: dict[str, Any] = {"batch_size": batch_size, "what": "score", "kept": kept}
    found = _over_rows(model, prompt_ids, responses, compute=compute, **settings)
    return {name: values[:, :, 0] for name, values in found.items()}


def reward_responses(
    model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int, kept: Kept | None = None
) -> np.ndarray:
    """Reward of every response [N]."""
    return _reward(model, prompt_ids, [response_ids], batch_size, kept)[:, 0]


def reward_pairs(
    model: PreTrainedModel,
    prompt_ids: Ids,
    chosen_ids: Ids,
    rejected_ids: Ids,
    *,
    batch_size: int,
    kept: Kept | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of chosen and of rejected responses, each [N], or [N, K] for K heads on one body; passes as above."""
    found = _reward(model, prompt_ids, [chosen_ids, rejected_ids], batch_size, kept)
    return found[:, 0], found[:, 1]


def _reward(
    model: PreTrainedModel, prompt_ids: Ids, responses: Sequence[Ids], batch_size: int, kept: Kept | None
) -> np.ndarray:
    """[N, responses per prompt], or [N, responses per prompt, K]."""

    def compute(prompts: Ids, answers: Ids) -> dict[str, Tensor]:
        return {"reward": reward_scores(model, prompts, answers).double()}

    settings: dict[str, Any] = {"batch_size": batch_size, "what": "reward", "kept": kept}
    rewards = _over_rows(model, prompt_ids, responses, compute=compute, **settings)["reward"]
    return rewards[:, :, 0] if rewards.shape[2] == 1 else rewards
