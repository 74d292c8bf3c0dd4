"""How far annotators agree on an item and over a data set, with ties as a vote of their own.

Counts are [N, 3]: votes for a, votes for b, ties. Entropies in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.annotators.votes import RankedPrompt, VotedPair
from prefopt.errors import BadInput
from prefopt.mallows import fit_mallows_phi

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

LEVEL = 0.95
TIE_BREAKS = 24  # random orders of tied responses that a ranking with ties stands for


def counts_of(pairs: Sequence[VotedPair]) -> NDArray[np.int64]:
    """Votes for a, for b and ties of every pair [N, 3]."""
    return np.array([pair.counts() for pair in pairs], dtype=np.int64).reshape(-1, 3)


def _entropy(shares: Floats) -> Floats:
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=-1)


def item_disagreement(counts: ArrayLike) -> pd.DataFrame:
    """Disagreement of every item, one row each; NaN where it has fewer than two votes.

    ``votes`` n; ``vote_entropy`` of the three outcomes (a unanimous tie is agreement: 0); ``preference_entropy`` of
    p = (n_a + n_tie / 2) / n (a tie is half a vote for each side: a unanimous tie is the largest, log 2);
    ``agreement``, the share of annotator pairs with the same vote; ``split``, whether votes differ at all.

    Raises BadInput for negative counts or another shape.
    """
    import pandas as pd

    table = np.asarray(counts, dtype=float)
    if table.ndim != 2 or table.shape[1] != 3 or (table < 0).any():
        raise BadInput(f"votes: counts of shape {table.shape}; expected [items, 3] of 0 or more: a, b, ties")
    n = table.sum(axis=1)
    enough = n >= 2
    safe = np.where(enough, n, 2.0)
    share = table / safe[:, None]
    p = share[:, 0] + share[:, 2] / 2
    agreeing = (table * (table - 1)).sum(axis=1) / (safe * (safe - 1))
    found = {
        "vote_entropy": _entropy(share),
        "preference_entropy": _entropy(np.column_stack([p, 1 - p])),
        "agreement": agreeing,
        "split": (table.max(axis=1) < n).astype(float),
    }
    return pd.DataFrame({"votes": n.astype(int)} | {k: np.where(enough, v, np.nan) for k, v in found.items()})


def vote_share(counts: ArrayLike) -> Floats:
    """p = (n_a + n_tie / 2) / n [N]: the share of votes for a. Raises BadInput for an item without a vote."""
    table = np.asarray(counts, dtype=float)
    n = table.sum(axis=1)
    if (n == 0).any():
        raise BadInput(f"votes: item {int(np.argmin(n))} has none")
    return (table[:, 0] + table[:, 2] / 2) / n


def wilson(successes: int, size: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share. Raises BadInput without observations. Source: Wilson 1927."""
    if not 0 <= successes <= size or size == 0:
        raise BadInput(f"share of {successes} in {size}: needs 0 <= successes <= size, size above 0")
    from scipy.special import ndtri

    z, share = float(ndtri((1 + level) / 2)), successes / size
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def pairwise_agreement(
    counts: ArrayLike, cluster: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Share of annotator pairs, over all items, that give the same vote, with a bootstrap interval over clusters.

    ``agreement`` = sum_i sum_k n_ik (n_ik - 1) / sum_i n_i (n_i - 1); ``low``, ``high`` percentile limits, items of one
    ``cluster`` (by default every item its own) drawn together; ``pairs`` of annotators. None without such a pair.
    """
    table = np.asarray(counts, dtype=float)
    same, every = (table * (table - 1)).sum(axis=1), table.sum(axis=1) * (table.sum(axis=1) - 1)
    if every.sum() == 0:
        return {"agreement": None, "low": None, "high": None, "pairs": 0}
    names = np.unique(np.arange(len(table)) if cluster is None else np.asarray(cluster), return_inverse=True)[1]
    by_cluster = np.column_stack([np.bincount(names, same), np.bincount(names, every)])
    drawn = resample_weights(len(by_cluster), resamples, seed) @ by_cluster
    low, high = np.nanquantile(
        np.divide(drawn[:, 0], drawn[:, 1], out=np.full(len(drawn), np.nan), where=drawn[:, 1] > 0),
        [(1 - LEVEL) / 2, (1 + LEVEL) / 2],
    )
    share = float(same.sum() / every.sum())
    return {"agreement": share, "low": float(low), "high": float(high), "pairs": int(every.sum() / 2)}


def resample_weights(clusters: int, resamples: int, seed: int) -> Floats:
    """How often each cluster is drawn in each resample [R, C], C of C with replacement."""
    drawn = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return drawn.astype(float)


def krippendorff_alpha(counts: ArrayLike) -> float | None:
    """1 - observed / expected disagreement of nominal votes; None where all votes are the same.

    Source: Krippendorff 2011, computing alpha-reliability, for nominal data with missing votes.
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(axis=1) >= 2]
    n = table.sum()
    totals = table.sum(axis=0)
    expected = 1 - (totals * (totals - 1)).sum() / (n * (n - 1)) if n > 1 else 0.0
    if expected == 0:
        return None
    observed = 1 - (table * (table - 1) / (table.sum(axis=1, keepdims=True) - 1)).sum() / n
    return float(1 - observed / expected)


