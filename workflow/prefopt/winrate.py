"""Win rates against a baseline in AlpacaEval's coding, and intervals for means over prompts and seeds.

A preference is 1 where the baseline wins, 2 where the model wins, in between where a judge is torn; 1.5 and 0 are
draws, NaN is missing. Rates and standard errors are in points (0 to 100).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput

Floats = NDArray[np.float64]


def model_win_probability(preference: ArrayLike) -> Floats:
    """preference - 1 with 0 read as the draw 1.5: 0 baseline .. 1 model; NaN stays.

    Raises BadInput, naming the row, for other values.
    """
    coded = np.asarray(preference, dtype=float)
    coded = np.where(coded == 0, 1.5, coded)
    valid = np.isnan(coded) | ((coded >= 1) & (coded <= 2))
    if not valid.all():
        row = int(np.argmin(valid))
        raise BadInput(
            f"preference: row {row} is {coded[row]}; expected 1 (baseline) to 2 (model), 0 (draw) or missing"
        )
    return coded - 1


def win_rate(preference: ArrayLike) -> dict[str, float | int]:
    """AlpacaEval's win metrics over the rows that have a preference.

    ``win_rate`` = 100 mean(p), ``standard_error`` = 100 sd(p, ddof 1) / sqrt(n) with p = preference - 1;
    ``discrete_win_rate`` counts every row as win, draw (p = 1/2 exactly) or loss; NaN standard error for one row.

    Raises BadInput without any preference or for values outside the coding.
    """
    p = model_win_probability(preference)
    n_missing = int(np.isnan(p).sum())
    p = p[~np.isnan(p)]
    if p.size == 0:
        raise BadInput(f"win rate: none of {n_missing} rows has a preference; check the judge's answers")
    wins, losses = int((p > 0.5).sum()), int((p < 0.5).sum())
    draws = p.size - wins - losses
    return {
        "win_rate": 100 * float(p.mean()),
        "standard_error": 100 * float(p.std(ddof=1)) / p.size**0.5 if p.size > 1 else float("nan"),
        "discrete_win_rate": 100 * (wins + draws / 2) / p.size,
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": int(p.size),
        "n_missing": n_missing,
    }


def combine_orders(
    first_order: ArrayLike, swapped_order: ArrayLike, rule: Literal["two_order", "mean"] = "two_order"
) -> Floats:
    """One preference per prompt from judgements in both orders, each already coded with 2 = model wins.

    ``two_order``: 2 for a win in both or a win and a draw, 1 for the same with losses, else 1.5;
    ``mean``: the mean of both. NaN where either order is missing.

    Raises BadInput for values outside the coding, unequal lengths or an unknown rule.

    Source: 2405.14953, section 5 (two-order rule of its judge).
    """
    first, swapped = model_win_probability(first_order), model_win_probability(swapped_order)
    if first.shape != swapped.shape:
        raise BadInput(f"combine_orders: {first.size} judgements in the first order, {swapped.size} in the swapped one")
    if rule == "mean":
        return 1 + (first + swapped) / 2
    if rule != "two_order":
        raise BadInput(f"combine_orders: unknown rule '{rule}'; known: mean, two_order")
    return 1.5 + np.sign(np.sign(first - 0.5) + np.sign(swapped - 0.5)) / 2


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; (NaN, NaN) for a single value.

    Raises BadInput without values or with values that are not finite.
    """
    sample = _finite(values)
    if sample.size == 1:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap

    result = bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // sample.size),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, float | int]:
    """Mean of a - b over the same prompts or seeds with its bootstrap interval: ``mean``, ``low``, ``high``, ``n``.

    Raises BadInput for unequal lengths, no values, or values that are not finite.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape:
        raise BadInput(f"paired difference: {first.size} values against {second.size}; pair them one to one")
    difference = first - second
    low, high = bootstrap_interval(difference, confidence=confidence, resamples=resamples, seed=seed)
    return {"mean": float(difference.mean()), "low": low, "high": high, "n": int(difference.size)}


def seed_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student t interval of the mean over independent seeds; (NaN, NaN) for a single seed.

    Raises BadInput without values or with values that are not finite.
    """
    sample = _finite(values)
    if sample.size == 1:
        return float("nan"), float("nan")
    from scipy.stats import t

    half = t.ppf((1 + confidence) / 2, sample.size - 1) * sample.std(ddof=1) / np.sqrt(sample.size)
    return float(sample.mean() - half), float(sample.mean() + half)


def _finite(values: ArrayLike) -> Floats:
    sample = np.asarray(values, dtype=float).ravel()
    if sample.size == 0:
        raise BadInput("no values to average; at least one is needed")
    if not np.isfinite(sample).all():
        row = int(np.argmin(np.isfinite(sample)))
        raise BadInput(f"value {row} is {sample[row]}; leave missing values out first, and count them")
    return sample
