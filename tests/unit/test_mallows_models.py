"""Mallows-theta, maximum likelihood with an unknown centre, and real rankings, against enumeration."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest

from prefopt.errors import BadInput
from prefopt.mallows import (
    consensus,
    fit_mallows_phi,
    kendall_distance,
    log_probability,
    mean_distance,
    sample_mallows_phi,
    sample_mallows_theta,
    spearman_distance,
    theta_conditional,
    theta_law,
    theta_log_normaliser,
    theta_pairwise,
    variance_distance,
)

PHIS = [0.05, 0.3, 0.7, 0.99]


def brute_spearman(ranking) -> int:
    """Sum over items of (place in the ranking - place in the centre)^2, item by item."""
    return sum((list(ranking).index(item) - item) ** 2 for item in range(len(ranking)))


# --- Mallows-theta


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("phi", [0.0, *PHIS, 1.0])
def test_theta_law_and_normaliser_by_enumeration(n, phi):
    rankings, probability = theta_law(n, phi)
    assert sorted(map(tuple, rankings)) == list(permutations(range(n)))
    distance = np.array([brute_spearman(row) for row in rankings])
    assert spearman_distance(rankings).tolist() == distance.tolist()
    weight = float(phi) ** distance
    np.testing.assert_allclose(probability, weight / weight.sum(), rtol=1e-13)
    assert theta_log_normaliser(n, phi) == pytest.approx(math.log(weight.sum()), rel=1e-12, abs=1e-14)


def test_theta_normaliser_counts_the_rankings_of_many_items():
    # phi = 1: every ranking has weight one.
    assert theta_log_normaliser(13, 1.0) == pytest.approx(math.lgamma(14), rel=1e-13)


def test_spearman_distance_of_the_reversed_ranking():
    # (n^3 - n) / 3, the largest there is.
    for n in (2, 5, 8):
        assert spearman_distance(np.arange(n)[::-1]).tolist() == [(n**3 - n) / 3]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("phi", PHIS)
def test_corollary_2_is_the_law_of_two_items_at_a_given_gap(n, phi):
    rankings, probability = theta_law(n, phi)
    place = np.argsort(rankings, axis=1)
    for better in range(n):
        for worse in range(better + 1, n):
            ahead = place[:, worse] - place[:, better]
            for gap in range(1, n):
                share = probability[ahead == gap].sum() / probability[np.abs(ahead) == gap].sum()
                assert theta_conditional(worse - better, phi, gap) == pytest.approx(share, rel=1e-11)


def test_corollary_2_is_not_the_marginal_beyond_two_items():
    # n = 2: d is 0 or 2, P = 1 / (1 + phi^2). n = 3, phi = .7: d of the six rankings is 0, 2, 2, 6, 6, 8.
    assert theta_pairwise(2, 0.7)[0, 1] == pytest.approx(1 / (1 + 0.7**2), rel=1e-14)
    first = (1 + 0.7**2 + 0.7**6) / (1 + 2 * 0.7**2 + 2 * 0.7**6 + 0.7**8)
    marginal = theta_pairwise(3, 0.7)
    assert marginal[0, 1] == pytest.approx(first, rel=1e-14)
    assert marginal[0, 1] == pytest.approx(0.707297487, abs=5e-10)
    assert marginal[0, 2] == pytest.approx(0.871116160, abs=5e-10)
    np.testing.assert_allclose(theta_conditional([1, 2], 0.7), [0.671140940, 0.806386582], atol=5e-10)
    np.testing.assert_allclose(marginal + marginal.T, 1 - np.eye(3), atol=1e-14)
    # A lower bound of the marginal for every pair, strict from n = 3 on.
    for n in (3, 5):
        for phi in PHIS:
            better, worse = np.triu_indices(n, 1)
            assert (theta_pairwise(n, phi)[better, worse] > theta_conditional(worse - better, phi)).all()


def test_theta_samples_follow_the_law():
    rows = sample_mallows_theta(np.random.default_rng(3), 4, 0.8, 40_000)
    rankings, probability = theta_law(4, 0.8)
    share = (rows[:, None] == rankings[None]).all(axis=2).mean(axis=0)
    np.testing.assert_array_less(np.abs(share - probability), 4.5 * np.sqrt(probability / 40_000))


def test_theta_refuses_what_it_cannot_enumerate():
    with pytest.raises(BadInput, match="9 items; all rankings are listed for at most 8"):
        theta_law(9, 0.5)
    with pytest.raises(BadInput, match="17 items"):
        theta_log_normaliser(17, 0.5)
    with pytest.raises(BadInput, match="from 0 to 1"):
        theta_law(3, 1.5)


# --- maximum likelihood


def brute_consensus_cost(rows) -> int:
    """Fewest discordant pairs of any centre, over all of them."""
    return min(int(kendall_distance(np.argsort(centre)[rows]).sum()) for centre in permutations(range(rows.shape[1])))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("phi", [0.4, 0.9, 1.0])
def test_consensus_has_the_fewest_discordant_pairs(n, phi):
    rng = np.random.default_rng(n)
    for _ in range(5):
        rows = rng.permutation(n)[sample_mallows_phi(rng, n, phi, 7)]
        centre, exact = consensus(rows)
        assert exact
        assert kendall_distance(np.argsort(centre)[rows]).sum() == brute_consensus_cost(rows)


def test_consensus_of_a_majority_without_a_winner():
    # Condorcet's cycle 0 > 1 > 2 > 0 with 4, 3, 2 voters: breaking its weakest link, 2 > 0 (5 of 9), costs least.
    rows = np.repeat([[0, 1, 2], [1, 2, 0], [2, 0, 1]], [4, 3, 2], axis=0)
    assert consensus(rows)[0].tolist() == [0, 1, 2]


def test_local_search_reaches_the_exact_consensus(monkeypatch):
    rng = np.random.default_rng(11)
    for phi in (0.6, 0.9):
        rows = rng.permutation(9)[sample_mallows_phi(rng, 9, phi, 40)]
        best, _ = consensus(rows)
        with monkeypatch.context() as patch:
            patch.setattr("prefopt.mallows.fit.EXACT_ITEMS", 2)
            found, exact = consensus(rows)
        assert not exact
        assert kendall_distance(np.argsort(found)[rows]).sum() == kendall_distance(np.argsort(best)[rows]).sum()


def test_local_search_improves_on_borda(monkeypatch):
    # Mean ranks put 1 first, though 0 beats every other item in five of nine rankings.
    monkeypatch.setattr("prefopt.mallows.fit.EXACT_ITEMS", 2)
    rows = np.repeat([[0, 1, 2, 3], [1, 2, 3, 0]], [5, 4], axis=0)
    assert np.argsort(np.argsort(rows, axis=1).mean(axis=0))[0] == 1
    assert consensus(rows)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [5, 20])
def test_fit_recovers_centre_and_dispersion(n):
    rng = np.random.default_rng(4)
    centre = rng.permutation(n)
    fit = fit_mallows_phi(centre[sample_mallows_phi(rng, n, 0.6, 600)])
    assert fit.centre == tuple(centre)
    assert abs(fit.phi - 0.6) < 4 * fit.phi_error
    assert fit.centre_exact == (n <= 12)


def test_fit_is_a_maximum_of_the_likelihood():
    rows = sample_mallows_phi(np.random.default_rng(5), 4, 0.5, 60)
    fit = fit_mallows_phi(rows)
    assert fit.log_likelihood == pytest.approx(log_probability(np.argsort(fit.centre)[rows], fit.phi).sum(), rel=1e-12)
    for centre in permutations(range(4)):
        for phi in (fit.phi, 0.9 * fit.phi, 1.1 * fit.phi, 0.9):
            assert log_probability(np.argsort(centre)[rows], phi).sum() <= fit.log_likelihood + 1e-9


@pytest.mark.parametrize("phi", PHIS)
def test_moments_of_the_distance_by_enumeration(phi):
    rows = np.array(list(permutations(range(5))))
    probability, distance = np.exp(log_probability(rows, phi)), kendall_distance(rows)
    mean = probability @ distance
    assert mean_distance(5, phi) == pytest.approx(mean, rel=1e-12)
    assert variance_distance(5, phi) == pytest.approx(probability @ (distance - mean) ** 2, rel=1e-10)


def test_standard_error_is_the_spread_of_the_estimate():
    rng = np.random.default_rng(6)
    fits = [fit_mallows_phi(sample_mallows_phi(rng, 5, 0.7, 150), range(5)) for _ in range(300)]
    # The spread of 300 estimates is itself known to 1 / sqrt(600) = 4 %.
    spread = np.std([fit.phi for fit in fits])
    assert np.mean([fit.phi_error for fit in fits]) == pytest.approx(spread, rel=0.16)


def test_standard_error_is_the_curvature_of_the_likelihood():
    rows = sample_mallows_phi(np.random.default_rng(8), 4, 0.5, 200)
    fit = fit_mallows_phi(rows, range(4))
    step = 1e-4
    low, mid, high = (log_probability(rows, fit.phi + move).sum() for move in (-step, 0.0, step))
    assert fit.phi_error == pytest.approx(1 / math.sqrt(-(low - 2 * mid + high) / step**2), rel=1e-5)


def test_fit_at_the_ends_has_no_standard_error():
    equal, opposite = fit_mallows_phi([[2, 0, 1]] * 3), fit_mallows_phi([[0, 1], [1, 0]])
    assert (equal.centre, equal.phi, equal.log_likelihood) == ((2, 0, 1), 0.0, 0.0)
    assert opposite.phi == 1.0
    assert opposite.log_likelihood == pytest.approx(2 * math.log(1 / 2), rel=1e-14)
    assert math.isnan(equal.phi_error)
    assert math.isnan(opposite.phi_error)


def test_what_is_no_ranking_is_refused_by_row():
    with pytest.raises(BadInput, match=r"row 1 is \[0, 0, 2\]"):
        fit_mallows_phi([[0, 1, 2], [0, 0, 2]])
    with pytest.raises(BadInput, match="the centre ranks 2 items, the rankings 3"):
        fit_mallows_phi([[0, 1, 2]], [0, 1])


def test_a_million_rankings_of_ten_items():
    phi, size = 0.5, 1_000_000
    distance = kendall_distance(sample_mallows_phi(np.random.default_rng(9), 10, phi, size)[:200_000])
    assert distance.mean() == pytest.approx(mean_distance(10, phi), abs=4 * math.sqrt(variance_distance(10, phi) / 2e5))


# --- real rankings: 4 pictures by their number of dots, 4 puzzles by their moves to the solution


def read_soc(path) -> np.ndarray:
    """Rankings of a PrefLib file of strict complete orders, items from 0."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            count, order = line.split(":")
            rows += [[int(item) - 1 for item in order.split(",")]] * int(count)
    return np.array(rows)