def agreement_summary(
    counts: ArrayLike, cluster: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """A data set's agreement: counts, share of unanimous items (Wilson), pairwise agreement with and without ties.

    ``alpha`` takes every item in both orders, since which response is called a means nothing (or, where a is the
    majority's choice, would count as agreement by chance).
    """
    table = np.asarray(counts)
    items = item_disagreement(table)
    several = items["votes"] >= 2
    unanimous = int((items["split"] == 0).sum())
    decided = table.copy()
    decided[:, 2] = 0
    summary: dict[str, Any] = {
        "items": len(items),
        "votes": int(table.sum()),
        "items_with_several_votes": int(several.sum()),
        "ties": float(table[:, 2].sum() / max(table.sum(), 1)),
        "level_items": int((table[:, 0] == table[:, 1]).sum()),
        "pairwise": pairwise_agreement(table, cluster, resamples=resamples, seed=seed),
        "pairwise_without_ties": pairwise_agreement(decided, cluster, resamples=resamples, seed=seed),
        "alpha": krippendorff_alpha(np.vstack([table, table[:, [1, 0, 2]]])),
        "unanimous": None,
        "mean_vote_entropy": None,
    }
    if several.any():
        low, high = wilson(unanimous, int(several.sum()))
        summary["unanimous"] = {"share": unanimous / int(several.sum()), "low": low, "high": high}
        summary["mean_vote_entropy"] = float(items["vote_entropy"].mean())
    return summary


def phi_of_rankings(ranked: RankedPrompt, seed: int = 0) -> dict[str, Any] | None:
    """Mallows-phi fit of one prompt's rankings; None for fewer than two of them.

    Ties: each ranking stands for ``TIE_BREAKS`` orders with its ties broken at random, so that phi is fitted to the
    mean number of discordant pairs under random breaking; the standard error counts every annotator once.
    ``phi`` 0 where all agree, 1 where they are no closer than at random.
    """
    ranks = np.array(list(ranked.ranks.values()), dtype=float)
    if len(ranks) < 2:
        return None
    tied = any(len(set(row)) < len(row) for row in ranks.tolist())
    copies = TIE_BREAKS if tied else 1
    rng = np.random.default_rng(seed)
    orders = [np.lexsort((rng.random(ranks.shape[1]), row)) for row in ranks for _ in range(copies)]
    fitted = fit_mallows_phi(orders)
    return {
        "phi": fitted.phi,
        "phi_error": fitted.phi_error * np.sqrt(copies),
        "rankings": len(ranks),
        "responses": ranks.shape[1],
        "ties": tied,
        "best": ranked.systems[fitted.centre[0]],
    }
