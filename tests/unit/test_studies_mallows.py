"""MallowsPO's exact items: each written-out step against the losses, the papers' vectors or a hand derivation."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from marks import long
from prefopt.batch import PairBatch
from prefopt.errors import BadInput
from prefopt.evaluation import exact
from prefopt.losses import LOSSES
from prefopt.mallows import bandit, context, mean_distance, pairwise_marginal, top_item_law
from prefopt.planning.config import load_item
from prefopt.studies import get_study, mallows_bandit
from prefopt.studies.mallows_bandit import _best_reward, _reward_at
from prefopt.studies.mallows_context import dispersion_weights
from prefopt.studies.mallows_estimator import estimate_curve, sampled_estimate
from prefopt.studies.mallows_links import link

METHODS = {
    "dpo": (bandit.dpo_slope, {}),
    "mallows_phi": (bandit.phi_slope(0.05, 0.05), {"smoothing": 0.05}),
}


# --- the five-armed bandit


def test_the_arms():
    # 20/11 and 30/3 and 18/15 at even odds, 15/10 and 1/4 at 99 to 1
    expected = [(20 + 11) / 2, (30 + 3) / 2, (18 + 15) / 2, 15 - 0.01 * 5, 1 + 0.01 * 3]
    np.testing.assert_allclose(bandit.MEAN_REWARD, expected, rtol=1e-14)
    np.testing.assert_allclose(bandit.MEAN_REWARD, [15.5, 16.5, 16.5, 14.95, 1.03], rtol=1e-14)
    uniform = np.full(5, 0.2)
    assert bandit.expected_reward(uniform) == pytest.approx(sum(expected) / 5, rel=1e-14)
    assert bandit.kl_from_uniform(uniform) == pytest.approx(0, abs=1e-15)
    # Two arms left of five: log 5 - log 2; one arm: log 5.
    assert bandit.kl_from_uniform([0.5, 0.5, 0, 0, 0]) == pytest.approx(math.log(5 / 2), rel=1e-14)
    assert bandit.kl_from_uniform([0, 0, 0, 1, 0]) == pytest.approx(math.log(5), rel=1e-14)


def test_the_counts_are_those_of_the_sixteen_pairs():
    assert len(bandit.PAIRS) == bandit.LOWER_CHOSEN.sum() + bandit.HIGHER_CHOSEN.sum() == 16
    for pair, low, high in zip(bandit.COMPARED, bandit.LOWER_CHOSEN, bandit.HIGHER_CHOSEN, strict=True):
        assert (low, high) == (bandit.PAIRS.count(pair), bandit.PAIRS.count(pair[::-1]))


def loss_and_gradient(name: str, scores: np.ndarray, beta: float, **params) -> np.ndarray:
    """d/d scores of the mean over the 16 pairs of a registered loss, by autograd."""
    free = torch.tensor(scores, requires_grad=True)
    logp = torch.log_softmax(free, 0)
    chosen, rejected = (torch.tensor([pair[side] for pair in bandit.PAIRS]) for side in (0, 1))
    flat, count = torch.full((16,), -math.log(5), dtype=torch.float64), torch.ones(16, dtype=torch.long)
    batch = PairBatch(
        pair_id=torch.arange(16), chosen_logp=logp[chosen], rejected_logp=logp[rejected], chosen_tokens=count,
        rejected_tokens=count, ref_chosen_logp=flat, ref_rejected_logp=flat,
        neg_log_dispersion=torch.full_like(flat, -math.log(0.05)),
    )  # fmt: skip
    return torch.autograd.grad(LOSSES[name].fn(batch, beta=beta, **params).mean(), free)[0].numpy()


@pytest.mark.parametrize("name", METHODS)
# beta * spread: all pairs inside the cubic, on both sides of its ends, far outside it
@pytest.mark.parametrize(("beta", "spread"), [(0.05, 0.2), (0.1, 1.0), (0.5, 0.3), (1.0, 6.0)])
def test_slopes_are_the_gradients_of_the_losses(name, beta, spread):
    slope, params = METHODS[name]
    scores = np.random.default_rng(1).normal(size=(20, 5)) * spread
    mine = beta * slope(beta * scores @ bandit.DIFFERENCES) @ bandit.DIFFERENCES.T / len(bandit.PAIRS)
    theirs = [loss_and_gradient(name, row, beta, **params) for row in scores]
    np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-15)


def test_the_first_step_by_hand():
    # Wins minus defeats of the arms: 5-1, 6-2, 5-1, 2-4, 0-9... counted from the pairs; at 0 each pair of DPO pulls
    # with beta/2, of the phi link with beta * 2 a1, a1 = 6.947840165296158 for phi = width = 0.05.
    wins = np.array([sum((chosen == arm) - (rejected == arm) for chosen, rejected in bandit.PAIRS) for arm in range(5)])
    assert wins.tolist() == [4, 3, 3, -1, -9]
    for name, pull in (("dpo", 0.5), ("mallows_phi", 2 * 6.947840165296158)):
        paths = bandit.descend(METHODS[name][0], [0.1, 0.3], steps=1, record_every=1)
        for run, beta in enumerate((0.1, 0.3)):
            np.testing.assert_allclose(paths.scores[1, run], 5e-3 * beta * pull * wins / 16, rtol=1e-12)


TRAJECTORIES = {
    ("dpo", 0.1): {
        1: [0.2000124998, 0.2000093747, 0.2000093747, 0.1999968745, 0.1999718764],
        100: [0.2012478223, 0.2009335211, 0.2009335575, 0.1996822180, 0.1972028812],
        1000: [0.2122746778, 0.2089735560, 0.2089773542, 0.1963733398, 0.1734010722],
    },
    ("dpo", 0.05): {1000: [0.2061996304, 0.2045937273, 0.2045941943, 0.1983067418, 0.1863057063]},
    ("mallows_phi", 0.1): {
        1: [0.2003472560, 0.2002602761, 0.2002602761, 0.1999127339, 0.1992194579],
        100: [0.2257133463, 0.2150295206, 0.2154160600, 0.1914149440, 0.1524261291],
        1000: [0.2800337199, 0.2192603042, 0.2196278865, 0.1727886433, 0.1082894460],
        10_000: [0.3189694084, 0.2882646518, 0.2202548835, 0.1444546000, 0.0280564562],
    },
    ("mallows_phi", 0.05): {1000: [0.2893608928, 0.2299933860, 0.2314292036, 0.1626637675, 0.0865527501]},
}


@pytest.mark.parametrize(("name", "beta"), TRAJECTORIES)
def test_trajectories(name, beta):
    expected = TRAJECTORIES[name, beta]
    # A second run beside it must not disturb the first.
    paths = bandit.descend(METHODS[name][0], [beta, 0.7], steps=max(expected), record_every=1)
    for step, policy in expected.items():
        assert paths.steps[step] == step
        np.testing.assert_allclose(paths.policies[step, 0], policy, rtol=0, atol=1e-8)


END_POINTS = {
    ("dpo", 500_000): {0.1: [0.9953167729, 0.0018224557, 0.0028600967, 0.0000006746, 0]},
    ("dpo", 100_000): {0.05: [0.5241191128, 0.2284925369, 0.2329927256, 0.0143409667, 0.0000546580]},
    ("mallows_phi", 500_000): {
        0.1: [0.3427433351, 0.3341075028, 0.2080005754, 0.1151485700, 0.0000000166],
        0.05: [0.4206648776, 0.3997026220, 0.1553360805, 0.0242964196, 0],
    },
    ("mallows_phi", 50_000): {0.05: [0.4059211694, 0.3782688740, 0.1562437730, 0.0581499412, 0.0014162424]},
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(name, steps, marks=long("ten seconds of processor time") if steps > 100_000 else ())
        for name, steps in END_POINTS
    ],
)
def test_end_points(name, steps):
    expected = END_POINTS[name, steps]
    paths = bandit.descend(METHODS[name][0], [*expected], steps=steps, record_every=steps)
    for found, policy in zip(paths.policies[-1], expected.values(), strict=True):
        np.testing.assert_allclose(found, policy, rtol=0, atol=1e-4)


def test_the_final_policy_averages_the_last_updates():
    paths = bandit.descend(METHODS["mallows_phi"][0], [0.1], steps=50, record_every=1, tail=30)
    np.testing.assert_allclose(paths.final, paths.policies[21:].mean(axis=0), rtol=1e-13)


def test_converged_dpo_is_bradley_terry():
    policies = bandit.dpo_limit([1.0, 0.3])
    np.testing.assert_allclose(policies[0, :4], [0.5085174, 0.2045867, 0.2045867, 0.0823093], atol=5e-8)
    assert policies[:, 4].tolist() == [0, 0]
    np.testing.assert_allclose(bandit.expected_reward(policies), [15.863903, 15.586372], atol=5e-7)
    np.testing.assert_allclose(bandit.kl_from_uniform(policies), [0.410740, 1.237107], atol=5e-7)
    # Scores .9105, 0, 0, -.9105 over beta; descent gets there where beta is large.
    np.testing.assert_allclose(
        np.log(policies[1, [0, 3]] / policies[1, 1]), np.array([0.9105, -0.9105]) / 0.3, atol=2e-4
    )
    long = bandit.descend(bandit.dpo_slope, [4.0], steps=40_000, record_every=40_000).policies[-1, 0]
    np.testing.assert_allclose(long[:4] / long[:4].sum(), bandit.dpo_limit([4.0])[0, :4], atol=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_flow_is_descent_in_small_steps(name):
    # The difference is of first order in the learning rate: ten times smaller with steps ten times smaller.
    flowing = bandit.flow(METHODS[name][0], 0.05, steps=2000)
    coarse, fine = (
        bandit.descend(METHODS[name][0], [0.05], steps=2000 * k, learning_rate=5e-3 / k, record_every=2000 * k)
        for k in (1, 10)
    )
    gap, smaller = (np.abs(paths.policies[-1, 0] - flowing).max() for paths in (coarse, fine))
    assert gap < 5e-5
    assert smaller == pytest.approx(gap / 10, rel=0.1, abs=1e-8)


def test_no_policy_earns_more_within_a_kl():
    rng = np.random.default_rng(2)
    policies = rng.dirichlet(np.full(5, 0.7), size=4000)
    kl, reward = bandit.kl_from_uniform(policies), bandit.expected_reward(policies)
    for limit in (0.05, 0.2, 0.6):
        best = _best_reward(limit)
        assert reward[kl <= limit].max() < best
        tilted = bandit.softmax(np.linspace(0, 3, 30_001)[:, None] * bandit.MEAN_REWARD)
        assert best == pytest.approx(
            bandit.expected_reward(tilted[bandit.kl_from_uniform(tilted) <= limit]).max(), abs=2e-3
        )
    # Reward 15.92 takes 0.22 nats at least, so that 0.076 nats cannot pay for it.
    assert _best_reward(0.2) < 15.92 < _best_reward(0.24)


def test_reward_where_a_run_first_passes_a_kl():
    paths = bandit.descend(bandit.dpo_slope, [0.1, 5.0], steps=3000)
    kl = bandit.kl_from_uniform(paths.policies)[:, 0]
    reward = bandit.expected_reward(paths.policies)[:, 0]
    middle = (kl[7] + kl[8]) / 2
    assert _reward_at(paths, middle)[0] == pytest.approx((reward[7] + reward[8]) / 2, rel=1e-12)
    assert np.isnan(_reward_at(paths, 1.6)).all()


def test_frontier_study_in_few_steps():
    params = {"dpo_betas": [0.3, 0.05], "phi_betas": [0.05, 0.2], "dpo_more": [1.0], "phi_more": [0.1], "steps": 400,
              "compare_at": [1e-5, 1e-3, 3.0], "long_steps": 1000}  # fmt: skip
    result = get_study("mallows_bandit_frontier").run(params)
    table = result.tables["end_points"].set_index(["method", "beta"])
    assert result.values["phi_0.2_kl"] == table.loc[("phi", 0.2), "kl"]
    assert table["published"].tolist() == [True, True, False] * 2
    # The end-point frontier is a line between neighbours in KL, whatever the order of the betas.
    low, high = (table.loc[("dpo", beta), ["kl", "reward"]] for beta in (0.05, 0.3))
    share = (1e-3 - low["kl"]) / (high["kl"] - low["kl"])
    on_line = low["reward"] + share * (high["reward"] - low["reward"])
    assert result.values["dpo_at_0.001"] == pytest.approx(on_line, rel=1e-12)
    # No run passes 3 nats, which are more than log 5.
    assert "dpo_path_at_1e-05" in result.values
    assert "dpo_path_at_3" not in result.values
    with pytest.raises(BadInput, match=r"path_beta 0\.05 must be one of the betas of both methods"):
        get_study("mallows_bandit_frontier").run(params | {"dpo_betas": [0.3]})


def test_average_study_is_the_mean_over_runs():
    params = {"betas": [0.05, 1.0], "steps": 500}
    result = get_study("mallows_bandit_average").run(params)
    table = result.tables["curves"]
    assert result.values["phi_end_printed_kl"] == pytest.approx(result.values["phi_end_kl"] / 4, rel=1e-13)
    paths = bandit.descend(METHODS["mallows_phi"][0], [0.05, 1.0], steps=500)
    last = table[table["method"] == "phi"].iloc[-1]
    assert last["reward"] == pytest.approx(bandit.expected_reward(paths.policies[-1]).mean(), rel=1e-13)
    assert last["kl"] == pytest.approx(bandit.kl_from_uniform(paths.policies[-1]).mean(), rel=1e-13)
    assert last["printed_kl"] == pytest.approx(last["kl"] / 4, rel=1e-13)


# --- links


def test_links_go_through_the_losses():
    s = np.array([-3.0, -0.2, 0.7, 4.0])
    np.testing.assert_allclose(link("dpo", s), 1 / (1 + np.exp(-s)), rtol=1e-14)
    np.testing.assert_allclose(link("mallows_theta", s, weight=2.5), 1 / (1 + np.exp(-2.5 * s)), rtol=1e-14)
    lam = math.log(2)
    np.testing.assert_allclose(
        link("mallows_phi", np.array([1.0, 4.0]), lam=lam), pairwise_marginal([1, 4], 0.5), rtol=1e-12
    )


# --- the estimator


def test_noiseless_estimate():
    # n = 2: H of (1, phi) / (1 + phi); phi* scales it.
    phi = 0.3
    law = np.array([1, phi]) / (1 + phi)
    expected = -2.0 * math.log(-(law * np.log(law)).sum() / math.log(2))
    assert estimate_curve(2, 2.0, np.array([-math.log(phi)])) == pytest.approx(expected, rel=1e-13)
    curve = estimate_curve(5, 1.39, np.array([0.5, 1, 2, 3, 4, 5]))
    np.testing.assert_allclose(curve, [0.1995, 0.6615, 1.7471, 2.8424, 3.9612, 5.1123], atol=1e-4)


@pytest.mark.parametrize("lam", [1.5, 4.0])
def test_sampled_estimate_follows_the_closed_form(lam):
    rng = np.random.default_rng(7)
    drawn = [sampled_estimate(rng, 5, 1.39, lam, 2000) for _ in range(300)]
    closed_form = estimate_curve(5, 1.39, np.array([lam]))[0]
    assert np.mean(drawn) == pytest.approx(closed_form, abs=4 * np.std(drawn, ddof=1) / math.sqrt(300))
    # The mean of two entropies, top item's and bottom item's, spreads less than one of them: by sqrt 2, were the two
    # independent (the spread of 300 draws is known to 4 %).
    law = top_item_law(5, math.exp(-lam))
    entropy = -(law * np.log(law)).sum()
    single = 1.39 * math.sqrt((law @ np.log(law) ** 2 - entropy**2) / 2000) / entropy
    assert 0.55 * single < np.std(drawn, ddof=1) < 0.85 * single


def test_sampled_estimate_is_corrected_for_few_rankings():
    # 100 rankings of 5 nearly even items lose (5 - 1) / (2 * 100) nats of entropy, ten errors of this mean.
    rng = np.random.default_rng(8)
    drawn = [sampled_estimate(rng, 5, 1.39, 0.5, 100) for _ in range(1000)]
    error = np.std(drawn, ddof=1) / math.sqrt(1000)
    assert 10 * error < 1.39 * 0.02 / 1.4
    assert np.mean(drawn) == pytest.approx(estimate_curve(5, 1.39, np.array([0.5]))[0], abs=4 * error)


# --- the contextual bandit


def world(seed: int = 0, size: int = 4000):
    rng = np.random.default_rng(seed)
    return rng, context.draw_contexts(rng, rng.standard_normal((6, 6)), (0.2, 0.85), size)


def test_raters_disagree_by_the_dispersion_of_the_context():
    rng, contexts = world(size=20_000)
    place = np.argsort(contexts.rated(rng), axis=1)
    in_order = np.take_along_axis(place, contexts.order, axis=1)  # places of the centrally 1st, 2nd, ... item
    first, second = np.triu_indices(6, 1)
    discordant = (in_order[:, first] > in_order[:, second]).sum(axis=1)
    for phi in (0.2, 0.85):
        group = discordant[contexts.phi == phi]
        assert 0.48 < len(group) / 20_000 < 0.52
        assert group.mean() == pytest.approx(mean_distance(6, phi), abs=4 * group.std() / math.sqrt(len(group)))


def test_rank_is_the_order_of_the_scores():
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((6, 6))
    contexts = context.draw_contexts(rng, scores, (0.2, 0.85), 50)
    by_score = contexts.features[:, :6] @ scores
    for row in range(50):
        assert (np.sort(by_score[row])[::-1] == by_score[row][contexts.order[row]]).all()
        assert contexts.rank[row][by_score[row].argmax()] == 1
    # z is there exactly where the raters agree less
    assert ((contexts.features[:, 6:] == contexts.features[:, :6]).all(axis=1) == (contexts.phi == 0.85)).all()


def test_pairs_follow_the_pairwise_law():
    rng, contexts = world(size=20_000)
    chosen, rejected = context.draw_pairs(rng, contexts)
    assert (chosen != rejected).all()
    rows = np.arange(len(chosen))
    distance = contexts.rank[rows, rejected] - contexts.rank[rows, chosen]
    table = pd.DataFrame({"phi": contexts.phi, "distance": np.abs(distance), "centre": distance > 0})
    for (phi, steps), group in table.groupby(["phi", "distance"]):
        expected = float(pairwise_marginal(steps, phi))
        spread = math.sqrt(expected * (1 - expected) / len(group))
        assert group["centre"].mean() == pytest.approx(expected, abs=4 * spread + 1e-3)


def test_the_reference_is_the_likelihoods_maximum():
    rng, contexts = world(size=800)
    items = contexts.rated(rng)[:, 0]
    weights = context.fit_reference(contexts.features, items, 6, ridge=0.01)

    def objective(at):
        free = torch.tensor(at, requires_grad=True)
        logp = torch.log_softmax(torch.tensor(contexts.features) @ free, 1)
        value = -logp[torch.arange(800), torch.tensor(items)].mean() + 0.01 * (free**2).sum()
        return torch.autograd.grad(value, free)[0].abs().max().item()

    assert objective(weights) < 1e-5
    assert objective(weights + 0.1) > 1e-3


def test_weights_of_the_arms():
    rng, contexts = world(size=3000)
    reference = context.fit_reference(contexts.features, contexts.rated(rng)[:, 0], 6)
    weights = dispersion_weights(contexts, reference, seed=3)
    assert (weights["dpo"] == 1).all()
    for arm in weights:
        assert weights[arm].mean() == pytest.approx(1, rel=1e-12)
        assert (weights[arm] > 0).all()
    # c = -log phi up to scale: log .2 / log .85
    ratio = weights["oracle"].max() / weights["oracle"].min()
    assert ratio == pytest.approx(math.log(0.2) / math.log(0.85), rel=1e-12)
    assert (weights["oracle"][contexts.phi == 0.2] > 1).all()
    assert np.corrcoef(weights["oracle"], weights["estimated"])[0, 1] > 0.5
    assert abs(np.corrcoef(weights["oracle"], weights["oracle_shuffled"])[0, 1]) < 0.06
    assert sorted(weights["oracle_shuffled"]) == sorted(weights["oracle"])
    assert np.ptp(weights["oracle"] * weights["oracle_inverse"]) < 1e-12


@pytest.mark.parametrize("beta", [0.1, 0.4])
def test_the_first_step_of_training_by_hand(beta):
    rng, contexts = world(size=200)
    _, test = world(seed=5, size=100)
    reference, pairs = rng.normal(size=(12, 6)) * 0.3, context.draw_pairs(rng, contexts)
    weight = rng.uniform(0.2, 2, size=200)
    path = context.train(contexts, pairs, reference, test, loss="mallows_theta", beta=beta, weight=weight, rate=0.3,
                         until_kl=10.0, max_steps=1)  # fmt: skip
    # At the reference every margin is 0: d loss / d margin = -c beta / 2, and the rate is divided by beta.
    one_hot = np.eye(6)
    pull = contexts.features.T @ (weight[:, None] / 2 * (one_hot[pairs[0]] - one_hot[pairs[1]])) / 200
    before, after = (context.log_policy(test.features, w) for w in (reference, reference + 0.3 * pull))
    share = np.exp(after)
    np.testing.assert_allclose(path.kl, [0, (share * (after - before)).sum(axis=1).mean()], atol=1e-14)
    expected = [-(np.exp(logp) * test.rank).sum(axis=1).mean() for logp in (before, after)]
    np.testing.assert_allclose(path.reward, expected, rtol=1e-12)


def test_reward_at_a_kl():
    # sqrt(KL) 0, .1, .2, .3 with reward 0, 1, 2, 1
    path = context.Path(np.array([0, 0.01, 0.04, 0.09]), np.array([0.0, 1.0, 2.0, 1.0]))
    assert path.reward_at(0.0225) == pytest.approx(1.5)
    assert path.reward_at(0.0625) == pytest.approx(1.5)
    assert path.reward_at(0.04) == pytest.approx(2.0)
    assert math.isnan(path.reward_at(0.1))
    # Coming back to a KL does not count: the first passage does.
    loop = context.Path(np.array([0, 0.09, 0.01, 0.04, 0.16]), np.array([0.0, 3.0, 9.0, 9.0, 9.0]))
    assert loop.reward_at(0.0225) == pytest.approx(1.5)


def test_context_study_compares_the_same_seed():
    params = {"seeds": [0, 1], "betas": [0.1, 0.03], "compare_at": [0.005, 5.0], "phis": [0.2, 0.85],
              "train_contexts": 200, "test_contexts": 200, "max_steps": 40, "rate": 1.0}  # fmt: skip
    result = get_study("mallows_context").run(params)
    rewards = result.tables["rewards"].set_index(["arm", "beta", "kl", "seed"])["reward"]
    gains = [rewards["oracle", 0.1, 0.005, seed] - rewards["dpo", 0.1, 0.005, seed] for seed in (0, 1)]
    assert result.values["oracle_at_0.005"] == pytest.approx(np.mean(gains), rel=1e-12)
    # t quantile of one degree of freedom is 12.706
    reach = 12.706204736 * np.std(gains, ddof=1) / math.sqrt(2)
    assert result.values["oracle_at_0.005_low"] == pytest.approx(np.mean(gains) - reach, rel=1e-9)
    best = {
        arm: max(np.mean([rewards[arm, b, 0.005, s] for s in (0, 1)]) for b in (0.1, 0.03)) for arm in ("oracle", "dpo")
    }
    assert result.values["oracle_retuned_at_0.005"] == pytest.approx(best["oracle"] - best["dpo"], rel=1e-9)
    # Nothing gets 5 nats away, so there is nothing to compare there.
    assert not any(name.endswith("_at_5") for name in result.values)
    with pytest.raises(BadInput, match="not all runs reach 5 nats in 40 steps"):
        get_study("mallows_context").run(params | {"compare_at": [5.0]})


# --- the declared items

BANDIT_ITEMS = ("fig8a", "fig8b", "fig9")


def failed_claims(root, name: str) -> list[str]:
    item = load_item(root / "config" / "experiments" / "mallowspo" / f"{name}.yaml")
    result = get_study(item.study.name).run(item.study.params)
    rows = [exact.judge(row.model_dump(), result.values) for row in item.expect]
    return [row["quantity"] for row in rows if row["verdict"] != exact.REPRODUCED]


@pytest.mark.parametrize("name", ["fig2", "fig3", "fig4_6", "laws"])
def test_quick_items_are_reproduced(root, name):
    assert failed_claims(root, name) == []


@cache
def descended(root, method: str, steps: int, phi: float, width: float) -> bandit.Paths:
    """The runs of every beta of the bandit's items side by side, which costs what one of them does."""
    betas = set()
    for name in BANDIT_ITEMS:
        params = load_item(root / "config" / "experiments" / "mallowspo" / f"{name}.yaml").study.params
        betas |= {beta for key in ("betas", f"{method}_betas", f"{method}_more") for beta in params.get(key, [])}
    return bandit.descend(
        bandit.dpo_slope if method == "dpo" else bandit.phi_slope(phi, width), sorted(betas), steps=steps
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BANDIT_ITEMS)
def test_bandit_items_are_reproduced(root, monkeypatch, name):
    def paths(method, betas, *settings):
        every = descended(root, method, *settings)
        mine = [every.betas.tolist().index(beta) for beta in betas]
        return bandit.Paths(every.betas[mine], every.steps, every.scores[:, mine], every.final[mine])

    monkeypatch.setattr(mallows_bandit, "_paths", paths)
    assert failed_claims(root, name) == []


