"""Bradley-Terry strengths of several models from pairwise comparisons, with optional style control.

P(a beats b) = sigma(theta_a - theta_b + gamma . z) with sum theta = 0 and z the standardised style difference of the
two answers. Outcomes may be soft; **a tie is half a win for each side** (not Davidson's model, whose third category a
judge's probability does not have). Source: Bradley and Terry 1952; style control as Chatbot Arena and Arena-Hard do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput, FailedCheck
from prefopt.evaluation.length_control import sigmoid
from prefopt.evaluation.separation import (
    require_connected,
    require_finite_strengths,
    require_finite_style,
    strengths_are_finite,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

Floats = NDArray[np.float64]

_STEPS = 100
_CONVERGED = 1e-18  # Newton decrement squared per row: strengths to about 1e-9
_CHEAP_STEPS = 60
_SETTLED = 1e-7
_SEPARATED = 30.0  # log-odds that no finite optimum of real comparisons reaches; Newton runs there under separation


@dataclass(frozen=True)
class Ranking:
    """Fitted strengths, best first. Differences of strengths are log-odds of winning at equal style.

    ``models`` [M]; ``strength`` [M], mean 0; ``style`` {name: log-odds per standard unit of difference, a minus b};
    ``hessian`` and ``sandwich`` [M + k, M + k]: covariances of (strength, style); ``draws`` [R, M + k]: the bootstrap's
    fits; ``left_out``: resamples without finite strengths; ``comparisons`` [M]: rows a model is in.
    """

    models: tuple[str, ...]
    strength: Floats
    style: dict[str, float]
    hessian: Floats
    sandwich: Floats
    draws: Floats
    left_out: int
    comparisons: NDArray[np.int64]

    def win_probabilities(self) -> Floats:
        """[M, M]: that the row's model beats the column's at equal style; 1/2 on the diagonal."""
        return sigmoid(self.strength[:, None] - self.strength[None, :])

    def intervals(self, method: str = "sandwich", confidence: float = 0.95) -> Floats:
        """[M + k, 2] limits of strengths, then style coefficients: ``hessian``, ``sandwich`` or ``bootstrap``.

        The first two are normal; the Hessian's needs independent 0/1 outcomes. The bootstrap's are percentiles.
        Raises BadInput for another method, or where there are no bootstrap fits.
        """
        if method == "bootstrap":
            if len(self.draws) < 2:
                raise BadInput(f"bradley_terry: {len(self.draws)} bootstrap fits, no interval; ask for resamples")
            return np.quantile(self.draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T
        if method not in ("hessian", "sandwich"):
            raise BadInput(f"bradley_terry: no intervals '{method}'; known: bootstrap, hessian, sandwich")
        from scipy.special import ndtri

        estimate = np.concatenate([self.strength, list(self.style.values())])
        half = ndtri((1 + confidence) / 2) * np.sqrt(np.diag(getattr(self, method)))
        return np.column_stack([estimate - half, estimate + half])


def elo(strength: ArrayLike, centre: float = 1000.0) -> Floats:
    """centre + 400 strength / ln 10: a lead of 400 is odds of 10 to 1, the mean model has ``centre``."""
    return centre + 400 / np.log(10) * np.asarray(strength, dtype=float)


def style_difference(a: ArrayLike, b: ArrayLike) -> Floats:
    """(a - b) / (a + b) of two amounts such as lengths, in [-1, 1]; 0 where both are 0. Raises BadInput below 0.

    Source: Arena-Hard-Auto's style control.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    amounts = np.column_stack([first, second])
    usable = (np.isfinite(amounts) & (amounts >= 0)).all(axis=1)
    if not usable.all():
        row = int(np.argmin(usable))
        raise BadInput(f"style difference: row {row} has {first[row]} and {second[row]}; amounts are 0 or more")
    total = first + second
    return np.divide(first - second, total, out=np.zeros_like(total), where=total > 0)


