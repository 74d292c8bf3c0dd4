"""Scores of whole tables: rows in length-grouped batches, without gradients, put back in the table's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from prefopt.progress import Progress
from prefopt.scoring import length_batches, response_scores, reward_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[Sequence[int]]


def _batches(prompt_ids: Ids, response_ids: Ids, batch_size: int, what: str):
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    batches = list(length_batches(lengths, batch_size))
    with Progress(len(batches), what) as bar:
        for rows in batches:
            yield rows, [prompt_ids[row] for row in rows], [response_ids[row] for row in rows]
            bar.advance()


def score_responses(
    model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int
) -> dict[str, np.ndarray]:
    """``logp`` (nats, summed), ``tokens`` (count) and ``entropy`` (mean nats per token) of every response, each [N]."""
    import torch

    size = len(prompt_ids)
    out = {"logp": np.empty(size), "tokens": np.empty(size, dtype=np.int64), "entropy": np.empty(size)}
    with torch.no_grad():
        for rows, prompts, responses in _batches(prompt_ids, response_ids, batch_size, "score"):
            scores = response_scores(model, prompts, responses, entropy=True)
            for name, column in out.items():
                column[rows] = getattr(scores, name).cpu().numpy()
    return out


def reward_responses(model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int) -> np.ndarray:
    """Reward of every response [N]."""
    import torch

    out = np.empty(len(prompt_ids))
    with torch.no_grad():
        for rows, prompts, responses in _batches(prompt_ids, response_ids, batch_size, "reward"):
            out[rows] = reward_scores(model, prompts, responses).cpu().numpy()
    return out