def test_in_every_seed_of_the_contextual_bandit_the_right_weights_beat_dpo_and_others_do_not():
    """Two of the item's eight seeds, at its first beta."""
    kls = [0.02, 0.1, 0.4]
    params = {"seeds": [0, 1], "betas": [0.1], "compare_at": kls, "phis": [0.2, 0.85], "test_contexts": 1000}
    rewards = (
        get_study("mallows_context")
        .run(params)
        .tables["rewards"]
        .set_index(["seed", "kl", "arm"])["reward"]
        .sort_index()
    )
    for seed in (0, 1):
        for kl in kls:
            at = rewards[seed, kl]
            assert at["oracle"] > at["dpo"] > at["oracle_shuffled"], (seed, kl)
            assert not at["oracle_inverse"] >= at["dpo"], (seed, kl)  # not there where its run does not get that far
            assert at["estimated"] > at["estimated_shuffled"], (seed, kl)
        assert rewards[seed, 0.4, "estimated"] > rewards[seed, 0.4, "dpo"]


@long("a minute of processor time")
@pytest.mark.slow
def test_contextual_bandit_is_undecided_only_close_to_the_reference(root):
    # At 0.02 nats the gain of the estimate is .005 +- .005: on the edge, over DPO at its own or at its best beta.
    assert set(failed_claims(root, "e4_context")) <= {"estimated_at_0.02", "estimated_over_tuned_dpo_at_0.02"}