@pytest.mark.parametrize(
    ("file", "rankers", "phi"),
    [
        ("00024-00000001", 795, 0.771),  # 200, 203, 206, 209 dots
        ("00024-00000002", 794, 0.701),  # in steps of 5
        ("00024-00000003", 800, 0.585),
        ("00024-00000004", 794, 0.536),
        ("00025-00000002", 795, 0.534),  # 5, 8, 11, 14 moves
        ("00025-00000003", 795, 0.565),
        ("00025-00000004", 797, 0.671),
        ("00025-00000001", 793, 0.731),  # 11, 14, 17, 20 moves
    ],
)
def test_dispersion_of_real_rankings(shared_data, file, rankers, phi):
    rows = read_soc(shared_data / "mallows_rankings" / "preflib" / f"{file}.soc")
    assert len(rows) == rankers
    fit = fit_mallows_phi(rows, range(4))
    assert fit.phi == pytest.approx(phi, abs=0.002)
    assert 0.005 < fit.phi_error < 0.03
    # The crowd's consensus is the true order, so that an unknown centre changes nothing.
    assert fit_mallows_phi(rows) == fit


def test_real_dispersion_grows_with_difficulty(shared_data):
    folder = shared_data / "mallows_rankings" / "preflib"
    fits = [fit_mallows_phi(read_soc(folder / f"00024-0000000{number}.soc")) for number in (4, 3, 2, 1)]
    for easier, harder in pairwise(fits):
        assert harder.phi - easier.phi > 2 * math.hypot(easier.phi_error, harder.phi_error)
