"""A contextual bandit whose preferences disperse differently from context to context, all of it known.

Six items; a context is x ~ N(0, I) with a flag z that says how far its raters agree. Items are ranked by linear
scores; raters' rankings are Mallows-phi around that centre with the flag's own phi; the reward is minus the central
rank. Policies are softmax-linear in the features [x, z x]. An item is 0..K-1; ``rank`` 1 is the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses import LOSSES
from prefopt.mallows.kendall import sample_mallows_phi

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

Floats = NDArray[np.float64]
Items = NDArray[np.int64]

# Near the reference everything happens in few steps; a coarse record there would compare the arms at different KL.
DENSE_STEPS = 60


@dataclass(frozen=True, slots=True)
class Contexts:
    """N contexts: features [N, 2 d], dispersion phi [N], items from best to worst [N, K]."""

    features: Floats
    phi: Floats
    order: Items

    @property
    def rank(self) -> Items:
        """Central rank of every item [N, K], 1 the best; the reward is its negative."""
        return np.argsort(self.order, axis=1) + 1

    def rated(self, rng: np.random.Generator) -> Items:
        """One rater's ranking per context [N, K], items from best to worst."""
        places = sample_mallows_phi(rng, self.order.shape[1], self.phi, len(self.phi))
        return np.take_along_axis(self.order, places, axis=1)


@dataclass(frozen=True, slots=True)
class Path:
    """A policy on its way: KL from the reference (nats) and expected reward, at the start and then as recorded."""

    kl: Floats
    reward: Floats

    def reward_at(self, kl: float) -> float:
        """Reward where the KL first passes that value; NaN where it never does.

        Linear in sqrt(KL) between records: reward grows with the square root of the KL near the reference.
        """
        reached = np.sqrt(np.maximum.accumulate(np.maximum(self.kl, 0)))
        if reached[-1] < np.sqrt(kl):
            return float("nan")
        after = max(int(np.searchsorted(reached, np.sqrt(kl))), 1)
        return float(np.interp(np.sqrt(kl), reached[after - 1 : after + 1], self.reward[after - 1 : after + 1]))


def draw_contexts(
    rng: np.random.Generator, scores: Floats, phis: tuple[float, float], size: int
) -> Contexts:  # fmt: skip
    """Contexts with z fair; ``scores`` [d, K] are the items' directions, ``phis`` the dispersions of z = 0 and 1."""
    x, z = rng.standard_normal((size, len(scores))), rng.integers(0, 2, size)
    return Contexts(np.hstack([x, z[:, None] * x]), np.asarray(phis)[z], np.argsort(-x @ scores, axis=1))


def draw_pairs(rng: np.random.Generator, contexts: Contexts) -> tuple[Items, Items]:
    """Two random items per context, ordered by one rater: chosen [N], rejected [N]."""
    place = np.argsort(contexts.rated(rng), axis=1)
    pair = rng.permuted(np.tile(np.arange(place.shape[1]), (len(place), 1)), axis=1)[:, :2]
    first = np.take_along_axis(place, pair, axis=1).argmin(axis=1)
    rows = np.arange(len(pair))
    return pair[rows, first], pair[rows, 1 - first]


def fit_reference(features: Floats, items: Items, n_items: int, ridge: float = 1e-4) -> Floats:
    """Supervised fine-tuning: weights [2 d, K] of the softmax policy that maximises the items' likelihood.

    ``ridge`` times the squared weights is added to the mean negative log-likelihood.
    """
    from scipy.optimize import minimize

    observed = np.eye(n_items)[items]

    def objective(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(-1, n_items)
        logp = log_policy(features, weights)
        slope = features.T @ (np.exp(logp) - observed) / len(items) + 2 * ridge * weights
        return -(logp * observed).sum() / len(items) + ridge * (weights**2).sum(), slope.ravel()

    start = np.zeros(features.shape[1] * n_items)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "gtol": 1e-8})
    return found.x.reshape(-1, n_items)


def log_policy(features: Floats, weights: Floats) -> Floats:
    """log pi(item | context) [N, K]."""
    from scipy.special import log_softmax

    return log_softmax(features @ weights, axis=1)


def train(
    contexts: Contexts,
    pairs: tuple[Items, Items],
    reference: Floats,
    test: Contexts,
    *,
    loss: str,
    beta: float,
    weight: Floats,
    rate: float,
    until_kl: float,
    max_steps: int,
) -> Path:
    """Full-batch gradient descent on the mean loss from the reference's weights, learning rate ``rate`` / beta.

    Dividing by beta gives runs of different beta about the same number of steps to the same KL. KL and reward are
    exact means over the test contexts, recorded at each of the first steps and at every fifth later on; the run stops
    at the first record beyond ``until_kl``.
    """
    features, test_features, rank = map(torch.as_tensor, (contexts.features, test.features, test.rank))
    picks = [torch.as_tensor(items)[:, None] for items in pairs]
    start = torch.as_tensor(reference)
    ref_logp, base = (torch.log_softmax(x @ start, 1) for x in (features, test_features))
    shared = {
        "pair_id": torch.arange(len(weight)),
        "chosen_tokens": torch.ones(len(weight), dtype=torch.long),
        "rejected_tokens": torch.ones(len(weight), dtype=torch.long),
        "ref_chosen_logp": ref_logp.gather(1, picks[0])[:, 0],
        "ref_rejected_logp": ref_logp.gather(1, picks[1])[:, 0],
        "dispersion_weight": torch.as_tensor(weight),
    }
    weights = start.clone().requires_grad_()
    kl, reward = [0.0], [-float((base.exp() * rank).sum(1).mean())]
    for step in range(1, max_steps + 1):
        logp = torch.log_softmax(features @ weights, 1)
        chosen, rejected = (logp.gather(1, pick)[:, 0] for pick in picks)
        batch = PairBatch(chosen_logp=chosen, rejected_logp=rejected, **shared)
        (slope,) = torch.autograd.grad(LOSSES[loss].fn(batch, beta=beta).mean(), weights)
        with torch.no_grad():
            weights -= rate / beta * slope
            if step <= DENSE_STEPS or step % 5 == 0:
                now = torch.log_softmax(test_features @ weights, 1)
                kl.append(float((now.exp() * (now - base)).sum(1).mean()))
                reward.append(-float((now.exp() * rank).sum(1).mean()))
        if kl[-1] > until_kl:
            break
    return Path(np.array(kl), np.array(reward))
