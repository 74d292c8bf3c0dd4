"""Win metrics against the published AlpacaEval leaderboard, and the intervals around means."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefopt.errors import BadInput
from prefopt.winrate import bootstrap_interval, combine_orders, paired_difference, seed_interval, win_rate

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca_eval"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no ../shared/data/alpaca_eval beside the checkout")


@needs_published
@pytest.mark.parametrize(("annotations", "leaderboard", "models"), [
    ("annotations.csv.gz", "leaderboard.csv", 12),
    ("annotations_ae1.csv.gz", "leaderboard_ae1.csv", 4),
])  # fmt: skip
def test_published_leaderboards(annotations, leaderboard, models):
    rows = pd.read_csv(PUBLISHED / annotations)
    board = pd.read_csv(PUBLISHED / leaderboard, index_col=0)
    assert rows["model"].nunique() == models
    for model, part in rows.groupby("model"):
        ours, published = win_rate(part["preference"]), board.loc[model]
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            assert ours[name] == pytest.approx(published[name], abs=1e-8), (model, name)
        for name in ("n_wins", "n_wins_base", "n_draws", "n_total"):
            assert ours[name] == published[name], (model, name)
        assert ours["n_missing"] == part["preference"].isna().sum()


def test_win_rate_by_hand():
    # p = 1, .9, .5 (as 1.5), .5 (as 0), .2, 0 and one missing
    out = win_rate([2, 1.9, 1.5, 0, 1.2, 1, math.nan])
    p = np.array([1, 0.9, 0.5, 0.5, 0.2, 0])
    assert out["win_rate"] == pytest.approx(100 * 3.1 / 6)
    assert out["standard_error"] == pytest.approx(100 * math.sqrt(((p - p.mean()) ** 2).sum() / 5 / 6))
    assert out["discrete_win_rate"] == pytest.approx(100 * (2 + 2 / 2) / 6)
    counts = {name: out[name] for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "n_missing")}
    assert counts == {"n_wins": 2, "n_wins_base": 2, "n_draws": 2, "n_total": 6, "n_missing": 1}


def test_one_row_has_no_standard_error():
    assert math.isnan(win_rate([2])["standard_error"])


@pytest.mark.parametrize(
    ("preference", "message"),
    [([], "none of 0 rows"), ([None, None], "none of 2 rows"), ([1, 3], "row 1 is 3.0"), ([1, 0.5], "row 1 is 0.5")],
)
def test_unusable_preferences_are_named(preference, message):
    with pytest.raises(BadInput, match=message):
        win_rate(preference)


def test_two_orders():
    win, tie, loss = 2.0, 1.5, 1.0
    table = [
        (win, win, win), (win, tie, win), (tie, win, win),
        (loss, loss, loss), (loss, tie, loss), (tie, loss, loss),
        (win, loss, tie), (loss, win, tie), (tie, tie, tie), (0.0, win, win), (1.9, 1.4, tie),
    ]  # fmt: skip
    first, swapped, expected = map(list, zip(*table, strict=True))
    assert combine_orders(first, swapped).tolist() == expected
    # The rate is wins + half the ties.
    assert win_rate(combine_orders(first, swapped))["win_rate"] == pytest.approx(100 * (4 + 4 / 2) / 11)
    np.testing.assert_allclose(combine_orders([1.9, 0.0], [1.4, 2.0], rule="mean"), [1.65, 1.75])


def test_two_orders_with_a_missing_judgement():
    for rule in ("two_order", "mean"):
        assert np.isnan(combine_orders([2, math.nan, 1], [math.nan, 2, 1], rule=rule)).tolist() == [True, True, False]


def test_two_orders_must_be_paired():
    with pytest.raises(BadInput, match="2 judgements in the first order, 1 in the swapped"):
        combine_orders([1, 2], [1])
    with pytest.raises(BadInput, match="unknown rule 'max'"):
        combine_orders([1], [1], rule="max")


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    low, high = bootstrap_interval(values, resamples=4000)
    half = 1.959964 * values.std(ddof=1) / 30
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert (
        bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    )


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0, 1, 40), resamples=300, confidence=0.9, seed=trial)
        hits += low <= 0 <= high
    assert abs(hits / 200 - 0.9) < 4 * math.sqrt(0.09 / 200)


def test_paired_difference_removes_what_the_arms_share():
    rng = np.random.default_rng(2)
    prompt = rng.normal(0, 10, 300)
    a, b = prompt + 0.5 + rng.normal(0, 0.5, 300), prompt + rng.normal(0, 0.5, 300)
    out = paired_difference(a, b)
    assert out["n"] == 300
    assert out["mean"] == pytest.approx(a.mean() - b.mean(), rel=1e-9)
    assert 0.3 < out["low"] < 0.5 < out["high"] < 0.7
    flipped = paired_difference(b, a)
    assert flipped["mean"] == -out["mean"]
    with pytest.raises(BadInput, match="3 values against 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_seed_interval_is_students():
    # t(.975, 4 degrees of freedom) = 2.7764451; sd of 1..5 is sqrt(2.5)
    half = 2.7764451051977987 * math.sqrt(2.5 / 5)
    assert seed_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half), rel=1e-12)


def test_one_value_has_no_interval():
    assert all(map(math.isnan, (*seed_interval([1.0]), *bootstrap_interval([1.0]))))


@pytest.mark.parametrize("interval", [bootstrap_interval, seed_interval])
def test_values_must_be_there_and_finite(interval):
    with pytest.raises(BadInput, match="no values"):
        interval([])
    with pytest.raises(BadInput, match="value 1 is nan"):
        interval([1.0, math.nan])
