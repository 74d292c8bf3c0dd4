"""Values per prompt of the length-controlled win rate: their mean is the rate, their spread is its error."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from prefopt.evaluation.lc_values import prompt_values
from prefopt.evaluation.length_control import comparison_of, fit_l1_logistic, sigmoid
from prefopt.winrate import length_controlled_interval, length_controlled_win_rate

N = 300


def judged(seed: int = 0, missing: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    len_model, len_baseline = rng.integers(100, 900, N), rng.integers(100, 900, N)
    difficulty = rng.normal(size=N)
    odds = 0.4 + 0.8 * np.tanh((len_model - len_baseline) / 300) + 0.7 * difficulty
    preference = 1 + sigmoid(odds + rng.normal(scale=0.5, size=N))
    preference[:missing] = np.nan
    return pd.DataFrame(
        {"preference": preference, "len_model": len_model, "len_baseline": len_baseline, "index": range(N)}
    ).assign(difficulty=difficulty)


def values_of(rows: pd.DataFrame, difficulty: np.ndarray | None):
    found = length_controlled_win_rate(rows, difficulty=difficulty, gamed=None, C=10.0)
    compared = comparison_of(rows["preference"].to_numpy() - 1, rows, difficulty, None, False)
    return found, prompt_values(compared, list(found["weights"].values()))


@pytest.mark.parametrize("known", [True, False], ids=["difficulties", "minimal"])
@pytest.mark.parametrize("missing", [0, 20])
def test_the_mean_is_the_win_rate_and_the_spread_is_the_bootstraps(known, missing):
    rows = judged(missing=missing)
    difficulty = rows["difficulty"].to_numpy() if known else None
    found, values = values_of(rows, difficulty)
    assert values.mean() == pytest.approx(found["length_controlled_win_rate"], abs=1e-9)
    low, high = length_controlled_interval(rows, difficulty=difficulty, gamed=None, C=10.0, resamples=400)
    ours = 2 * 1.96 * values.std(ddof=1) / np.sqrt(N)
    assert ours == pytest.approx(high - low, rel=0.15)  # 400 resamples know a width to about 5 %


def test_a_value_is_what_one_more_copy_of_the_prompt_would_do():
    """n (LC with the weight of row i raised by h - LC) / h, against the value minus the mean."""
    rows = judged(3)
    found, values = values_of(rows, None)
    compared = comparison_of(rows["preference"].to_numpy() - 1, rows, None, None, False)
    design, labels, weights = compared.training_rows()
    h = 1e-4
    gaps = []
    for row in (0, 17, 123):
        raised = weights.copy()
        raised[row] += h
        again = 100 * compared.without_length(fit_l1_logistic(design, labels, raised, 10.0)).mean()
        gaps.append(N * (again - found["length_controlled_win_rate"]) / h - (values[row] - values.mean()))
    spread = values.std()
    centred = np.array(gaps) - np.mean(gaps)  # the penalty and the centring move all of them alike
    assert np.abs(centred).max() < 0.02 * spread


def test_coefficients_at_zero_stay_there():
    rows = judged(1)
    compared = comparison_of(rows["preference"].to_numpy() - 1, rows, None, None, False)
    assert np.allclose(prompt_values(compared, [0.0, 0.0]), 50.0)
