"""Strengths of several systems from votes with ties: Davidson's extension of Bradley and Terry's model.

P(a wins) : P(b wins) : P(tie) = pi_a : pi_b : nu sqrt(pi_a pi_b), strength theta = log pi with mean 0, nu >= 0. With
nu = 0 it is Bradley-Terry. Source: Davidson 1970, JASA 65, eq. 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput, FailedCheck
from prefopt.evaluation.separation import require_connected, require_finite_strengths

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DavidsonFit:
    """Fitted strengths, best first; differences are log-odds of winning among decided votes.

    ``strength`` [M], mean 0, with ``error`` [M] from the Hessian (votes taken as independent); ``nu``: the probability
    of a tie between equals is nu / (2 + nu).
    """

    systems: tuple[str, ...]
    strength: Floats
    error: Floats
    nu: float
    log_likelihood: float

    def probabilities(self, a: int, b: int) -> Floats:
        """P(a wins), P(b wins), P(tie) [3]."""
        pi = np.exp(self.strength[[a, b]])
        weights = np.array([pi[0], pi[1], self.nu * np.sqrt(pi[0] * pi[1])])
        return weights / weights.sum()


def davidson(system_a: Sequence[str], system_b: Sequence[str], counts: ArrayLike) -> DavidsonFit:
    """Maximum likelihood from votes for a, for b and ties, ``counts`` [n, 3]; without ties nu is 0.

    A multinomial logit with utilities theta_a, theta_b, (theta_a + theta_b) / 2 + log nu: concave.

    Raises BadInput for a system compared with itself, systems that no chain of votes connects, or one that never loses
    to the others; FailedCheck where the fit does not converge.
    """
    from scipy.linalg import helmert
    from scipy.optimize import minimize

    votes = np.asarray(counts, dtype=float)
    names, sides = np.unique(np.array([system_a, system_b], dtype=str).T, return_inverse=True)
    sides = sides.reshape(-1, 2)
    if (sides[:, 0] == sides[:, 1]).any():
        raise BadInput(f"davidson: {names[sides[np.argmax(sides[:, 0] == sides[:, 1]), 0]]!r} is compared with itself")
    kinds, kind = np.unique(sides, axis=0, return_inverse=True)
    votes = np.column_stack([np.bincount(kind.ravel(), column, len(kinds)) for column in votes.T])
    kinds, votes = kinds[votes.sum(axis=1) > 0], votes[votes.sum(axis=1) > 0]
    outcome = (votes[:, 0] + votes[:, 2] / 2) / votes.sum(axis=1)
    require_connected(names.tolist(), kinds)
    require_finite_strengths(names.tolist(), kinds, outcome)
    tied = bool(votes[:, 2].sum() > 0)
    basis = helmert(len(names)).T
    design = _design(basis, kinds, tied)

    def value(z: Floats) -> float:
        return -_log_likelihood(design, votes, z)[0]

    def gradient(z: Floats) -> Floats:
        return -_log_likelihood(design, votes, z)[1]

    def curvature(z: Floats) -> Floats:
        return -_log_likelihood(design, votes, z)[2]

    start = np.zeros(design.shape[2])
    found = minimize(value, start, jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-8})
    if not np.abs(gradient(found.x)).max() <= 1e-6 * max(1.0, votes.sum()):
        raise FailedCheck(f"davidson: no convergence ({found.message})")
    rank = len(names) - 1
    strength = basis @ found.x[:rank]
    covariance = basis @ np.linalg.inv(curvature(found.x))[:rank, :rank] @ basis.T
    order = np.argsort(-strength, kind="stable")
    nu = float(np.exp(found.x[rank])) if tied else 0.0
    error = np.sqrt(np.diag(covariance))[order]
    return DavidsonFit(tuple(names[order].tolist()), strength[order], error, nu, float(-found.fun))


def _design(basis: Floats, kinds: NDArray[np.int64], tied: bool) -> Floats:
    """Utilities of a, b (and a tie) as linear functions [pairs, outcomes, M - 1 (+ 1)]."""
    a, b = basis[kinds[:, 0]], basis[kinds[:, 1]]
    if not tied:
        return np.stack([a, b], axis=1)
    zero, one = np.zeros((len(kinds), 1)), np.ones((len(kinds), 1))
    both = [np.hstack([a, zero]), np.hstack([b, zero]), np.hstack([(a + b) / 2, one])]
    return np.stack(both, axis=1)


def _log_likelihood(design: Floats, votes: Floats, z: Floats) -> tuple[float, Floats, Floats]:
    """Value, gradient and Hessian of the multinomial log-likelihood."""
    from scipy.special import logsumexp

    votes = votes[:, : design.shape[1]]
    utility = design @ z
    log_p = utility - logsumexp(utility, axis=1, keepdims=True)
    p, n = np.exp(log_p), votes.sum(axis=1)
    mean = np.einsum("ro,rod->rd", p, design)
    gradient = np.einsum("ro,rod->d", votes, design) - n @ mean
    spread = np.einsum("r,ro,rod,roe->de", n, p, design, design) - np.einsum("r,rd,re->de", n, mean, mean)
    return float((votes * log_p).sum()), gradient, -spread
