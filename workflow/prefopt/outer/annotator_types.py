"""EM-DPO: annotators of K unseen types, one policy for each, and one mixture for all (arXiv 2405.15065)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.special import log_expit, softmax


class Types(NamedTuple):
    """Responsibilities [A, K], rows sum to 1, and the prior of the types [K] that follows from them."""

    responsibility: np.ndarray
    prior: np.ndarray


def expectation(margins: np.ndarray, annotator: np.ndarray, prior: np.ndarray, beta: float) -> Types:
    """E-step: gamma_ak proportional to prior_k prod_{i of a} sigmoid(beta margin_ki); the new prior is their mean.

    margins [K, B] are log-ratio differences of each type's policy, nats; annotator [B] numbers 0 .. A-1, each of whom
    labelled a pair at least. The M-step is DPO of type k with weight gamma_ak on the pairs of a. Raises ValueError for
    shapes that do not fit.
    """
    margins, annotator, prior = np.asarray(margins, float), np.asarray(annotator), np.asarray(prior, float)
    if margins.shape != (len(prior), len(annotator)):
        raise ValueError(f"margins {margins.shape} for {len(prior)} types and {len(annotator)} pairs")
    if set(annotator.tolist()) != set(range(int(annotator.max()) + 1)):
        raise ValueError("annotators are numbered from 0 without gaps")
    evidence = np.zeros((annotator.max() + 1, len(prior)))
    np.add.at(evidence, annotator, log_expit(beta * margins).T)
    responsibility = softmax(np.log(prior) + evidence, axis=1)
    return Types(responsibility, responsibility.mean(axis=0))


def min_max_regret(rewards: np.ndarray) -> np.ndarray:
    """Mixture w [J] of J policies that minimises the largest regret of any type.

    rewards [K, J] is what policy j is worth to type k; the regret of k is max_j rewards_kj - sum_j w_j rewards_kj. A
    linear programme over w and the bound.
    """
    rewards = np.asarray(rewards, float)
    types, policies = rewards.shape
    best = rewards.max(axis=1)
    bound = np.column_stack([-rewards, -np.ones(types)])
    found = linprog(
        np.r_[np.zeros(policies), 1.0],
        A_ub=bound,
        b_ub=-best,
        A_eq=np.r_[np.ones(policies), 0.0][None],
        b_eq=[1.0],
        bounds=[(0.0, 1.0)] * policies + [(0.0, None)],
    )
    return found.x[:-1]
