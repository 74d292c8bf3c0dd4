"""Policies small enough to be exact: every response has its probability, every expectation is a sum.

A policy over A responses is log-linear, log pi = log_softmax(base + features @ theta). With one feature per response
it is free (tabular); with token counts as features it is a bag of words; with one shared feature it can leak mass.
Pair losses are driven through ``LOSSES``, the same functions that train language models. Prompts are one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefopt.batch import PairBatch
from prefopt.errors import FailedCheck
from prefopt.lazy import LazyModule
from prefopt.losses import get_loss, get_regulariser

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import ArrayLike, NDArray
    from scipy import special
    from torch import Tensor

    Values = NDArray[np.float64]
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    special = LazyModule("scipy.special")

NEWTON_STEPS = 200
_ROUNDING = 2e-15  # of a sum over pairs: what a step promises below it, values cannot show


@dataclass(frozen=True)
class LinearPolicy:
    """log pi(theta) = log_softmax(base + features @ theta); features [A, D], base [A]."""

    features: Values
    base: Values

    def logp(self, theta: Tensor) -> Tensor:
        """Log-probability of every response [A] with gradient to theta [D]."""
        scores = torch.as_tensor(self.base) + torch.as_tensor(self.features) @ theta
        return torch.log_softmax(scores, dim=0)

    def probabilities(self, theta: ArrayLike) -> Values:
        """pi(theta) [..., A] for theta [..., D]."""
        return special.softmax(self.base + np.asarray(theta) @ self.features.T, axis=-1)

    def log_probabilities(self, theta: ArrayLike) -> Values:
        """log pi(theta) [..., A] for theta [..., D], exact where the probability itself underflows."""
        return special.log_softmax(self.base + np.asarray(theta) @ self.features.T, axis=-1)


def free_policy(ref: ArrayLike) -> LinearPolicy:
    """One free score per response; the reference at theta = 0."""
    base = np.log(np.asarray(ref, dtype=float))
    return LinearPolicy(np.eye(len(base)), base)


def bag_of_words(vocabulary: int, length: int) -> tuple[LinearPolicy, NDArray[np.int64]]:
    """Independent tokens with shared scores theta [V], over all V^T sequences; uniform at theta = 0.

    Returns the policy, whose features are token counts, and the sequences [V^T, T] in lexicographic order.
    """
    sequences = np.stack(np.unravel_index(np.arange(vocabulary**length), (vocabulary,) * length), axis=1)
    counts = (sequences[:, :, None] == np.arange(vocabulary)).sum(axis=1).astype(float)
    return LinearPolicy(counts, np.zeros(len(sequences))), sequences


@dataclass(frozen=True)
class PairObjective:
    """Mean pair loss of a policy on pairs, plus gamma * KL(ref || pi), as a function of theta.

    ``pairs`` are (chosen, rejected) response numbers, ``weights`` their shares (default equal), ``rewards`` [K, A] one
    row per reward model. The loss is one of ``LOSSES`` by name, with its parameters.
    """

    policy: LinearPolicy
    ref: Values
    pairs: Sequence[tuple[int, int]]
    loss: str
    params: Mapping[str, float]
    gamma: float = 0.0
    weights: Values | None = None
    rewards: Values | None = field(default=None)

    def __call__(self, theta: Tensor) -> Tensor:
        """The objective, a scalar with gradient to theta [D]."""
        logp = self.policy.logp(theta)
        per_pair = get_loss(self.loss).fn(self.batch(logp), **self.params)
        shares = np.full(len(self.pairs), 1 / len(self.pairs)) if self.weights is None else self.weights
        total = torch.as_tensor(shares) @ per_pair
        if self.gamma:
            ref = torch.as_tensor(self.ref)
            total = total + self.gamma * (ref @ get_regulariser("forward_kl").fn(logp, ref.log()))
        return total

    def batch(self, logp: Tensor) -> PairBatch:
        """The pairs as a loss reads them, from the log-probabilities of all responses [A]."""
        chosen, rejected = torch.as_tensor(self.pairs).T
        ref_logp = torch.as_tensor(self.ref).log()
        fields: dict[str, Any] = {}
        if self.rewards is not None:
            rewards = torch.as_tensor(self.rewards).T
            fields = {"chosen_reward": rewards[chosen], "rejected_reward": rewards[rejected]}
        one = torch.ones(len(self.pairs), dtype=logp.dtype)
        return PairBatch(
            pair_id=torch.arange(len(self.pairs)),
            chosen_logp=logp[chosen],
            rejected_logp=logp[rejected],
            chosen_tokens=one,
            rejected_tokens=one,
            ref_chosen_logp=ref_logp[chosen],
            ref_rejected_logp=ref_logp[rejected],
            **fields,
        )

    def value(self, theta: ArrayLike) -> float:
        """The objective at theta [D]."""
        return float(self(_tensor(theta)))

    def gradient(self, theta: ArrayLike) -> Values:
        """Its gradient [D]."""
        point = _tensor(theta).requires_grad_()
        return torch.autograd.grad(self(point), point)[0].numpy()

    def hessian(self, theta: ArrayLike) -> Values:
        """Its second derivatives [D, D]."""
        return torch.autograd.functional.hessian(self, _tensor(theta)).numpy()


def _tensor(theta: ArrayLike) -> Tensor:
    return torch.tensor(np.asarray(theta, dtype=float))


def gradient_flow(objective: PairObjective, start: ArrayLike, times: ArrayLike) -> Values:
    """theta at the given times [N, D] under d theta / dt = -gradient: gradient descent with small steps.

    Time is learning rate x steps. Raises FailedCheck where the integration breaks off.
    """
    from scipy.integrate import solve_ivp

    points = np.asarray(times, dtype=float)
    solution = solve_ivp(
        lambda _, theta: -objective.gradient(theta),
        (0.0, points[-1]),
        np.asarray(start, dtype=float),
        method="LSODA",
        t_eval=points,
        jac=lambda _, theta: -objective.hessian(theta),
        rtol=1e-9,
        atol=1e-12,
    )
    if not solution.success:
        raise FailedCheck(f"gradient flow of '{objective.loss}' broke off: {solution.message}")
    return solution.y.T


def minimise(objective: PairObjective, start: ArrayLike) -> Values:
    """theta [D] with a vanishing gradient, by damped Newton steps; for convex objectives with a finite optimum.

    Directions that change nothing (a shift of all scores) stay as at the start. Raises FailedCheck without convergence.
    """
    theta = np.asarray(start, dtype=float)
    for _ in range(NEWTON_STEPS):
        slope = objective.gradient(theta)
        step = np.linalg.lstsq(objective.hessian(theta), -slope, rcond=1e-12)[0].astype(float)
        if np.abs(step).max() <= 1e-9 * (1 + np.abs(theta).max()):
            return theta + step  # the error after a step is about the square of the step
        theta = theta + _damping(objective, theta, step, float(slope @ step)) * step
    raise FailedCheck(f"'{objective.loss}' has no optimum within {NEWTON_STEPS} Newton steps: its margins may diverge")


def _damping(objective: PairObjective, theta: Values, step: Values, descent: float) -> float:
    """Largest of 1, 1/2, 1/4, ... that lowers the objective as its slope promises; 1 where rounding decides."""
    before, scale = objective.value(theta), 1.0
    while scale > 1e-10 and abs(descent) > _ROUNDING * (1 + abs(before)):
        if objective.value(theta + scale * step) <= before + 1e-4 * scale * descent:
            return scale
        scale /= 2
    return 1.0


# --- expectations and optima ----------------------------------------------------------------------------------------


def kl(first: ArrayLike, second: ArrayLike) -> float:
    """KL(first || second) = sum first log(first / second), nats."""
    return float(special.rel_entr(first, second).sum())


def rlhf_optimum(ref: ArrayLike, reward: ArrayLike, beta: float) -> Values:
    """The maximiser of E_pi[r] - beta KL(pi || ref): ref * exp(r / beta), normalised [A]."""
    return special.softmax(np.log(ref) + np.asarray(reward) / beta)


def rlhf_value(policy: ArrayLike, ref: ArrayLike, reward: ArrayLike, beta: float) -> float:
    """E_pi[r] - beta KL(pi || ref)."""
    return float(np.dot(policy, reward)) - beta * kl(policy, ref)


def implicit_reward(policy: ArrayLike, ref: ArrayLike, beta: float) -> Values:
    """beta log(pi / ref) [A], the reward for which the policy is the RLHF optimum."""
    return beta * (np.log(policy) - np.log(ref))


def pessimistic_value(policy: ArrayLike, ref: ArrayLike, rewards: ArrayLike, beta: float) -> float:
    """min_k (E_pi[r_k] - E_ref[r_k]) - beta KL(pi || ref) over reward models [K, A]; 0 for the reference itself."""
    advantages = np.asarray(rewards) @ (np.asarray(policy) - np.asarray(ref))
    return float(advantages.min()) - beta * kl(policy, ref)


def mixture_value(weights: ArrayLike, ref: ArrayLike, rewards: ArrayLike, beta: float) -> float:
    """beta KL(ref || pi_r) for the mixed reward r = weights @ rewards, an upper bound of the max-min."""
    mixed = np.asarray(weights) @ np.asarray(rewards)
    return float(beta * special.logsumexp(np.log(ref) + mixed / beta) - np.dot(ref, mixed))


def pessimistic_optimum(ref: ArrayLike, rewards: ArrayLike, beta: float) -> tuple[Values, Values]:
    """Weights [K] and policy [A] that maximise the pessimistic value over all policies.

    Minimises ``mixture_value`` over the simplex: the set of rewards has to be convex, so a mixture answers. Source:
    2405.19316, the pessimism theorem, with the max and the min exchanged.
    """
    from scipy.optimize import minimize

    rows = np.asarray(rewards, dtype=float)
    found = minimize(
        mixture_value,
        np.full(len(rows), 1 / len(rows)),
        args=(ref, rows, beta),
        jac=_mixture_slope,
        bounds=[(0.0, 1.0)] * len(rows),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: w * 0 + 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    weights = _polished(found.x, ref, rows, beta)
    return weights, rlhf_optimum(ref, weights @ rows, beta)


def _mixture_slope(weights: Values, ref: ArrayLike, rows: Values, beta: float) -> Values:
    return rows @ (rlhf_optimum(ref, weights @ rows, beta) - np.asarray(ref))


def _polished(weights: Values, ref: ArrayLike, rows: Values, beta: float) -> Values:
    """The weights to rounding, by Newton steps on the simplex face that the solver found to about 1e-8."""
    active = weights > 1e-6
    exact = np.where(active, weights, 0.0)
    exact /= exact.sum()
    count = int(active.sum())
    for _ in range(6):
        policy = rlhf_optimum(ref, exact @ rows, beta)
        centred = rows[active] - (rows[active] @ policy)[:, None]
        system = np.ones((count + 1, count + 1))
        system[:count, :count] = (centred * policy) @ centred.T / beta
        system[-1, -1] = 0.0
        target = np.append(-_mixture_slope(exact, ref, rows, beta)[active], 0.0)
        exact[active] += np.linalg.lstsq(system, target, rcond=None)[0][:count]
    return exact
