"""The Mallows-theta law of rankings (squared rank distance), exactly, for numbers of items that can be enumerated.

Rankings and centre as in ``kendall``; P(ranking) is proportional to phi^d, d the sum of squared rank differences.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput
from prefopt.mallows.kendall import neg_log

ENUMERABLE_ITEMS = 8  # 8! = 40,320 rankings
NORMALISABLE_ITEMS = 16  # 2^16 subsets


def spearman_distance(rankings: ArrayLike) -> NDArray[np.int64]:
    """Sum over items of (rank - central rank)^2 for each row [size, n] of items from best to worst."""
    rows = np.atleast_2d(np.asarray(rankings))
    return ((rows - np.arange(rows.shape[1])) ** 2).sum(axis=1)


def theta_law(n_items: int, phi: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All n! rankings [n!, n] and their probabilities [n!].

    Raises BadInput for more than 8 items or phi outside [0, 1].

    Source: 2405.14953, eq. 5 with the squared rank distance.
    """
    if n_items > ENUMERABLE_ITEMS:
        raise BadInput(f"Mallows-theta: {n_items} items; all rankings are listed for at most {ENUMERABLE_ITEMS}")
    neg_log(phi)
    rankings = np.array(list(permutations(range(n_items))), dtype=np.int64).reshape(-1, n_items)
    weight = np.power(float(phi), spearman_distance(rankings))
    return rankings, weight / weight.sum()


def theta_log_normaliser(n_items: int, phi: float) -> float:
    """log sum over rankings of phi^d: the permanent of phi^((item - place)^2), place by place over subsets of items.

    Raises BadInput for more than 16 items or phi outside [0, 1].
    """
    if n_items > NORMALISABLE_ITEMS:
        raise BadInput(f"Mallows-theta: {n_items} items; the normaliser sums subsets of at most {NORMALISABLE_ITEMS}")
    neg_log(phi)
    subsets = np.arange(2**n_items)
    weight = (subsets == 0).astype(float)
    for place in range(n_items):
        longer = np.zeros_like(weight)
        for item in range(n_items):
            free = subsets[(subsets >> item) & 1 == 0]
            longer[free | 1 << item] += weight[free] * float(phi) ** ((item - place) ** 2)
        weight = longer
    return float(np.log(weight[-1]))


def theta_pairwise(n_items: int, phi: float) -> NDArray[np.float64]:
    """P(item i comes before item j) [n, n], zero on the diagonal; it depends on n and on both positions.

    At least ``theta_conditional(j - i, phi)``, and equal to it only for n = 2.
    """
    rankings, probability = theta_law(n_items, phi)
    place = np.argsort(rankings, axis=1)
    return np.einsum("r,rij->ij", probability, place[:, :, None] < place[:, None, :])


def theta_conditional(distance: ArrayLike, phi: float, gap: int = 1) -> NDArray[np.float64]:
    """P(the centrally better item comes first | the two stand ``gap`` places apart) = sigmoid(-2 gap k log phi).

    k = ``distance`` >= 1 in central ranks. With gap 1 this is the paper's pairwise link, for every n.

    Source: 2405.14953, corollary 2 (there stated for the unconditional probability).
    """
    return 1 / (1 + np.exp(-2 * gap * neg_log(phi) * np.asarray(distance, dtype=float)))


def sample_mallows_theta(rng: np.random.Generator, n_items: int, phi: float, size: int) -> NDArray[np.int64]:
    """Draw rankings [size, n_items] from the enumerated law, at most 8 items."""
    rankings, probability = theta_law(n_items, phi)
    return rankings[rng.choice(len(rankings), size=size, p=probability)]
