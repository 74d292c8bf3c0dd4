"""MallowsPO's five-armed bandit: full-batch gradient descent on softmax arms, many runs (betas) side by side.

The setting of figures 8a, 8b and 9, recovered to the digits: five free scores starting at zero, uniform reference,
mean loss over 16 fixed pairs, learning rate 5e-3, 500,000 steps; for the phi link phi = 0.05 and the cubic in place
of the jump on |beta * margin| <= 0.05. Slopes are written out here because 500,000 steps of autograd take an hour;
they equal those of the losses ``dpo`` and ``mallows_phi``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
# d/ds of the summed loss of each pair of arms at s [R, pairs]: ``dpo_slope`` and what ``phi_slope`` returns.
Slope = Callable[[Floats], Floats]

# (value, probability) of the two-point reward of each arm.
REWARDS = (
    ((20, 0.5), (11, 0.5)),
    ((30, 0.5), (3, 0.5)),
    ((18, 0.5), (15, 0.5)),
    ((15, 0.99), (10, 0.01)),
    ((1, 0.99), (4, 0.01)),
)
MEAN_REWARD = np.array([sum(value * share for value, share in arm) for arm in REWARDS])
N_ARMS = len(REWARDS)
_CHOICES = "3>5 2>5 2>5 1>2 3>5 1>5 1>4 1>5 4>5 2>4 2>1 2>5 1>3 3>5 3>4 4>2"
# (chosen, rejected) arms, counted from 0.
PAIRS = tuple((int(choice[0]) - 1, int(choice[2]) - 1) for choice in _CHOICES.split())
_COUNTS = Counter(PAIRS)
# The nine pairs of arms that were compared, lower arm first, and how often the lower and the higher one was chosen.
COMPARED = sorted({(min(pair), max(pair)) for pair in PAIRS})
LOWER_CHOSEN = np.array([float(_COUNTS[low, high]) for low, high in COMPARED])
HIGHER_CHOSEN = np.array([float(_COUNTS[high, low]) for low, high in COMPARED])
# scores @ DIFFERENCES = score of the lower arm - score of the higher arm of each compared pair.
DIFFERENCES = np.array([[float(arm == low) - float(arm == high) for low, high in COMPARED] for arm in range(N_ARMS)])


@dataclass(frozen=True, slots=True)
class Paths:
    """Descent of R runs; a policy is the probabilities of the arms."""

    betas: Floats  # [R]
    steps: NDArray[np.int64]  # [T] updates done at each record
    scores: Floats  # [T, R, arms]
    final: Floats  # [R, arms] policy, averaged over the last updates

    @property
    def policies(self) -> Floats:
        """The recorded policies [T, R, arms]."""
        return softmax(self.scores)


def softmax(scores: Floats) -> Floats:
    """Probabilities along the last axis."""
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def expected_reward(policy: ArrayLike) -> Floats:
    """Mean reward of policies [..., arms]."""
    return np.asarray(policy) @ MEAN_REWARD


def kl_from_uniform(policy: ArrayLike) -> Floats:
    """KL(policy || uniform) in nats of policies [..., arms]."""
    p = np.asarray(policy, dtype=float)
    return (p * np.log(np.maximum(p, np.finfo(float).tiny))).sum(axis=-1) + np.log(p.shape[-1])


def descend(
    slope: Slope,
    betas: Sequence[float],
    *,
    steps: int,
    learning_rate: float = 5e-3,
    record_every: int = 100,
    tail: int = 30,
) -> Paths:
    """Gradient descent on the mean loss from zero scores, one run per beta.

    s = beta * (difference of two scores): the reference is uniform and the softmax's denominator cancels.
    Records the start and every ``record_every``-th update; ``final`` averages the policy after the last ``tail``.
    """
    scale = np.asarray(betas, dtype=float)[:, None]
    scores = np.zeros((len(scale), N_ARMS))
    margin, update = np.empty((len(scale), len(COMPARED))), np.empty_like(scores)
    back = np.ascontiguousarray(DIFFERENCES.T) * (learning_rate / len(PAIRS))
    records, total = [scores.copy()], np.zeros_like(scores)
    for step in range(1, steps + 1):
        np.matmul(scores, DIFFERENCES, out=margin)
        margin *= scale
        per_score = slope(margin)
        per_score *= scale
        np.matmul(per_score, back, out=update)
        scores -= update
        if step % record_every == 0:
            records.append(scores.copy())
        if step > steps - tail:
            total += softmax(scores)
    at = np.arange(len(records)) * record_every
    return Paths(scale[:, 0], at, np.array(records), total / min(tail, steps))


def dpo_slope(s: Floats) -> Floats:
    """d/ds of -a log sigmoid(s) - b log sigmoid(-s) = (a + b) sigmoid(s) - a, a and b the counts of choices."""
    return (LOWER_CHOSEN + HIGHER_CHOSEN) / (1 + np.exp(-s)) - LOWER_CHOSEN


def phi_slope(phi: float, width: float) -> Slope:
    """d/ds of -a log g(s) - b log(1 - g(s)) for the smoothed link of Mallows-phi, for ``descend``.

    With u = |s|, lambda = -log phi and k(x) = x / (exp(lambda x) - 1): 1 - G(u) = k(u) - k(u + 1), no cancellation;
    for u <= width, G is the cubic 1/2 + a1 u + a3 u^3 with the exact value and slope at width.

    Source: 2405.14953, corollary 3 and section 3.4 (ii).
    """
    lam, ahead = -np.log(phi), np.array([0.0, 1.0])[:, None, None]
    total, net = LOWER_CHOSEN + HIGHER_CHOSEN, LOWER_CHOSEN - HIGHER_CHOSEN
    half_total, half_net = total / 2, net / 2

    def exact(u: Floats) -> tuple[Floats, Floats]:
        """1 - G(u) and G'(u)."""
        x = u + ahead
        shrunk = 1 / np.expm1(lam * x)
        k = x * shrunk
        k_slope = shrunk - lam * k * (1 + shrunk)
        return k[0] - k[1], k_slope[1] - k_slope[0]

    end_miss, end_slope = (value.item() for value in exact(np.array(width)))
    chord = (0.5 - end_miss) / width
    a1, a3 = (3 * chord - end_slope) / 2, (end_slope - chord) / (2 * width**2)

    def per_pair(s: Floats) -> Floats:
        u = np.abs(s)
        inside = u <= width
        miss, slope = exact(np.maximum(u, width))
        square = a3 * u * u
        np.copyto(miss, 0.5 - u * (a1 + square), where=inside)
        np.copyto(slope, a1 + 3 * square, where=inside)
        # The link is odd about 1/2: for s < 0 the two arms change places. ``against``: choices the sign of s speaks
        # against; slope * (against / miss - (total - against) / (1 - miss)) over one denominator.
        sign = np.copysign(1.0, s)
        against = half_total - sign * half_net
        return sign * slope * (against - total * miss) / (miss * (1 - miss))

    return per_pair


