"""The Mallows-phi law of rankings (Kendall distance): sampling and exact probabilities.

A ranking lists items from best to worst; the central ranking is 0, 1, ..., n - 1. P(ranking) is proportional to
phi^d, d the number of discordant pairs, 0 <= phi <= 1: small phi is strong agreement, phi = 1 is uniform.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput


def sample_mallows_phi(rng: np.random.Generator, n_items: int, phi: ArrayLike, size: int) -> NDArray[np.int64]:
    """Draw rankings [size, n_items]; each row lists the items from best to worst.

    Repeated insertion: item i goes to place j of 0..i with weight phi^(i - j). ``phi`` is one number or one per row.

    Raises BadInput for phi outside [0, 1].
    """
    lam = np.broadcast_to(neg_log(phi), (size,))
    place = np.zeros((size, n_items), dtype=np.int64)
    for item in range(1, n_items):
        at = item - _truncated_geometric(rng.random(size), lam, item)
        place[:, :item] += place[:, :item] >= at[:, None]
        place[:, item] = at
    return np.argsort(place, axis=1)


def _truncated_geometric(uniform: NDArray[np.float64], lam: NDArray[np.float64], last: int) -> NDArray[np.int64]:
    """d in 0..last with weight exp(-lam d), by inverting the distribution function."""
    steep = lam > 1e-12
    safe = np.where(steep, lam, 1.0)
    inverted = -np.log1p(uniform * np.expm1(-safe * (last + 1))) / safe
    return np.minimum(np.where(steep, inverted, uniform * (last + 1)).astype(np.int64), last)


def kendall_distance(rankings: ArrayLike) -> NDArray[np.int64]:
    """Number of item pairs in each row [size, n] that stand in another order than in 0, 1, ..., n - 1."""
    rows = np.atleast_2d(np.asarray(rankings))
    first, second = np.triu_indices(rows.shape[1], k=1)
    return (rows[:, first] > rows[:, second]).sum(axis=1)


def log_normaliser(n_items: int, phi: float) -> float:
    """log sum over rankings of phi^d = sum_i log(1 + phi + ... + phi^(i-1)), i = 1..n."""
    powers = np.power(float(phi), np.arange(n_items))
    return float(np.log(np.cumsum(powers)).sum())


def log_probability(rankings: ArrayLike, phi: float) -> NDArray[np.float64]:
    """log P of each row [size, n]; -inf off the centre where phi = 0."""
    rows = np.atleast_2d(np.asarray(rankings))
    distance = kendall_distance(rows)
    lam = float(neg_log(phi))
    # 0 * inf is not a number, but 0 discordant pairs at phi = 0 have weight one.
    weighted = np.where(distance == 0, 0.0, -lam * np.maximum(distance, 1))
    return weighted - log_normaliser(rows.shape[1], phi)


def pairwise_marginal(distance: ArrayLike, phi: float) -> NDArray[np.float64]:
    """P(the item ranked ``distance`` >= 1 places higher in the centre comes first) = h(k + 1) - h(k).

    h(k) = k / (1 - phi^k). Independent of n and of the positions. Real distances are allowed.

    Source: 2405.14953, corollary 3.
    """
    steps, lam = np.asarray(distance, dtype=float), float(neg_log(phi))
    if lam < 1e-6:
        return 0.5 + lam * (2 * steps + 1) / 12
    return (steps + 1) / -np.expm1(-lam * (steps + 1)) - steps / -np.expm1(-lam * steps)


def top_item_law(n_items: int, phi: float) -> NDArray[np.float64]:
    """P(the best item of a draw is r) for r = 0..n-1, proportional to phi^r."""
    powers = np.power(float(phi), np.arange(n_items))
    return powers / powers.sum()


def mean_distance(n_items: int, phi: float) -> float:
    """Expected number of discordant pairs: the sum over items i of the mean of d in 0..i-1 with weight phi^d."""
    return float(sum(np.arange(size) @ top_item_law(size, phi) for size in range(1, n_items + 1)))


def variance_distance(n_items: int, phi: float) -> float:
    """Variance of the number of discordant pairs: the same sum of variances, the terms being independent."""
    total = 0.0
    for size in range(1, n_items + 1):
        law, steps = top_item_law(size, phi), np.arange(size)
        total += float(law @ steps**2 - (law @ steps) ** 2)
    return total


def neg_log(phi: ArrayLike) -> NDArray[np.float64]:
    """-log phi; infinite at 0."""
    values = np.asarray(phi, dtype=float)
    if not np.all((values >= 0) & (values <= 1)):
        raise BadInput(f"dispersion phi is {values.ravel()[:3]}; expected numbers from 0 to 1")
    with np.errstate(divide="ignore"):
        return -np.log(values) + 0.0
