"""Methods around a pair loss against the vectors of the papers' document, and what each promises on small worlds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import expit, log_expit

from prefopt.outer.annotator_types import expectation, min_max_regret
from prefopt.outer.general_preference import (
    against_policy,
    fit,
    gpo_residual,
    gpo_step,
    preferred,
    scores,
)
from prefopt.outer.rounds import (
    advantage_policy,
    advantage_regression,
    class_moments,
    diffusion_dpo,
    extrapolated,
    pessimistic_tilt,
    wasserstein,
)

EXACT = {"rtol": 1e-12, "atol": 1e-15}
MARGIN = np.array([1.2, -1.4, 0.85])


def test_responsibilities_of_two_annotators():
    """A labelled pairs 0 and 2, B pair 1; the weight on a pair is that of its annotator."""
    margins = np.array([MARGIN, [-0.5, 1.0, -0.3]])
    found = expectation(margins, np.array([0, 1, 0]), np.array([0.6, 0.4]), 0.1)
    expected = [[0.6331346656348301, 0.36686533436516977], [0.5705919224305055, 0.4294080775694945]]
    np.testing.assert_allclose(found.responsibility, expected, **EXACT)
    np.testing.assert_allclose(found.prior, [0.6018632940326678, 0.39813670596733214], **EXACT)
    weighted = found.responsibility[[0, 1, 0], 0] * -log_expit(0.1 * MARGIN)
    np.testing.assert_allclose(weighted, [0.4020063877298776, 0.4368424268932886, 0.41251891280228575], **EXACT)


def test_em_recovers_annotator_types():
    """Two types with opposite tastes over six items: EM from a small asymmetry sorts 40 annotators by their taste."""
    rng = np.random.default_rng(3)
    taste = np.array([1.5, 1.0, 0.5, -0.5, -1.0, -1.5])
    first, second = np.array([(i, j) for i in range(6) for j in range(6) if i < j]).T
    types = rng.random(40) < 0.6
    annotator = np.repeat(np.arange(40), len(first))
    gap = np.tile(taste[first] - taste[second], 40) * np.where(types, 1, -1)[annotator]
    won = rng.random(len(gap)) < expit(gap)
    chosen = np.where(won, np.tile(first, 40), np.tile(second, 40))
    rejected = np.where(won, np.tile(second, 40), np.tile(first, 40))
    reward, prior = 0.01 * rng.normal(size=(2, 6)), np.array([0.5, 0.5])
    for _ in range(300):
        margins = reward[:, chosen] - reward[:, rejected]
        step = expectation(margins, annotator, prior, 1.0)
        prior = step.prior
        slope = step.responsibility[annotator].T * expit(-margins)
        for kind in range(2):  # M-step: weighted gradient ascent of the Bradley-Terry log-likelihood
            gradient = np.bincount(chosen, slope[kind], 6) - np.bincount(rejected, slope[kind], 6)
            reward[kind] += 0.01 * gradient
    assigned = step.responsibility.argmax(axis=1)
    agreement = (assigned == types).mean()
    assert max(agreement, 1 - agreement) >= 0.95
    assert sorted(prior) == pytest.approx(sorted([types.mean(), 1 - types.mean()]), abs=0.05)


def test_min_max_regret_equalises_what_two_types_lose():
    """Regrets 1 - w and 2 w are equal at w = 1/3; with a policy good for both, .1 (1 - w) = 2 w + .05 (1 - w)."""
    np.testing.assert_allclose(min_max_regret(np.array([[1.0, 0.0], [0.0, 2.0]])), [1 / 3, 2 / 3], atol=1e-9)
    shared = min_max_regret(np.array([[1.0, 0.0, 0.9], [0.0, 2.0, 1.95]]))
    np.testing.assert_allclose(shared, [0.05 / 2.05, 0.0, 2 / 2.05], atol=1e-9)


@pytest.mark.parametrize(
    ("margins", "annotators"), [(np.zeros((3, 2)), [0, 1]), (np.zeros((2, 3)), [0, 1]), (np.zeros((2, 2)), [0, 2])]
)
def test_shapes_and_numbers_of_annotators_are_checked(margins, annotators):
    with pytest.raises(ValueError, match=r"margins|annotators"):
        expectation(margins, np.array(annotators), np.array([0.5, 0.5]), 0.1)


def test_general_preference_score():
    vectors = np.array([[0.6, 0.8, 0.0, 0.0], [0.8, -0.6, 0.0, 0.0]])
    assert scores(vectors)[0, 1] == pytest.approx(-1.0, rel=1e-12)
    assert preferred(vectors, 0.1)[0, 1] == pytest.approx(4.5397868702434395e-05, rel=1e-12)


def test_two_dimensions_with_a_one_are_bradley_terry():
    reward = np.random.default_rng(0).normal(size=7)
    vectors = np.column_stack([reward, np.ones(7)])
    np.testing.assert_allclose(scores(vectors), reward[:, None] - reward[None], atol=1e-12)


def test_scores_are_skew_symmetric():
    vectors = np.random.default_rng(1).normal(size=(5, 6))
    np.testing.assert_allclose(scores(vectors), -scores(vectors).T, atol=1e-12)


def test_a_cycle_is_learned_by_vectors_and_by_no_reward():
    """Rock beats scissors beats paper beats rock: a reward ranks at most two of the three pairs right."""
    winner, loser = np.array([0, 1, 2] * 5), np.array([1, 2, 0] * 5)
    score = scores(fit(winner, loser, 3, 2))
    assert (score[winner, loser] > 0).all()
    rewards = np.random.default_rng(2).normal(size=(1000, 3))
    assert ((rewards[:, winner[:3]] > rewards[:, loser[:3]]).sum(axis=1) <= 2).all()


def test_fit_is_at_a_minimum():
    """The gradient by finite differences vanishes at the solution."""
    winner, loser = np.array([0, 1, 2, 0, 3]), np.array([1, 2, 0, 3, 1])

    def objective(flat: np.ndarray) -> float:
        margin = scores(flat.reshape(4, 4))[winner, loser] / 0.1
        return -log_expit(margin).mean() + 0.001 * (flat**2).sum()

    found = fit(winner, loser, 4, 4).ravel()
    assert np.abs(approx_fprime(found, objective, 1e-7)).max() < 1e-4


def test_gpo_residual():
    found = gpo_residual([0.5, -0.8, -0.25], [0.8, -0.4, 0.3], 0.5)
    np.testing.assert_allclose(found, [1.2100000000000002, 0.0, 0.7224999999999999], rtol=1e-12, atol=1e-30)


def test_a_gpo_round_ends_where_the_residual_is_constant():
    """log pi_{t+1}/pi_t - s/beta = -log Z for every response, so residuals are equal; a uniform cycle stays."""
    rng = np.random.default_rng(4)
    score, policy = scores(rng.normal(size=(5, 4))), rng.dirichlet(np.ones(5))
    gap = np.log(gpo_step(policy, score, 0.7) / policy) - against_policy(score, policy) / 0.7
    np.testing.assert_allclose(gap, gap[0], atol=1e-12)
    cycle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    np.testing.assert_allclose(gpo_step(np.full(3, 1 / 3), cycle, 0.5), 1 / 3, atol=1e-12)


def test_accelerated_round():
    found = extrapolated([0.6, 0.3, 0.1], [0.5, 0.3, 0.2], 0.3)
    np.testing.assert_allclose(found, [0.624392800148752, 0.29557896025739644, 0.08002823959385161], **EXACT)
    np.testing.assert_allclose(extrapolated([0.6, 0.3, 0.1], [0.5, 0.3, 0.2], 0.0), [0.6, 0.3, 0.1], **EXACT)


def test_advantage_regression_and_where_it_ends():
    """Gaps -.3, .1, 0, .2: the mean of their squares is .14 / 4."""
    logp, old = np.array([-0.5, -1.2, -0.3, -2.0]), np.array([-0.7, -1.1, -0.6, -2.1])
    assert advantage_regression(logp, old, [0.05, -0.02, 0.03, -0.01], 0.1) == pytest.approx(0.14 / 4, rel=1e-12)
    prior, advantage = np.array([0.2, 0.5, 0.3]), np.array([0.1, -0.2, 0.05])
    ratio = np.log(advantage_policy(prior, advantage, 0.1) / prior) - advantage / 0.1
    np.testing.assert_allclose(ratio, ratio[0], atol=1e-12)


def test_pessimistic_tilt():
    found = pessimistic_tilt([0.4, 0.3, 0.1, 0.2], [1, 0.6, 1.4, 0.2], [0.1, 0.05, 0.9, 0.1], kappa=1.0, alpha=0.5)
    expected = [0.6306285657429894, 0.23487065842426738, 0.07083992004700664, 0.0636608557857366]
    np.testing.assert_allclose(found, expected, **EXACT)


def test_diffusion_dpo():
    found = diffusion_dpo(
        [0.081, 0.120, 0.095], [0.090, 0.118, 0.097], [0.083, 0.119, 0.0955], [0.089, 0.1185, 0.0965], 5000.0
    )
    np.testing.assert_allclose(found, [0.0005529314753607924, 3.7732454643724287, 0.07888973429254946], rtol=1e-10)


def test_rating_distributions():
    """CDF gaps 0, .1, .2, .1... summed; means 2.05 and 2.9; a point mass has no variance."""
    one, other = [0.1, 0.2, 0.4, 0.2, 0.05, 0.05], [0.0, 0.1, 0.3, 0.3, 0.2, 0.1]
    assert wasserstein(one, other) == pytest.approx(0.85, rel=1e-12)
    assert [class_moments(each)[0] for each in (one, other)] == pytest.approx([2.05, 2.9], rel=1e-12)
    assert class_moments([0, 0, 1, 0])[1] == 0.0
    assert class_moments([0.5, 0, 0.5])[1] == pytest.approx(1.0)
