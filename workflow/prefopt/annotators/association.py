"""Does an estimate follow the annotators' disagreement? Rank correlations, also at equal length, and AUROC.

All intervals draw whole clusters (prompts) again, since the pairs of a prompt share responses and raters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.annotators.agreement import LEVEL, resample_weights
from prefopt.errors import BadInput

Floats = NDArray[np.float64]

_SMALL = 1e-12


def length_covariates(length_a: ArrayLike, length_b: ArrayLike) -> Floats:
    """What disagreement may follow by length alone: log mean length and |log ratio| of the two responses [N, 2]."""
    a, b = np.asarray(length_a, dtype=float), np.asarray(length_b, dtype=float)
    if (np.minimum(a, b) <= 0).any():
        raise BadInput("lengths must be above 0; a response has none")
    return np.column_stack([np.log((a + b) / 2), np.abs(np.log(a / b))])


def rank_correlations(
    estimates: Mapping[str, ArrayLike],
    human: ArrayLike,
    lengths: ArrayLike,
    cluster: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Per estimate three correlations with ``human`` [N], each {mean, low, high}; all on ranks (ties: mean rank).

    ``spearman``: of the estimate; ``residual``: of what is left of it after least squares on ``lengths`` [N, L]
    (semi-partial); ``partial``: of what is left of both. Limits are percentiles over ``resamples`` of clusters; ranks
    are those of the whole sample. Values are None where a side does not vary.
    """
    from scipy.stats import rankdata

    names = list(estimates)
    columns = [*(np.asarray(estimates[name], dtype=float) for name in names), np.asarray(human, dtype=float)]
    table = np.column_stack([*columns, np.asarray(lengths, dtype=float)])
    if not np.isfinite(table).all():
        raise BadInput("rank correlations need finite numbers on both sides")
    ranks = rankdata(table, axis=0)
    ranks = (ranks - ranks.mean(axis=0)) / np.where(ranks.std(axis=0) > 0, ranks.std(axis=0), 1.0)
    groups = np.unique(np.asarray(cluster), return_inverse=True)[1]
    weights = np.vstack([np.ones(groups.max() + 1), resample_weights(groups.max() + 1, resamples, seed)])
    covariance = _covariances(ranks, groups, weights)
    k = len(names)
    return {
        name: {
            kind: _estimate(values)
            for kind, values in _three(covariance, n, k, np.arange(k + 1, table.shape[1])).items()
        }
        for n, name in enumerate(names)
    }


def _covariances(ranks: Floats, groups: NDArray[np.int64], weights: Floats) -> Floats:
    """Covariance matrix of the rank columns for every row of cluster weights [R, D, D]."""
    size = groups.max() + 1
    count = np.bincount(groups, minlength=size).astype(float)
    first = np.zeros((size, ranks.shape[1]))
    np.add.at(first, groups, ranks)
    second = np.zeros((size, ranks.shape[1] ** 2))
    np.add.at(second, groups, (ranks[:, :, None] * ranks[:, None, :]).reshape(len(ranks), -1))
    total = (weights @ count)[:, None]
    mean = weights @ first / total
    return (weights @ second / total).reshape(-1, *2 * ranks.shape[1:]) - mean[:, :, None] * mean[:, None, :]


def _three(covariance: Floats, x: int, y: int, z: NDArray[np.int64]) -> dict[str, Floats]:
    """spearman, residual and partial for every covariance matrix; z are the length columns that vary."""
    z = z[covariance[0, z, z] > _SMALL]
    whole = covariance[:, [[x], [y]], [[x, y]]]
    left = whole
    if len(z):
        between = covariance[:, [[x], [y]], z[None, :]]  # [R, 2, L]
        inverse = np.linalg.pinv(covariance[:, z[:, None], z[None, :]], hermitian=True)
        left = whole - np.einsum("ril,rlm,rjm->rij", between, inverse, between)
    return {
        "spearman": _ratio(whole[:, 0, 1], whole[:, 0, 0] * whole[:, 1, 1]),
        "residual": _ratio(left[:, 0, 1], left[:, 0, 0] * whole[:, 1, 1]),
        "partial": _ratio(left[:, 0, 1], left[:, 0, 0] * left[:, 1, 1]),
    }


def _ratio(covariance: Floats, product: Floats) -> Floats:
    return np.divide(
        covariance, np.sqrt(np.maximum(product, 0)), out=np.full(len(product), np.nan), where=product > 1e-9
    )


def _estimate(values: Floats) -> dict[str, float | None]:
    """The first value with percentile limits of the others."""
    if not np.isfinite(values[0]):
        return {"mean": None, "low": None, "high": None}
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) > 1 else (None, None)
    return {
        "mean": float(values[0]),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
    }


def auroc(
    estimate: ArrayLike, split: ArrayLike, cluster: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> dict[str, float | None]:
    """P(estimate of a split item > that of a unanimous one), ties half, with limits over resampled clusters.

    {mean, low, high}; None where one kind of item is missing.
    """
    values, positive = np.asarray(estimate, dtype=float), np.asarray(split, dtype=bool)
    if positive.all() or not positive.any():
        return {"mean": None, "low": None, "high": None}
    groups = np.unique(np.asarray(cluster), return_inverse=True)[1]
    size = groups.max() + 1
    wins = np.zeros((size, size))  # of split items of the row's cluster over unanimous ones of the column's
    for column in range(size):
        others = np.sort(values[~positive & (groups == column)])
        below = (
            np.searchsorted(others, values[positive], "left") + np.searchsorted(others, values[positive], "right")
        ) / 2
        wins[:, column] = np.bincount(groups[positive], below, size)
    weights = np.vstack([np.ones(size), resample_weights(size, resamples, seed)])
    pairs = (weights @ np.bincount(groups[positive], minlength=size)) * (
        weights @ np.bincount(groups[~positive], minlength=size)
    )
    won = np.einsum("rc,cd,rd->r", weights, wins, weights, optimize=True)
    return _estimate(np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0))
