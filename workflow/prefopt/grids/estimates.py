"""Intervals of grid items: seeds and prompts crossed, seeds alone, two samples of draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEVEL = 0.95
METHOD = (
    f"{100 * LEVEL:g} % Student-t intervals with seeds and prompts both as random and crossed: from the mean squares "
    "of seeds, prompts and the rest, Var(mean) = max(MS_seed + MS_prompt - MS_rest, MS_rest) / (S P), degrees of "
    "freedom after Satterthwaite; differences are taken prompt by prompt within a seed first. With one seed the "
    "interval covers the prompts only. Slopes, curves and frontiers have one number per seed: t over the seeds. "
    "Length-controlled win rates: the same on the infinitesimal jackknife's values of the fit. Dispersion weights: "
    "percentile bootstrap over prompts"
)


@dataclass(frozen=True)
class Interval:
    """A mean, its interval and the p-value of the two-sided test of 0; None where there is nothing to estimate from."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n_seeds: int
    n_prompts: int

    def summary(self) -> dict[str, Any]:
        """The interval as item.json holds it: mean, low, high, n_seeds, n_prompts."""
        return {key: value for key, value in vars(self).items() if key != "p"}


def crossed_interval(values: Values) -> Interval:
    """Mean of ``values`` [S seeds, P prompts], both random, with the t interval of the two-way layout.

    Var(mean) = max(MS_seed + MS_prompt - MS_rest, MS_rest) / (S P) with Satterthwaite's degrees of freedom; a single
    row or column is a plain sample. No limits for a single value.
    """
    seeds, prompts = values.shape
    if min(seeds, prompts) == 1:
        variance, freedom = float(np.var(values, ddof=1)) if values.size > 1 else 0.0, values.size - 1.0
    else:
        variance, freedom = _crossed_variance(values)
    return _student(values, variance, freedom, seeds, prompts)


def seed_interval(values: Values, n_prompts: int = 0) -> Interval:
    """Mean of one value per seed, ``values`` [S], with the t interval over seeds; no limits for one seed."""
    variance = float(np.var(values, ddof=1)) if values.size > 1 else 0.0
    return _student(values, variance, values.size - 1.0, values.size, n_prompts)


def _crossed_variance(values: Values) -> tuple[float, float]:
    """S P Var(mean) and its degrees of freedom."""
    seeds, prompts = values.shape
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    by_seed = prompts * float(((rows - mean) ** 2).sum()) / (seeds - 1)
    by_prompt = seeds * float(((columns - mean) ** 2).sum()) / (prompts - 1)
    of_rest = (seeds - 1) * (prompts - 1)
    rest = float(((values - rows[:, None] - columns[None, :] + mean) ** 2).sum()) / of_rest
    total = by_seed + by_prompt - rest
    if total <= rest:
        return rest, float(of_rest)
    parts = by_seed**2 / (seeds - 1) + by_prompt**2 / (prompts - 1) + rest**2 / of_rest
    return total, total**2 / parts


def _student(values: Values, variance: float, freedom: float, n_seeds: int, n_prompts: int) -> Interval:
    """The t interval of the mean of ``values`` with variance ``variance`` / size."""
    from scipy.special import stdtr, stdtrit

    mean = float(values.mean())
    if freedom < 1 and values.size < 2:
        return Interval(mean, None, None, None, n_seeds, n_prompts)
    error = float(np.sqrt(max(variance / values.size, np.finfo(float).tiny)))
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(mean / error)))
    return Interval(mean, mean - half, mean + half, p, n_seeds, n_prompts)


def welch(first: Values, second: Values) -> dict[str, float] | None:
    """Welch's unpaired test of two samples: ``t``, ``df``, two-sided ``p``; None where neither varies or one is single.

    Source: 2405.14953, tables 1 and 6 (ten generation seeds each).
    """
    if min(first.size, second.size) < 2:
        return None
    a, b = (float(np.var(sample, ddof=1)) / sample.size for sample in (first, second))
    if a + b == 0:
        return None
    from scipy.special import stdtr

    freedom = (a + b) ** 2 / (a**2 / (first.size - 1) + b**2 / (second.size - 1))
    t = float((first.mean() - second.mean()) / np.sqrt(a + b))
    return {"t": t, "df": freedom, "p": 2 * float(stdtr(freedom, -abs(t)))}