def dpo_limit(betas: Sequence[float]) -> Floats:
    """The policies [R, arms] that DPO reaches after infinitely many steps.

    Bradley-Terry scores over beta on the arms that were ever chosen; an arm that only lost ends at probability 0.
    """
    from scipy.optimize import root

    chosen = np.array(sorted({arm for arm, _ in PAIRS}))
    inner = np.isin(np.array(COMPARED), chosen).all(axis=1)
    part = DIFFERENCES[chosen][:, inner]

    def gradient(scores: Floats) -> Floats:
        s = np.zeros(len(COMPARED))
        s[inner] = scores @ part
        return part @ dpo_slope(s)[inner]

    # The scores are free up to a constant, hence a solver that takes a singular Jacobian.
    scores = root(gradient, np.zeros(len(chosen)), method="lm", options={"ftol": 1e-14, "xtol": 1e-14}).x
    policies = np.zeros((len(betas), N_ARMS))
    policies[:, chosen] = softmax(scores / np.asarray(betas, dtype=float)[:, None])
    return policies


def flow(slope: Slope, beta: float, *, steps: int, learning_rate: float = 5e-3) -> Floats:
    """The policy [arms] of gradient flow at time steps * learning_rate: descent where it takes too many steps.

    The two differ by the order of the learning rate times the loss's curvature, which goes with beta^2.
    """
    from scipy.integrate import solve_ivp

    def velocity(_: float, scores: Floats) -> Floats:
        return -DIFFERENCES @ slope((beta * scores @ DIFFERENCES)[None])[0] * (beta / len(PAIRS))

    found = solve_ivp(velocity, (0, steps * learning_rate), np.zeros(N_ARMS), method="LSODA", rtol=1e-9, atol=1e-9)
    return softmax(found.y[:, -1])
