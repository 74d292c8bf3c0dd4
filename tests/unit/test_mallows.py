"""The Mallows-phi law against enumeration of all rankings."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from prefopt.errors import BadInput
from prefopt.losses.mallows import log_link
from prefopt.mallows import (
    fit_phi,
    kendall_distance,
    log_normaliser,
    log_probability,
    mean_distance,
    pairwise_marginal,
    sample_mallows_phi,
    top_item_law,
)

PHIS = [0.05, 0.3, 0.5, 0.9, 0.99]


def all_rankings(n: int) -> np.ndarray:
    return np.array(list(permutations(range(n))))


def brute_distance(ranking) -> int:
    return sum(ranking[i] > ranking[j] for i in range(len(ranking)) for j in range(i + 1, len(ranking)))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("phi", [0.0, *PHIS, 1.0])
def test_law_and_normaliser_by_enumeration(n, phi):
    rows = all_rankings(n)
    distances = np.array([brute_distance(row) for row in rows])
    assert kendall_distance(rows).tolist() == distances.tolist()
    weights = float(phi) ** distances
    assert math.exp(log_normaliser(n, phi)) == pytest.approx(weights.sum(), rel=1e-12)
    np.testing.assert_allclose(np.exp(log_probability(rows, phi)), weights / weights.sum(), rtol=1e-12)
    assert mean_distance(n, phi) == pytest.approx((weights * distances).sum() / weights.sum(), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("phi", PHIS)
def test_pairwise_marginal_by_enumeration(n, phi):
    rows = all_rankings(n)
    probability = np.exp(log_probability(rows, phi))
    place = np.argsort(rows, axis=1)
    for better in range(n):
        for worse in range(better + 1, n):
            exact = probability[place[:, better] < place[:, worse]].sum()
            assert pairwise_marginal(worse - better, phi) == pytest.approx(exact, rel=1e-11)


def test_pairwise_marginal_vectors():
    # phi = 1/2: h = 2, 8/3, 24/7, 64/15
    np.testing.assert_allclose(pairwise_marginal([1, 2, 3], 0.5), [2 / 3, 16 / 21, 64 / 15 - 24 / 7], rtol=1e-14)
    assert pairwise_marginal(3, 0.5) == pytest.approx(0.838095238095, rel=1e-11)
    assert pairwise_marginal(4, 1.0) == 0.5


@pytest.mark.parametrize("phi", PHIS)
def test_the_training_link_is_the_pairwise_marginal(phi):
    steps = torch.arange(1, 40, dtype=torch.float64)
    link = log_link(steps, torch.full_like(steps, -math.log(phi)))
    np.testing.assert_allclose(link.exp().numpy(), pairwise_marginal(steps.numpy(), phi), rtol=1e-11)


@pytest.mark.parametrize("phi", [0.0, 0.2, 0.7, 0.999999999, 1.0])
def test_samples_follow_the_law(phi):
    n, size = 4, 40_000
    rows = sample_mallows_phi(np.random.default_rng(5), n, phi, size)
    assert rows.shape == (size, n)
    assert (np.sort(rows, axis=1) == np.arange(n)).all()
    for ranking in all_rankings(n):
        exact = math.exp(log_probability(ranking, phi)[0])
        share = (rows == ranking).all(axis=1).mean()
        assert abs(share - exact) <= 4.5 * math.sqrt(exact * (1 - exact) / size) + 1e-12


def test_every_row_can_have_its_own_phi():
    phi = np.repeat([0.0, 0.3, 1.0], 20_000)
    distance = kendall_distance(sample_mallows_phi(np.random.default_rng(6), 5, phi, len(phi))).reshape(3, -1)
    assert (distance[0] == 0).all()
    for row, value in zip(distance[1:], (0.3, 1.0), strict=True):
        assert row.mean() == pytest.approx(mean_distance(5, value), abs=4 * row.std() / math.sqrt(row.size))


def test_samples_are_reproducible():
    first, second = (sample_mallows_phi(np.random.default_rng(1), 6, 0.4, 50) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("phi", PHIS)
def test_top_item_is_truncated_geometric(phi):
    n = 5
    rows = all_rankings(n)
    probability = np.exp(log_probability(rows, phi))
    exact = [probability[rows[:, 0] == item].sum() for item in range(n)]
    np.testing.assert_allclose(top_item_law(n, phi), exact, rtol=1e-12)


def test_entropy_of_the_top_item_tracks_the_dispersion():
    # x = -1.39 log(H / log 5) against lambda: the noiseless curve of the estimator's validation figure.
    lam = [0.5, 1, 2, 3, 4, 5]
    laws = [top_item_law(5, math.exp(-value)) for value in lam]
    curve = [-1.39 * math.log(-(law * np.log(law)).sum() / math.log(5)) for law in laws]
    np.testing.assert_allclose(curve, [0.1995, 0.6615, 1.7471, 2.8424, 3.9612, 5.1123], atol=1e-4)


@pytest.mark.parametrize("phi", [0.1, 0.5, 0.8])
def test_maximum_likelihood_is_a_stationary_maximum(phi):
    rows = sample_mallows_phi(np.random.default_rng(7), 5, phi, 4000)
    estimate = fit_phi(rows)
    assert estimate == pytest.approx(phi, abs=0.03)
    best = log_probability(rows, estimate).sum()
    assert all(log_probability(rows, estimate * factor).sum() < best for factor in (0.99, 1.01))


def test_maximum_likelihood_at_the_ends():
    assert fit_phi([[0, 1, 2]] * 3) == 0.0
    assert fit_phi([[2, 1, 0], [2, 0, 1]]) == 1.0


@pytest.mark.parametrize("phi", [-0.1, 1.1, math.nan])
def test_phi_outside_its_range_is_refused(phi):
    with pytest.raises(BadInput, match="from 0 to 1"):
        sample_mallows_phi(np.random.default_rng(0), 3, phi, 2)
