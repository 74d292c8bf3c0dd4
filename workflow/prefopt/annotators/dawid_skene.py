"""What each annotator's votes are worth: Dawid and Skene's model, fitted by expectation and maximisation.

Every item has a hidden true class; annotator j who sees class k votes l with probability theta_j[k, l]. Source: Dawid
and Skene 1979, Applied Statistics 28.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput

Floats = NDArray[np.float64]

_STEPS = 500
_SETTLED = 1e-9  # relative gain of the objective per step


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """A fit over N items, J annotators and K classes.

    ``posterior`` [N, K] of the true class; ``confusion`` [J, K, K], rows true; ``prior`` [K]; ``quality`` [J], the
    probability that an annotator's vote is the true class; ``votes`` [J]; ``objective``, the log posterior after every
    step (nats, without constants), which never falls.
    """

    posterior: Floats
    confusion: Floats
    prior: Floats
    quality: Floats
    votes: NDArray[np.int64]
    objective: Floats


def dawid_skene(
    item: ArrayLike,
    annotator: ArrayLike,
    vote: ArrayLike,
    classes: int,
    *,
    smoothing: float = 0.5,
    agreeing: float = 0.5,
) -> DawidSkene:
    """Fit from single votes: ``item`` 0..N-1, ``annotator`` 0..J-1, ``vote`` 0..classes-1, one entry per vote.

    Maximises log-likelihood + sum log-priors: Dirichlet pseudo-votes of ``smoothing`` on every cell of a confusion
    matrix and ``agreeing`` more on its diagonal, so that annotators with few votes are near the others and the classes
    keep their names. It starts at the shares of votes per item.

    Raises BadInput for indices that are not of these ranges or items and annotators without a vote.
    """
    items, people, votes = (np.asarray(values, dtype=np.int64) for values in (item, annotator, vote))
    if len(items) == 0 or (votes < 0).any() or (votes >= classes).any():
        raise BadInput(f"dawid_skene: votes must be 0..{classes - 1}, and there must be one")
    for name, numbers in (("item", items), ("annotator", people)):
        if len(np.unique(numbers)) != numbers.max() + 1 or numbers.min() < 0:
            raise BadInput(f"dawid_skene: {name}s must be numbered from 0 without a gap; one has no vote")
    pseudo = smoothing + agreeing * np.eye(classes)
    posterior = np.zeros((items.max() + 1, classes))
    np.add.at(posterior, (items, votes), 1.0)
    posterior /= posterior.sum(axis=1, keepdims=True)
    objective: list[float] = []
    while True:
        prior, confusion = _maximise(posterior, items, people, votes, pseudo, smoothing=smoothing)
        log_joint = np.tile(np.log(prior), (len(posterior), 1))
        np.add.at(log_joint, items, np.log(confusion)[people, :, votes])
        peak = log_joint.max(axis=1, keepdims=True)
        mass = np.exp(log_joint - peak)
        posterior = mass / mass.sum(axis=1, keepdims=True)
        likelihood = float((peak[:, 0] + np.log(mass.sum(axis=1))).sum())
        penalty = float((pseudo * np.log(confusion)).sum() + smoothing * np.log(prior).sum())
        objective.append(likelihood + penalty)
        gained = objective[-1] - objective[-2] if len(objective) > 1 else np.inf
        if gained <= _SETTLED * abs(objective[-1]) or len(objective) == _STEPS:
            break
    quality = np.einsum("k,jkk->j", prior, confusion)
    counts = np.bincount(people)
    return DawidSkene(posterior, confusion, prior, quality, counts, np.array(objective))


def _maximise(
    posterior: Floats,
    items: NDArray[np.int64],
    people: NDArray[np.int64],
    votes: NDArray[np.int64],
    pseudo: Floats,
    *,
    smoothing: float,
) -> tuple[Floats, Floats]:
    """Prior [K] and confusion matrices [J, K, K] that are best for the posterior."""
    classes = posterior.shape[1]
    prior = posterior.sum(axis=0) + smoothing
    confusion = np.zeros((people.max() + 1, classes, classes))
    np.add.at(confusion.transpose(0, 2, 1), (people, votes), posterior[items])
    confusion += pseudo
    return prior / prior.sum(), confusion / confusion.sum(axis=2, keepdims=True)