def bradley_terry(
    comparisons: pd.DataFrame,
    style: Sequence[str] | None = None,
    *,
    ridge: float = 0.0,
    resamples: int = 0,
    seed: int = 0,
) -> Ranking:
    """Maximum likelihood of sum_r [y_r eta_r - log(1 + e^eta_r)] - ridge / 2 (|theta|^2 + |gamma|^2), sum theta = 0.

    ``comparisons``: ``model_a``, ``model_b``, ``outcome`` (1 = a wins, 0 = b wins, 1/2 = tie, probabilities between;
    NaN = no verdict, left out), optionally ``prompt``: rows of one prompt are then one cluster of the sandwich and of
    the bootstrap; else every row is its own. ``style``: columns with a's amount minus b's, see ``style_difference``;
    each is divided by its root mean square and **not centred**, so that strengths are at equal style and exchanging a
    and b changes nothing.

    Raises BadInput for unusable rows, models that no chain of comparisons connects, or separation: some models never
    lose to the others (or style alone decides every verdict), so that no finite strength is the best; a small
    ``ridge`` such as 0.1 gives one. FailedCheck where the fit does not converge.
    """
    named_style = list(style or [])
    rows = _checked(comparisons, named_style)
    if not (np.isfinite(ridge) and ridge >= 0):
        raise BadInput(f"bradley_terry: ridge is {ridge}; it must be 0 or more")
    require_connected(rows.names, rows.sides)
    design = rows.design()
    if ridge == 0:
        require_finite_strengths(rows.names, rows.sides, rows.outcome)
        if named_style:
            require_finite_style(design, rows.outcome, named_style)
    z = _fit(design, rows.outcome, np.ones(len(design)), ridge=ridge, start=np.zeros(design.shape[1]))
    if z is None:
        raise FailedCheck(f"bradley_terry: no convergence in {_STEPS} Newton steps; give a ridge such as 0.1")
    hessian, sandwich = _covariances(rows, design, ridge, z)
    m, k = len(rows.names), len(named_style)
    to_named = np.zeros((m + k, len(z)))
    to_named[:m, : m - 1], to_named[m:, m - 1 :] = _centred_basis(m), np.eye(k)
    order = np.concatenate([np.argsort(-(to_named @ z)[:m], kind="stable"), np.arange(m, m + k)])
    to_named = to_named[order]
    fits = _resampled_fits(rows, design, hessian, z, ridge=ridge, resamples=resamples, seed=seed)
    return Ranking(
        models=tuple(rows.names[i] for i in order[:m]),
        strength=(to_named @ z)[:m],
        style=dict(zip(named_style, map(float, z[m - 1 :]), strict=True)),
        hessian=to_named @ hessian @ to_named.T,
        sandwich=to_named @ sandwich @ to_named.T,
        draws=fits @ to_named.T,
        left_out=resamples - len(fits),
        comparisons=np.bincount(rows.sides.ravel(), minlength=m)[order[:m]],
    )


@dataclass(frozen=True)
class _Rows:
    """Rows with a verdict: names [M]; sides [n, 2] as numbers; outcome [n]; style differences [n, k]; cluster [n]."""

    names: list[str]
    sides: NDArray[np.int64]
    outcome: Floats
    style: Floats
    cluster: NDArray[np.int64]

    def design(self) -> Floats:
        """[n, M - 1 + k] in the basis of mean-0 strengths, then style in standard units."""
        basis = _centred_basis(len(self.names))
        scale = np.sqrt(np.mean(self.style**2, axis=0))
        return np.column_stack([basis[self.sides[:, 0]] - basis[self.sides[:, 1]], self.style / scale])


def _checked(table: pd.DataFrame, style: list[str]) -> _Rows:
    columns = ["model_a", "model_b", "outcome", *style]
    if absent := [name for name in columns if name not in table]:
        raise BadInput(f"bradley_terry: comparisons lack the column '{absent[0]}'; there: {', '.join(table)}")
    outcome = table["outcome"].to_numpy(dtype=float)
    styles = table[style].to_numpy(dtype=float)
    wrong = (outcome < 0) | (outcome > 1) | ~np.isfinite(styles).all(axis=1)
    wrong |= (table["model_a"] == table["model_b"]).to_numpy() | table[columns[:2]].isna().any(axis=1).to_numpy()
    if wrong.any():
        row = int(np.argmax(wrong))
        raise BadInput(
            f"bradley_terry: row {row} is {table.iloc[row][columns].to_dict()}; expected two different models, an "
            "outcome of 0 to 1 or missing, and finite style differences"
        )
    there = ~np.isnan(outcome)
    if not there.any():
        raise BadInput(f"bradley_terry: none of {len(table)} rows has an outcome")
    table, styles = table[there], styles[there]
    if constant := [name for name, column in zip(style, styles.T, strict=True) if not column.any()]:
        raise BadInput(f"bradley_terry: style '{constant[0]}' is 0 in every row; it tells nothing, leave it out")
    cluster = np.arange(len(table))
    if "prompt" in table:
        if table["prompt"].isna().any():
            raise BadInput("bradley_terry: some rows have no 'prompt'; give it for all rows or leave the column out")
        cluster = np.unique(table["prompt"].to_numpy(dtype=str), return_inverse=True)[1]
    pairs = table[columns[:2]].to_numpy(dtype=str)
    names, sides = np.unique(pairs, return_inverse=True)
    return _Rows(names.tolist(), sides.reshape(pairs.shape), outcome[there], styles, cluster)


