"""Reward models whose outputs belong together: distributions of ratings, and vectors of general preference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from prefopt.lazy import LazyModule
from prefopt.scoring import Ids, reward_scores
from prefopt.training.objectives import Moment, PairObjective, Sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

Floats = NDArray[np.float64]

RATINGS = 3
"""Ordered classes of what a vote says of a response: it loses, it ties, it wins."""


def rating_targets(chosen: ArrayLike, rejected: ArrayLike, tie: ArrayLike, prior_votes: float) -> Floats:
    """Shares of the three classes for both responses of every pair [N, 2, 3], after a Bayesian update.

    The prior is uniform and worth ``prior_votes`` votes; the posterior mean of a class is (votes + prior_votes / 3) /
    (all votes + prior_votes). Counts of votes [N]. Of the rejected response losses and wins change places.
    """
    lost, level, won = (np.asarray(count, dtype=float) for count in (rejected, tie, chosen))
    sides = np.stack([np.stack([lost, level, won], axis=-1), np.stack([won, level, lost], axis=-1)], axis=1)
    return (sides + prior_votes / RATINGS) / (sides.sum(axis=-1, keepdims=True) + prior_votes)


def rating_moments(outputs: ArrayLike) -> tuple[Floats, Floats]:
    """Expected class, 0 to 2, and variance, 0 to 1, of the distributions that a head's outputs [..., 3] stand for."""
    shares, classes = softmax(np.asarray(outputs, dtype=float), axis=-1), np.arange(RATINGS)
    mean = shares @ classes
    return mean, (shares * (classes - mean[..., None]) ** 2).sum(axis=-1)


def preference(first: Any, second: Any) -> Any:
    """s = <R v, v'> over the last axis, R of blocks [[0, -1], [1, 0]]; arrays or tensors, positive where first wins."""
    return (first[..., 0::2] * second[..., 1::2] - first[..., 1::2] * second[..., 0::2]).sum(-1)


def preference_over_others(vectors: ArrayLike) -> Floats:
    """Mean score of every response over the others to its prompt [N]; ``vectors`` [N, d], N two or more.

    It estimates s(y over pi) from samples of pi; the scores of a prompt's responses sum to zero.
    """
    vectors = np.asarray(vectors, dtype=float)
    return preference(vectors[:, None], vectors[None]).sum(axis=1) / (len(vectors) - 1)


class RatingObjective(PairObjective):
    """W1 between predicted and target distributions of both responses: sum |CDF - CDF|, classes a unit apart.

    DPRM, arXiv 2402.09764, whose optimal-transport cost could not be confirmed; unit distances are ours.
    """

    def __init__(self, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids, targets: ArrayLike) -> None:
        super().__init__(prompt_ids, chosen_ids, rejected_ids, None)
        self.targets = np.asarray(targets, dtype=float)

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """Sum over pairs of the mean of both distances; also how many are ranked right by the expected class."""
        shares = reward_scores(model, *self._both(rows)).softmax(-1)
        target = torch.as_tensor(self.targets[list(rows)], dtype=shares.dtype, device=shares.device)
        gap = (shares - torch.cat([target[:, 0], target[:, 1]])).cumsum(-1).abs().sum(-1)
        mean = shares.detach() @ torch.arange(RATINGS, dtype=shares.dtype, device=shares.device)
        chosen, rejected = mean.chunk(2)
        return 0.5 * gap.sum(), {"accuracy": (chosen > rejected).sum(), "margin": (chosen - rejected).sum()}


class PreferenceObjective(PairObjective):
    """-log sigmoid(s(chosen over rejected) / temperature): the general preference model, arXiv 2410.02197."""

    def __init__(self, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids, temperature: float) -> None:
        super().__init__(prompt_ids, chosen_ids, rejected_ids, None)
        self.temperature = temperature

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """Sum over pairs; also how many are ranked right, and their scores."""
        score = preference(*reward_scores(model, *self._both(rows)).chunk(2))
        seen = score.detach()
        return F.softplus(-score / self.temperature).sum(), {"accuracy": (seen > 0).sum(), "margin": seen.sum()}
