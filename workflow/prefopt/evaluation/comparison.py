"""Two policies judged against the same baseline on the same prompts: is one better?

Preferences are coded as in ``winrate``: 1 baseline, 2 model, 1.5 or 0 a draw, NaN missing. Rates are in points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput
from prefopt.grids.estimates import welch
from prefopt.winrate import model_win_probability, paired_difference

Floats = NDArray[np.float64]

EXACT_BELOW = 25
"""Discordant prompts below which McNemar's test is the exact binomial one; its chi-square needs about ten a side."""


def compare_policies(
    preference_a: ArrayLike,
    preference_b: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Win rate of A minus that of B, both against one baseline, with paired intervals and tests.

    ``preference_a`` and ``preference_b`` are [prompts] or [generation seeds, prompts], prompts in the same order. A
    prompt's value is the mean of p = preference - 1 over the seeds that have one; a prompt that one side lacks is left
    out of every number but the counts ``n_missing_a`` (only A lacks it), ``n_missing_b``, ``n_missing_both``.

    ``difference`` with the percentile bootstrap over prompts (``low``, ``high``); ``paired_t`` with t, df, p and the
    effect size ``d_z`` = mean / sd of the differences; ``mcnemar``: see there. ``welch``, over the win rates of single
    seeds and unpaired: t, df, p, and g (Hedges' corrected standardised difference); None with fewer than two seeds a
    side or where no seed differs. Tests are two-sided; a test that has nothing to work on is None.

    Raises BadInput for values outside the coding, unequal numbers of prompts, or no common prompt.
    """
    seeds_a, seeds_b = _by_seed(preference_a, "first"), _by_seed(preference_b, "second")
    if seeds_a.shape[1] != seeds_b.shape[1]:
        raise BadInput(f"compare policies: {seeds_a.shape[1]} prompts against {seeds_b.shape[1]}; pair them one to one")
    lacks_a, lacks_b = (np.isnan(seeds).all(axis=0) for seeds in (seeds_a, seeds_b))
    both = ~(lacks_a | lacks_b)
    if not both.any():
        raise BadInput(f"compare policies: none of {both.size} prompts has a preference on both sides")
    seeds_a, seeds_b = seeds_a[:, both], seeds_b[:, both]
    a, b = np.nanmean(seeds_a, axis=0), np.nanmean(seeds_b, axis=0)
    paired = paired_difference(100 * a, 100 * b, confidence=confidence, resamples=resamples, seed=seed)
    return {
        "win_rate_a": 100 * float(a.mean()),
        "win_rate_b": 100 * float(b.mean()),
        "difference": paired["mean"],
        "low": paired["low"],
        "high": paired["high"],
        "paired_t": paired_t(a, b),
        "mcnemar": mcnemar(a, b),
        "welch": _welch_of_seeds(seeds_a, seeds_b),
        "n_prompts": int(both.sum()),
        "n_missing_a": int((lacks_a & ~lacks_b).sum()),
        "n_missing_b": int((lacks_b & ~lacks_a).sum()),
        "n_missing_both": int((lacks_a & lacks_b).sum()),
        "n_seeds_a": len(seeds_a),
        "n_seeds_b": len(seeds_b),
    }


def paired_t(a: Floats, b: Floats) -> dict[str, float] | None:
    """Student's paired t test of ``a`` - ``b`` [n]: t = d_z sqrt(n) with d_z = mean / sd; None where sd is 0 or n 1."""
    difference = a - b
    if difference.size < 2 or np.ptp(difference) == 0:
        return None
    from scipy.special import stdtr

    effect = float(difference.mean() / difference.std(ddof=1))
    t = effect * difference.size**0.5
    freedom = difference.size - 1
    return {"t": t, "df": float(freedom), "p": 2 * float(stdtr(freedom, -abs(t))), "d_z": effect}


def mcnemar(a: Floats, b: Floats) -> dict[str, Any]:
    """McNemar's test on wins and losses: do prompts that only A wins outnumber those that only B wins?

    ``a``, ``b`` [n] win probabilities: above 1/2 is a win, below a loss. Prompts where either side draws say nothing
    about wins and losses and are left out, counted in ``n_ties``. With x = ``only_a`` and y = ``only_b``: the exact
    binomial p of min(x, y) out of x + y below ``EXACT_BELOW`` discordant prompts, else chi-square with continuity
    correction, (|x - y| - 1)^2 / (x + y), one degree of freedom. ``odds_ratio`` = x / y, None for y = 0; ``statistic``
    None for the exact test; ``p`` is 1 without discordant prompts.

    Source: McNemar 1947; Edwards 1948 (correction).
    """
    from scipy.stats import binomtest, chi2

    tied = (a == 0.5) | (b == 0.5)
    wins_a, wins_b = a[~tied] > 0.5, b[~tied] > 0.5
    x, y = int((wins_a & ~wins_b).sum()), int((wins_b & ~wins_a).sum())
    exact = x + y < EXACT_BELOW
    statistic = None if exact else max(abs(x - y) - 1, 0) ** 2 / (x + y)
    p = chi2.sf(statistic, 1) if not exact else binomtest(x, x + y).pvalue if x + y else 1.0
    return {
        "method": "exact binomial" if exact else "chi-square with continuity correction",
        "statistic": statistic,
        "p": float(p),
        "odds_ratio": x / y if y else None,
        "both_win": int((wins_a & wins_b).sum()),
        "only_a": x,
        "only_b": y,
        "both_lose": int((~wins_a & ~wins_b).sum()),
        "n_ties": int(tied.sum()),
    }


def _by_seed(preference: ArrayLike, side: str) -> Floats:
    """p [seeds, prompts]; an error names the seed and the prompt."""
    given = np.atleast_2d(np.asarray(preference, dtype=float))
    if given.ndim != 2:
        raise BadInput(f"compare policies: the {side} policy has {given.ndim} axes; expected seeds and prompts")
    rows = []
    for number, row in enumerate(given):
        try:
            rows.append(model_win_probability(row))
        except BadInput as error:
            raise BadInput(f"compare policies: the {side} policy, generation {number}: {error}") from error
    return np.array(rows)


def _welch_of_seeds(seeds_a: Floats, seeds_b: Floats) -> dict[str, float] | None:
    rates = [100 * np.nanmean(seeds[~np.isnan(seeds).all(axis=1)], axis=1) for seeds in (seeds_a, seeds_b)]
    test = welch(*rates)
    if test is None:
        return None
    freedoms = [rate.size - 1 for rate in rates]
    pooled = sum(n * rate.var(ddof=1) for n, rate in zip(freedoms, rates, strict=True)) / sum(freedoms)
    correction = 1 - 3 / (4 * sum(freedoms) - 1)  # a sample's standardised difference is too large
    return test | {"g": correction * float(rates[0].mean() - rates[1].mean()) / float(pooled) ** 0.5}
