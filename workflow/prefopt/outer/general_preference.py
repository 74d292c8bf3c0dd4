"""General preference model: a skew-symmetric score that, unlike a reward, can be cyclic (arXiv 2410.02197)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit


def rotated(vectors: np.ndarray) -> np.ndarray:
    """R v for R of blocks [[0, -1], [1, 0]]: (a, b) -> (-b, a); vectors [..., d] with d even."""
    vectors = np.asarray(vectors, float)
    if vectors.shape[-1] % 2:
        raise ValueError(f"embeddings of {vectors.shape[-1]} numbers; the rotation needs an even number")
    out = np.empty_like(vectors)
    out[..., 0::2], out[..., 1::2] = -vectors[..., 1::2], vectors[..., 0::2]
    return out


def scores(vectors: np.ndarray) -> np.ndarray:
    """s_ij = <R v_i, v_j> [n, n], skew-symmetric: s_ij = -s_ji. With d = 2 and v = (r, 1) it is r_i - r_j."""
    return rotated(vectors) @ np.asarray(vectors, float).T


def preferred(vectors: np.ndarray, tau: float) -> np.ndarray:
    """P(i over j) = sigmoid(s_ij / tau) [n, n]."""
    return expit(scores(vectors) / tau)


def fit(
    winner: np.ndarray, loser: np.ndarray, items: int, dimension: int, *, tau: float = 0.1, seed: int = 0
) -> np.ndarray:
    """Embeddings [items, dimension] that minimise the mean of -log P(winner over loser), plus .001 |v|^2.

    The small penalty keeps the minimum finite where the data are consistent. Starts from normal numbers of scale .1.
    """
    count = len(winner)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        vectors = flat.reshape(items, dimension)
        turned = rotated(vectors)
        margin = (turned[winner] * vectors[loser]).sum(axis=1) / tau
        slope = -expit(-margin)[:, None] / (tau * count)
        gradient = 0.002 * vectors
        # d s_wl / d v_w = R^T v_l = -R v_l, and d s_wl / d v_l = R v_w
        np.add.at(gradient, winner, -slope * turned[loser])
        np.add.at(gradient, loser, slope * turned[winner])
        return -log_expit(margin).mean() + 0.001 * (flat**2).sum(), gradient.ravel()

    start = np.random.default_rng(seed).normal(scale=0.1, size=items * dimension)
    return minimize(objective, start, jac=True, method="L-BFGS-B").x.reshape(items, dimension)


def against_policy(score: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """s(y over pi) = sum_y' pi(y') s_yy' [n]: what GPO regresses on."""
    return np.asarray(score, float) @ np.asarray(policy, float)


def gpo_residual(log_ratio: np.ndarray, score: np.ndarray, beta: float) -> np.ndarray:
    """(log pi(y)/pi_t(y) - s(y over pi_t) / beta)^2, the loss of GPO with log Z dropped, per response."""
    return (np.asarray(log_ratio, float) - np.asarray(score, float) / beta) ** 2


def gpo_step(policy: np.ndarray, score: np.ndarray, beta: float) -> np.ndarray:
    """The policy at which a GPO round ends: pi_{t+1} proportional to pi_t exp(s(y over pi_t) / beta)."""
    logits = np.log(policy) + against_policy(score, policy) / beta
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
