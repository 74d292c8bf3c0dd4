"""The length-controlled win rate that needs no difficulties: a logistic fit on length with an intercept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.length_control import length_term, sigmoid
from prefopt.grids.estimates import Interval, Values, crossed_interval

_STEPS = 40
_FARTHEST = 12.0  # sigma(12) differs from 1 by 6e-6: such a fit is on its way to infinity


def length_controlled(outcome: Values, delta_length: Values) -> Interval | None:
    """Win rate in percent at equal lengths: 100 sigma(b) of P(win) = sigma(a tanh(dl / sd(dl)) + b).

    ``outcome`` [S, D, P]: 1, 0.5 or 0 per seed, draw and prompt; ``delta_length`` [S, D, P]: the opponent's length
    minus the model's, any unit. Maximum likelihood without penalty. Interval: infinitesimal jackknife (each cell of
    seed and prompt moves b by its influence), these values taken as the crossed layout, limits mapped by sigma.
    None where the fit has no maximum, as when every answer wins.

    Source: AlpacaEval's ``length_controlled_minimal`` (2404.04475), there with an L1 penalty.
    """
    seeds, draws, prompts = outcome.shape
    design = np.column_stack([length_term(delta_length.ravel()), np.ones(outcome.size)])
    fitted = _fit(design, outcome.ravel())
    if fitted is None:
        return None
    b, inverse = fitted
    push = (design @ inverse[:, 1]) * (outcome.ravel() - sigmoid(design @ b))
    cells = push.reshape(seeds, draws, prompts).sum(axis=1)
    logit = crossed_interval(b[1] + cells * cells.size)
    low, high = (None if x is None else 100 * float(sigmoid(x)) for x in (logit.low, logit.high))
    return Interval(100 * float(sigmoid(b[1])), low, high, logit.p, seeds, prompts)


def _fit(design: Values, labels: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Coefficients at the maximum of the likelihood, and the (pseudo-)inverse of its curvature there."""
    b = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        q = sigmoid(design @ b)
        inverse = np.linalg.pinv(design.T @ ((q * (1 - q))[:, None] * design))
        step = inverse @ (design.T @ (labels - q))
        b = b + step / max(1.0, np.abs(step).max())  # at most one logit a step: full steps can overshoot
        if np.abs(b).max() > _FARTHEST:
            return None
        if np.abs(step).max() < 1e-10:
            return b, np.asarray(inverse, dtype=float)
    return None
