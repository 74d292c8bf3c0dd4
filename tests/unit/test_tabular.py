"""Exact policies: expectations, optima and descent against closed forms, finite differences and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from prefopt.errors import FailedCheck
from prefopt.tabular import (
    LinearPolicy,
    PairObjective,
    bag_of_words,
    free_policy,
    gradient_flow,
    implicit_reward,
    kl,
    minimise,
    mixture_value,
    pessimistic_optimum,
    pessimistic_value,
    rlhf_optimum,
    rlhf_value,
)

REF = np.array([0.1, 0.2, 0.3, 0.4])
REWARD = np.array([1.0, -0.5, 0.25, 2.0])
TWO = np.array([REWARD, [2.0, 1.0, -1.0, -1.5]])
BETA = 0.5


def test_rlhf_optimum_vector():
    optimum = rlhf_optimum(REF, REWARD, BETA)
    np.testing.assert_allclose(
        optimum, [0.031923191256342, 0.003178724211200, 0.021369080332430, 0.943529004200028], atol=1e-12
    )
    assert rlhf_value(optimum, REF, REWARD, BETA) == pytest.approx(1.5709187208506814, abs=1e-12)
    # max over pi of E_pi[r] - E_ref[r] - beta KL(pi || ref) = beta KL(ref || pi_r)
    assert BETA * kl(REF, optimum) == pytest.approx(1.5709187208506814 - REF @ REWARD, abs=1e-12)


def test_no_other_policy_has_a_larger_value():
    rng = np.random.default_rng(0)
    best = rlhf_value(rlhf_optimum(REF, REWARD, BETA), REF, REWARD, BETA)
    assert all(rlhf_value(p, REF, REWARD, BETA) <= best for p in rng.dirichlet(np.ones(4), 500))


def test_implicit_reward_inverts_the_optimum_up_to_a_constant():
    constant = implicit_reward(rlhf_optimum(REF, REWARD, BETA), REF, BETA) - REWARD
    np.testing.assert_allclose(constant, constant[0], atol=1e-12)


def test_pessimism_vector():
    weights, policy = pessimistic_optimum(REF, TWO, BETA)
    assert weights[0] == pytest.approx(0.65428231, abs=1e-6)
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    np.testing.assert_allclose(policy, [0.384870, 0.054151, 0.054369, 0.506610], atol=1e-5)
    assert pessimistic_value(policy, REF, TWO, BETA) == pytest.approx(0.27221129925087545, abs=1e-12)
    singles = [pessimistic_value(rlhf_optimum(REF, r, BETA), REF, TWO, BETA) for r in TWO]
    np.testing.assert_allclose(singles, [-1.22145286669, -0.98190421651], atol=1e-10)
    assert pessimistic_value(REF, REF, TWO, BETA) == 0.0


@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_the_hull_solution_has_no_duality_gap_whatever_the_number_of_rewards(members):
    rng = np.random.default_rng(members)
    for _ in range(20):
        ref, rows = rng.dirichlet(np.ones(4)), rng.normal(size=(members, 4))
        weights, policy = pessimistic_optimum(ref, rows, 0.7)
        upper, value = mixture_value(weights, ref, rows, 0.7), pessimistic_value(policy, ref, rows, 0.7)
        assert weights.min() >= 0
        assert upper == pytest.approx(value, abs=1e-9)
        # any policy's value lies below any mixture's bound
        others = rng.dirichlet(np.ones(4), 50)
        assert max(pessimistic_value(p, ref, rows, 0.7) for p in others) <= upper + 1e-12


def test_bag_of_words_is_a_product_over_tokens():
    policy, sequences = bag_of_words(3, 4)
    theta = np.array([0.3, -1.0, 0.7])
    logp = theta - np.log(np.exp(theta).sum())
    expected = [sum(logp[token] for token in sequence) for sequence in itertools.product(range(3), repeat=4)]
    assert [tuple(s) for s in sequences] == list(itertools.product(range(3), repeat=4))
    np.testing.assert_allclose(policy.log_probabilities(theta), expected, atol=1e-12)
    assert policy.probabilities(theta).sum() == pytest.approx(1.0, abs=1e-12)


def objective(loss="dpo", gamma=0.05, **changes):
    rewards = TWO if loss.startswith("distill") else None
    settings = {"weights": np.array([0.2, 0.5, 0.3]), "rewards": rewards, **changes}
    return PairObjective(free_policy(REF), REF, [(0, 2), (3, 1), (1, 0)], loss, {"beta": BETA}, gamma, **settings)


@pytest.mark.parametrize("loss", ["dpo", "distill", "distill_ensemble", "distill_mean"])
def test_gradient_and_curvature_agree_with_finite_differences(loss):
    target, theta, step = objective(loss), np.array([0.4, -0.2, 0.9, 0.1]), 1e-6
    units = step * np.eye(4)
    slope = [(target.value(theta + u) - target.value(theta - u)) / (2 * step) for u in units]
    curvature = [(target.gradient(theta + u) - target.gradient(theta - u)) / (2 * step) for u in units]
    np.testing.assert_allclose(target.gradient(theta), slope, atol=1e-8)
    np.testing.assert_allclose(target.hessian(theta), curvature, atol=1e-7)


def test_value_is_the_weighted_loss_plus_forward_kl():
    theta = np.array([0.4, -0.2, 0.9, 0.1])
    policy = free_policy(REF)
    log_ratio = policy.log_probabilities(theta) - np.log(REF)
    margins = BETA * np.array([log_ratio[0] - log_ratio[2], log_ratio[3] - log_ratio[1], log_ratio[1] - log_ratio[0]])
    expected = [0.2, 0.5, 0.3] @ np.log1p(np.exp(-margins)) + 0.05 * kl(REF, policy.probabilities(theta))
    assert objective().value(theta) == pytest.approx(expected, abs=1e-14)


def test_flow_of_one_pair_follows_its_closed_form():
    # two free scores, beta 1: d margin / dt = 2 sigmoid(-margin), so margin + exp(margin) = 1 + 2 t
    target = PairObjective(free_policy([0.5, 0.5]), np.array([0.5, 0.5]), [(0, 1)], "dpo", {"beta": 1.0})
    for time, theta in zip([0.1, 10.0, 1e5], gradient_flow(target, [0.0, 0.0], [0.1, 10.0, 1e5]), strict=True):
        margin = theta[0] - theta[1]
        assert margin + math.exp(margin) == pytest.approx(1 + 2 * time, rel=1e-6)


def test_newton_finds_the_minimum_that_descent_finds():
    target = objective()
    found, descended = minimise(target, np.zeros(4)), gradient_flow(target, np.zeros(4), [1e5])[-1]
    assert np.abs(target.gradient(found)).max() < 1e-15
    np.testing.assert_allclose(
        free_policy(REF).probabilities(found), free_policy(REF).probabilities(descended), atol=1e-6
    )


def test_a_diverging_loss_is_told_and_not_returned():
    separable = PairObjective(free_policy(REF), REF, [(0, 1)], "dpo", {"beta": 1.0})
    with pytest.raises(FailedCheck, match="its margins may diverge"):
        minimise(separable, np.zeros(4))


def test_base_scores_are_the_policy_at_zero():
    policy = LinearPolicy(np.array([[1.0], [0.0], [3.0]]), np.log([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(policy.probabilities([0.0]), [0.2, 0.3, 0.5], atol=1e-15)
    np.testing.assert_allclose(policy.probabilities([[0.0], [1.0]])[1] * (0.2 * math.e + 0.3 + 0.5 * math.e**3),
                               [0.2 * math.e, 0.3, 0.5 * math.e**3], rtol=1e-12)  # fmt: skip
