"""Log-probabilities of single response tokens, for losses that weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from prefopt.progress import Progress
from prefopt.scoring import Ids, length_batches, response_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_tokens(
    model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int
) -> Sequence[np.ndarray]:
    """log pi of every token of every response, nats: one array per response, without gradient."""
    import torch

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    batches = list(length_batches(lengths, batch_size))
    out: list[np.ndarray] = [np.empty(0)] * len(lengths)
    with torch.no_grad(), Progress(len(batches), "tokens") as bar:
        for rows in batches:
            scores = response_scores(
                model, [prompt_ids[row] for row in rows], [response_ids[row] for row in rows], token_level=True
            )
            for row, values in zip(rows, scores.token_logp.double().cpu().numpy(), strict=True):
                out[row] = values[: len(response_ids[row])]
            bar.advance()
    return out
