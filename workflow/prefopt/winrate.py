"""Win rates against a baseline in AlpacaEval's coding, and intervals for means over prompts and seeds.

A preference is 1 where the baseline wins, 2 where the model wins, in between where a judge is torn; 1.5 and 0 are
draws, NaN is missing. Rates and standard errors are in points (0 to 100).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput
from prefopt.evaluation import length_control

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


def length_controlled_win_rate(
    annotations: Any,
    *,
    difficulty: ArrayLike | None,
    gamed: Any,
    C: float | None = None,  # noqa: N803 - the name that the metric's users know
    folds: ArrayLike | None = None,
    by_position: bool = False,
) -> dict[str, Any]:
    """Win metrics of ``win_rate``, and the win rate that the model would have with the baseline's output lengths.

    100 mean_i sigma(b_model + b_difficulty difficulty_i) after an L1-penalised logistic fit of p on (tanh of the length
    difference, difficulty, 1); see ``length_control``. ``lc_standard_error`` = 100 sd / sqrt(n) of these predictions is
    the published figure, and **no confidence interval**: it is their spread over prompts and knows nothing of the
    fit's own error. ``length_controlled_interval`` gives an interval.

    ``annotations``: data frame with ``preference``, ``len_model``, ``len_baseline`` (code points) and ``index``, the
    prompt's place in ``difficulty``, an array. ``gamed``: data frame of comparisons of the baseline with itself asked
    for other lengths, ``preference`` (0 to 1), ``std_delta_len``, ``instruction_difficulty``. Without ``gamed`` (None)
    nothing ties the coefficients ("noreg"); with ``difficulty`` None as well the fit has a length and a model term only
    ("minimal"), for prompts whose difficulties nobody knows: its ``lc_standard_error`` is 0 by construction.
    ``C`` None: 5-fold cross-validation over ``logspace(-4, 4, 10)`` with ``folds``, a number per training row (gamed
    rows, then the rows that have a preference), or the row's number modulo 5. ``by_position`` takes the row's place in
    the file instead of ``index``, as the published figures of files with missing rows did.

    Returns also ``variant``, ``C``, ``weights`` (by term) and ``avg_length``, the integer part of mean ``len_model``.
    Raises BadInput for input that cannot be used, FailedCheck where the fit does not converge.
    """
    compared = _compared(annotations, difficulty, gamed, by_position)
    metrics: dict[str, Any] = dict(win_rate(annotations["preference"]))
    rows = compared.training_rows()
    if C is None:
        C = length_control.choose_penalty(*rows, length_control.checked_folds(folds, len(rows[1])))  # noqa: N806
    weights = length_control.fit_l1_logistic(*rows, _checked_penalty(C))
    return metrics | {
        **length_control.mean_and_error(compared.without_length(weights)),
        "avg_length": int(annotations["len_model"].mean()),
        "variant": compared.variant,
        "C": float(C),
        "weights": dict(zip(compared.terms, map(float, weights), strict=True)),
    }


def length_controlled_interval(
    annotations: Any,
    *,
    difficulty: ArrayLike | None,
    gamed: Any,
    C: float,  # noqa: N803
    by_position: bool = False,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval, in points: prompts are drawn again and the model is fitted again each time.

    ``C`` is held fixed (take it from ``length_controlled_win_rate``), and so are the gamed rows. (NaN, NaN) for fewer
    than two preferences. Raises as ``length_controlled_win_rate``.
    """
    compared = _compared(annotations, difficulty, gamed, by_position)
    penalty = _checked_penalty(C)
    if np.isfinite(compared.p).sum() < 2:
        return float("nan"), float("nan")
    start = length_control.fit_l1_logistic(*compared.training_rows(), penalty)
    rng = np.random.default_rng(seed)
    rates = np.empty(resamples)
    for draw in range(resamples):
        again = compared.resampled(rng.integers(compared.p.size, size=compared.p.size))
        weights = length_control.fit_l1_logistic(*again.training_rows(), penalty, start)
        rates[draw] = 100 * again.without_length(weights).mean()
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _compared(annotations: Any, difficulty: Any, gamed: Any, by_position: bool) -> length_control.Comparison:
    if "preference" not in annotations:
        raise BadInput(f"length control: annotations lack the column 'preference'; there: {', '.join(annotations)}")
    p = model_win_probability(annotations["preference"])
    return length_control.comparison_of(p, annotations, difficulty, gamed, by_position)


def _checked_penalty(value: float) -> float:
    if not (np.isfinite(value) and value > 0):
        raise BadInput(f"length control: C is {value}; it must be a positive number")
    return float(value)


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
