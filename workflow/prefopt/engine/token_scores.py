"""Log-probabilities of single response tokens, for losses that weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefopt.processes.rows import Kept, over_batches
from prefopt.scoring import Ids, length_batches, response_scores

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel


def score_tokens(
    model: PreTrainedModel, prompt_ids: Ids, response_ids: Ids, *, batch_size: int, kept: Kept | None = None
) -> Sequence[np.ndarray]:
    """log pi of every token of every response, nats: one array per response, without gradient.

    ``kept`` is that of ``rows.over_batches``.
    """
    import torch

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]

    def compute(rows: Sequence[int]) -> dict[str, list[np.ndarray]]:
        prompts, responses = ([ids[row] for row in rows] for ids in (prompt_ids, response_ids))
        scores = response_scores(model, prompts, responses, token_level=True)
        token_logp: Any = scores.token_logp  # there, since it was asked for
        padded = token_logp.double().cpu().numpy()
        return {"token_logp": [values[: len(ids)] for values, ids in zip(padded, responses, strict=True)]}

    with torch.no_grad():
        batches = list(length_batches(lengths, batch_size))
        return list(over_batches(compute, batches, lengths, what="tokens", kept=kept)["token_logp"])
