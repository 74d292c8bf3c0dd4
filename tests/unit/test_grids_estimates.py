"""Intervals of grid items: crossed seeds and prompts, Welch, and the win rate at equal lengths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from prefopt.evaluation.length_control import length_term, sigmoid
from prefopt.grids.estimates import crossed_interval, seed_interval, welch
from prefopt.grids.lengths import length_controlled


def test_crossed_interval_by_hand():
    # mean 3; rows 1.5, 4.5; columns 2, 4; every residual is 1/2 in size.
    found = crossed_interval(np.array([[1.0, 2.0], [3.0, 6.0]]))
    by_seed, by_prompt, rest = 2 * (1.5**2 + 1.5**2), 2 * (1 + 1), 4 * 0.5**2
    total = by_seed + by_prompt - rest
    freedom = total**2 / (by_seed**2 + by_prompt**2 + rest**2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total / 4)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(3 / np.sqrt(total / 4), freedom))
    assert (found.n_seeds, found.n_prompts) == (2, 2)


def test_seeds_alone_and_prompts_alone_are_plain_t_tests():
    sample = np.random.default_rng(0).normal(0.3, 1, 30)
    expected = stats.ttest_1samp(sample, 0)
    limits = expected.confidence_interval()
    for found in (crossed_interval(sample[None, :]), crossed_interval(sample[:, None]), seed_interval(sample)):
        assert (found.low, found.high, found.p) == pytest.approx((limits.low, limits.high, expected.pvalue))


def test_a_pure_seed_effect_leaves_the_seeds_t_interval():
    level = np.array([0.2, 0.5, 0.9])
    found = crossed_interval(np.repeat(level[:, None], 50, axis=1))
    alone = seed_interval(level)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_values_without_spread_are_certain_and_single_values_unknown():
    same = crossed_interval(np.full((3, 8), 0.25))
    assert (same.low, same.high) == pytest.approx((0.25, 0.25))
    assert same.p == 0
    assert crossed_interval(np.zeros((3, 8))).p == 1
    for alone in (crossed_interval(np.array([[2.0]])), seed_interval(np.array([2.0]))):
        assert (alone.mean, alone.low, alone.high, alone.p) == (2.0, None, None, None)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("of_seed", [0.0, 0.1, 0.5])
def test_crossed_interval_covers_as_often_as_it_says(seeds, of_seed):
    # of_seed 0: prompts decide; 0.1: as much as the prompts' share 1 / sqrt(100); 0.5: the seeds decide.
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(2000):
        values = of_seed * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, 100)) + rng.normal(size=(seeds, 100))
        found = crossed_interval(values)
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 2000 <= 0.98


def test_welch_is_scipys():
    first, second = np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5, 0.2, 0.4])
    expected = stats.ttest_ind(first, second, equal_var=False)
    found = welch(first, second)
    assert (found["t"], found["df"], found["p"]) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert welch(first[:1], second) is None
    assert welch(np.ones(3), np.zeros(3)) is None


def length_data(seed, slope, model, shape=(3, 2, 200)):
    """Outcomes whose odds are slope * length term + model."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(-4, 6, shape)  # the opponent's length minus the model's: the model writes more
    chance = sigmoid(slope * length_term(longer.ravel()).reshape(shape) + model)
    return (rng.uniform(size=shape) < chance).astype(float), longer


def test_where_length_alone_decides_the_length_controlled_rate_is_near_fifty():
    outcome, longer = length_data(0, slope=-2.0, model=0.0)
    found = length_controlled(outcome, longer)
    assert 100 * outcome.mean() > 60
    assert found.low < 50 < found.high
    assert found.mean == pytest.approx(50, abs=5)


def test_a_real_advantage_stays_at_equal_lengths():
    outcome, longer = length_data(1, slope=-1.0, model=0.8)
    found = length_controlled(outcome, longer)
    assert found.mean == pytest.approx(100 * sigmoid(0.8), abs=4)
    assert found.low > 50


def test_equal_lengths_change_nothing():
    outcome, _ = length_data(2, slope=0.0, model=0.5)
    outcome[0, 0, :9] = 0.5  # ties are half a win
    for longer in (np.zeros_like(outcome), np.full_like(outcome, 3.0)):
        assert length_controlled(outcome, longer).mean == pytest.approx(100 * outcome.mean())


def test_swapping_the_sides_mirrors_the_length_controlled_rate():
    outcome, longer = length_data(3, slope=-1.5, model=0.4)
    found, mirrored = length_controlled(outcome, longer), length_controlled(1 - outcome, -longer)
    assert mirrored.mean == pytest.approx(100 - found.mean)
    assert mirrored.low == pytest.approx(100 - found.high)


def test_the_fits_interval_agrees_with_leaving_cells_out():
    # Delete-one jackknife over the cells of one seed: pseudo-values of the intercept, plain t interval.
    outcome, longer = length_data(4, slope=-1.0, model=0.3, shape=(1, 1, 300))
    found = length_controlled(outcome, longer)
    logit = lambda percent: np.log(percent / (100 - percent))  # noqa: E731
    left_out = [
        logit(length_controlled(np.delete(outcome, i, axis=2), np.delete(longer, i, axis=2)).mean) for i in range(300)
    ]
    pseudo = 300 * logit(found.mean) - 299 * np.array(left_out)
    spread = stats.t.ppf(0.975, 299) * pseudo.std(ddof=1) / np.sqrt(300)
    assert (logit(found.high) - logit(found.low)) / 2 == pytest.approx(spread, rel=0.05)


def test_the_length_controlled_interval_covers_about_as_often_as_it_says():
    covered = 0
    for seed in range(300):
        found = length_controlled(*length_data(seed + 10, slope=-1.0, model=0.4, shape=(3, 1, 80)))
        covered += found.low <= 100 * sigmoid(0.4) <= found.high
    assert 0.9 <= covered / 300 <= 1.0


def test_no_length_controlled_rate_where_every_answer_wins_or_length_separates():
    longer = np.random.default_rng(0).normal(size=(2, 1, 30))
    assert length_controlled(np.ones((2, 1, 30)), longer) is None
    assert length_controlled(np.zeros((2, 1, 30)), longer) is None
    assert length_controlled((longer > 0.1).astype(float), longer) is None