def _centred_basis(models: int) -> Floats:
    """[M, M - 1] orthonormal columns that sum to 0: every strength vector of mean 0 is basis @ z with equal norm."""
    from scipy.linalg import helmert

    return np.asarray(helmert(models).T)


def _fit(
    design: Floats,
    outcome: Floats,
    weights: Floats,
    *,
    ridge: float,
    start: Floats,
    inverse: Floats | None = None,  # of a Hessian nearby: cheap steps first, Newton where they do not settle
) -> Floats | None:
    """argmax of the concave penalised log-likelihood; None where it has no finite one or Newton does not converge."""
    z = start
    for _ in range(_CHEAP_STEPS):
        if inverse is None:
            break
        step = inverse @ (design.T @ (weights * (outcome - sigmoid(design @ z))) - ridge * z)
        z = z + step
        if np.abs(step).max() < _SETTLED:
            return z
    z = start
    value = _log_likelihood(design, outcome, weights, ridge, z)
    for _ in range(_STEPS):
        q = sigmoid(design @ z)
        gradient = design.T @ (weights * (outcome - q)) - ridge * z
        hessian = design.T @ ((weights * q * (1 - q))[:, None] * design) + ridge * np.eye(len(z))
        try:
            step = np.asarray(np.linalg.solve(hessian, gradient), dtype=float)
        except np.linalg.LinAlgError:
            return None
        if gradient @ step <= _CONVERGED * weights.sum():
            return z if ridge > 0 or np.abs(design @ z).max() < _SEPARATED else None
        size = 1.0
        while (gained := _log_likelihood(design, outcome, weights, ridge, z + size * step)) < value - 1e-12 * abs(
            value
        ):
            size /= 2
            if size < 1e-10:
                return None
        z, value = z + size * step, gained
    return None


def _log_likelihood(design: Floats, outcome: Floats, weights: Floats, ridge: float, z: Floats) -> float:
    eta = design @ z
    return float(weights @ (outcome * eta - np.logaddexp(0, eta)) - ridge / 2 * (z @ z))


def _covariances(rows: _Rows, design: Floats, ridge: float, z: Floats) -> tuple[Floats, Floats]:
    """H^-1 and the sandwich H^-1 (sum over clusters of score score') H^-1 G / (G - 1), G clusters."""
    q = sigmoid(design @ z)
    inverse = np.asarray(
        np.linalg.inv(design.T @ ((q * (1 - q))[:, None] * design) + ridge * np.eye(len(z))), dtype=float
    )
    score = np.zeros((int(rows.cluster.max()) + 1, len(z)))
    np.add.at(score, rows.cluster, (rows.outcome - q)[:, None] * design)
    small = len(score) / (len(score) - 1) if len(score) > 1 else float("nan")  # one cluster shows no spread
    return inverse, small * inverse @ (score.T @ score) @ inverse


def _resampled_fits(
    rows: _Rows, design: Floats, inverse: Floats, start: Floats, *, ridge: float, resamples: int, seed: int
) -> Floats:
    """[R, columns]: whole clusters drawn again with replacement; resamples without finite strengths are not in it."""
    rng = np.random.default_rng(seed)
    clusters = int(rows.cluster.max()) + 1
    # rows of equal design are one row of summed weights: without style that leaves the pairs of models
    kinds = np.column_stack([rows.sides, rows.style])
    _, first, kind = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    sides, design = rows.sides[first], design[first]
    fits = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)[rows.cluster].astype(float)
        weights = np.asarray(np.bincount(kind, weights=drawn), dtype=float)
        there = weights > 0
        outcome = np.bincount(kind, weights=drawn * rows.outcome)[there] / weights[there]
        if ridge == 0 and not strengths_are_finite(len(rows.names), sides[there], outcome):
            continue
        z = _fit(design[there], outcome, weights[there], ridge=ridge, start=start, inverse=inverse)
        if z is not None:
            fits.append(z)
    return np.array(fits).reshape(-1, design.shape[1])
