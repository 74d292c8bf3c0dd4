"""Outer loops and closed forms: accelerated rounds, advantage regression, pessimistic tilting, rating distributions."""

from __future__ import annotations

import numpy as np
from scipy.special import log_expit, softmax


def extrapolated(fitted: np.ndarray, fitted_before: np.ndarray, alpha: float) -> np.ndarray:
    """pi_{t+1} proportional to fitted (fitted / fitted_before)^alpha over the last axis: accelerated preference
    optimization (arXiv 2410.06293), momentum on log-probabilities. alpha 0 is the plain round.
    """
    now, before = np.log(fitted), np.log(fitted_before)
    return softmax(now + alpha * (now - before), axis=-1)


def advantage_regression(logp: np.ndarray, old_logp: np.ndarray, advantage: np.ndarray, lam: float) -> float:
    """APA: mean over tokens of (log pi - log pi_old - A / lambda)^2 (arXiv 2306.02231); [T] each, nats."""
    gap = np.asarray(logp, float) - np.asarray(old_logp, float) - np.asarray(advantage, float) / lam
    return float((gap**2).mean())


def advantage_policy(old: np.ndarray, advantage: np.ndarray, lam: float) -> np.ndarray:
    """The tabular policy at which APA ends: pi proportional to pi_old exp(A / lambda)."""
    return softmax(np.log(old) + np.asarray(advantage, float) / lam, axis=-1)


def pessimistic_tilt(
    prior: np.ndarray, mean: np.ndarray, spread: np.ndarray, *, kappa: float, alpha: float
) -> np.ndarray:
    """pi proportional to prior exp((mean - kappa spread) / alpha): the tabular analogue of BRAID (arXiv 2405.19673).

    BRAID itself fine-tunes a diffusion sampler; mean and spread are here those of a reward ensemble.
    """
    return softmax(np.log(prior) + (np.asarray(mean, float) - kappa * np.asarray(spread, float)) / alpha, axis=-1)


def diffusion_dpo(
    chosen: np.ndarray, rejected: np.ndarray, ref_chosen: np.ndarray, ref_rejected: np.ndarray, beta: float
) -> np.ndarray:
    """-log sigmoid(-(beta / 2) [(m_chosen - m_rejected) - (f_chosen - f_rejected)]) of denoising errors m and f.

    Diffusion-DPO (arXiv 2311.12908) in the form of its released script; a formula only, since images are not text.
    """
    gap = np.subtract(chosen, rejected) - np.subtract(ref_chosen, ref_rejected)
    return -log_expit(-0.5 * beta * gap)


def wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """W1 of two distributions over ordered classes one unit apart: sum |CDF - CDF|, the fit of DPRM (2402.09764)."""
    return float(np.abs(np.cumsum(np.subtract(one, other))).sum())


def class_moments(distribution: np.ndarray) -> tuple[float, float]:
    """Mean class, counted from 0, and its variance: the reward of DPRM, and its disagreement."""
    distribution = np.asarray(distribution, float)
    classes = np.arange(len(distribution))
    mean = float(distribution @ classes)
    return mean, float(distribution @ (classes - mean) ** 2)
