"""Rewards on one scale for all reward models: the expected rate at which a response beats others to its prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit


def expected_win_rates(scores: ArrayLike) -> NDArray[np.float64]:
    """mean over j != i of sigmoid(R_i - R_j), averaged over reward models.

    ``scores`` [..., N, M]: N responses to one prompt by M models, N at least 2; result [..., N] between 0 and 1.
    Raises ValueError for a single response.

    Source: 2502.02588, calibrated rewards.
    """
    scores = np.asarray(scores, dtype=float)
    size = scores.shape[-2]
    if size < 2:
        raise ValueError("a win rate needs at least two responses to a prompt")
    wins = expit(scores[..., :, None, :] - scores[..., None, :, :]).mean(axis=-1)
    return (wins.sum(axis=-1) - 0.5) / (size - 1)  # sigmoid(0) = 1/2 of every response against itself


def pair_win_rates(
    chosen: ArrayLike, rejected: ArrayLike, samples: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``expected_win_rates`` of chosen and rejected responses [P] among themselves and N samples for their prompt.

    ``chosen`` and ``rejected`` [P, M], ``samples`` [P, N, M]. Without samples chosen - rejected is
    mean_m 2 sigmoid(difference) - 1.
    """
    pair = np.stack([np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)], axis=-2)
    rates = expected_win_rates(np.concatenate([pair, np.asarray(samples, dtype=float)], axis=-2))
    return rates[..., 0], rates[..., 1]
