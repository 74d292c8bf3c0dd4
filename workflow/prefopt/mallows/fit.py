"""Maximum likelihood of the Mallows-phi law: the central ranking (Kemeny's consensus) and the dispersion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput
from prefopt.mallows.kendall import (
    kendall_distance,
    log_normaliser,
    mean_distance,
    neg_log,
    variance_distance,
)

EXACT_ITEMS = 12  # 2^12 subsets in the exact search for the centre

Orders = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MallowsFit:
    """A fitted Mallows-phi law of m rankings."""

    centre: tuple[int, ...]  # items from best to worst
    phi: float
    phi_error: float  # standard error given the centre; NaN at phi = 0 and phi = 1
    log_likelihood: float  # nats, of all m rankings
    discordance: int  # discordant pairs with the centre, over all rankings
    centre_exact: bool  # given, or found by exact search; False where it comes from local search


def fit_phi(rankings: ArrayLike) -> float:
    """Maximum-likelihood phi of rankings [size, n >= 2] with centre 0..n-1: mean_distance(phi) = observed mean.

    1 where the rankings are no closer to the centre than at random, 0 where all equal it.
    """
    from scipy.optimize import brentq

    rows = np.atleast_2d(np.asarray(rankings))
    n_items, observed = rows.shape[1], float(kendall_distance(rows).mean())
    if observed == 0:
        return 0.0
    if observed >= n_items * (n_items - 1) / 4:
        return 1.0
    return float(brentq(lambda phi: mean_distance(n_items, phi) - observed, 0.0, 1.0, xtol=1e-12))


def fit_mallows_phi(rankings: ArrayLike, centre: ArrayLike | None = None) -> MallowsFit:
    """Fit the Mallows-phi law to rankings [m, n >= 2], items 0..n-1 from best to worst in each row.

    Where ``centre`` is None it is estimated too: the ranking with the fewest discordant pairs maximises the likelihood
    for every phi. Standard error of phi: phi / sqrt(m Var(d)), from the Fisher information of lambda = -log phi.

    Raises BadInput where a row or the centre is not a ranking of 0..n-1.
    """
    rows = _rankings(rankings)
    size, n_items = rows.shape
    order, exact = (_rankings(centre)[0], True) if centre is not None else consensus(rows)
    if len(order) != n_items:
        raise BadInput(f"Mallows fit: the centre ranks {len(order)} items, the rankings {n_items}")
    relabelled = np.argsort(order)[rows]
    phi, discordance = fit_phi(relabelled), int(kendall_distance(relabelled).sum())
    inside = 0 < phi < 1
    error = phi / np.sqrt(size * variance_distance(n_items, phi)) if inside else np.nan
    # All equal to the centre at phi = 0: 0 discordant pairs of infinite cost are worth nothing.
    cost = float(neg_log(phi)) * discordance if discordance else 0.0
    likelihood = -cost - size * log_normaliser(n_items, phi)
    return MallowsFit(tuple(order.tolist()), phi, float(error), likelihood, discordance, exact)


def consensus(rankings: ArrayLike) -> tuple[Orders, bool]:
    """Kemeny's ranking [n], with the fewest discordant pairs over all rows [m, n], and whether it is surely the best.

    Dynamic programming over subsets up to 12 items; above, insertion moves from Borda's order until none helps.
    """
    rows = _rankings(rankings)
    place = np.argsort(rows, axis=1)
    # objections[i, j]: rows in which j comes before i, the cost of a centre with i before j.
    objections = np.array([(place < column[:, None]).sum(axis=0) for column in place.T])
    if rows.shape[1] <= EXACT_ITEMS:
        return _exact_search(objections), True
    return _local_search(objections, np.argsort(place.mean(axis=0), kind="stable")), False


def _exact_search(objections: NDArray[np.int64]) -> Orders:
    """The best order by its prefixes: best[S + j] = min over j of best[S] + the cost of all of S before j."""
    n_items = len(objections)
    subsets = np.arange(2**n_items)
    member = (subsets[:, None] >> np.arange(n_items)) & 1
    size, added = member.sum(axis=1), member @ objections
    best = np.where(subsets == 0, 0, np.iinfo(np.int64).max)
    last = np.zeros(len(subsets), dtype=np.int64)
    for length in range(n_items):
        for item in range(n_items):
            prefix = subsets[(size == length) & (member[:, item] == 0)]
            longer, cost = prefix | 1 << item, best[prefix] + added[prefix, item]
            better = cost < best[longer]
            best[longer[better]], last[longer[better]] = cost[better], item
    order, subset = [], len(subsets) - 1
    while subset:
        order.append(int(last[subset]))
        subset ^= 1 << order[-1]
    return np.array(order[::-1])


def _local_search(objections: NDArray[np.int64], order: Orders) -> Orders:
    """Move single items to their best places until no move removes a discordant pair."""
    balance = objections - objections.T  # what putting i before j costs more than j before i
    improved = True
    while improved:
        improved = False
        for item in order.copy():
            rest = order[order != item]
            # Passing each item of the rest: from the front of the order to every later place.
            cost = np.concatenate([[0], np.cumsum(balance[rest, item])])
            now, best = int(np.flatnonzero(order == item)[0]), int(cost.argmin())
            if cost[best] < cost[now]:
                order, improved = np.insert(rest, best, item), True
    return order


def _rankings(values: ArrayLike) -> Orders:
    rows = np.atleast_2d(np.asarray(values))
    good = (np.sort(rows, axis=1) == np.arange(rows.shape[1])).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise BadInput(f"ranking: row {row} is {rows[row].tolist()}; expected every item 0..{rows.shape[1] - 1} once")
    return rows.astype(np.int64)
