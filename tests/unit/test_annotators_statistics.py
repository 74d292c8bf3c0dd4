"""Statistics of several annotators: hand-made counts, published vectors, recovery of known laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from prefopt.annotators.agreement import (
    agreement_summary,
    item_disagreement,
    krippendorff_alpha,
    pairwise_agreement,
    phi_of_rankings,
    vote_share,
    wilson,
)
from prefopt.annotators.association import auroc, length_covariates, rank_correlations
from prefopt.annotators.calibration import calibration_error, fitted_scale, vote_accuracy, vote_log_loss
from prefopt.annotators.davidson import davidson
from prefopt.annotators.dawid_skene import dawid_skene
from prefopt.annotators.estimates import compare_with_people, reward_estimates
from prefopt.annotators.held_out import Margins, compare_arms
from prefopt.annotators.votes import RankedPrompt
from prefopt.errors import BadInput
from prefopt.mallows import fit_mallows_phi, sample_mallows_phi

COUNTS = np.array([[5, 0, 0], [3, 2, 0], [0, 0, 5], [2, 2, 1], [1, 0, 0]])


# --- agreement ------------------------------------------------------------------------------------------------------


def test_disagreement_of_single_items_by_hand():
    found = item_disagreement(COUNTS)
    h = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    three = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert found["vote_entropy"][:4].tolist() == pytest.approx([0, h, 0, three])
    assert found["preference_entropy"][:4].tolist() == pytest.approx([0, h, math.log(2), math.log(2)])
    assert found["agreement"][:4].tolist() == pytest.approx([1, (3 * 2 + 2 * 1) / 20, 1, (2 + 2) / 20])
    assert found["split"][:4].tolist() == [0, 1, 0, 1]
    assert np.isnan(found["agreement"][4])  # a single vote agrees with nobody
    assert vote_share(COUNTS).tolist() == pytest.approx([1, 0.6, 0.5, 0.5, 1])


def test_wilson_interval_of_eight_in_ten():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(0, 10)[0] == 0.0
    with pytest.raises(BadInput):
        wilson(3, 0)


def test_pairwise_agreement_counts_pairs_of_annotators():
    found = pairwise_agreement(COUNTS)
    assert found["pairs"] == 4 * 10
    assert found["agreement"] == pytest.approx((10 + 4 + 10 + 2) / 40)
    assert found["low"] < found["agreement"] < found["high"]


def test_agreement_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    p = rng.beta(2, 2, size=4000)
    truth = float((p**2 + (1 - p) ** 2).mean())
    inside = 0
    for run in range(60):
        q = rng.choice(p, 120)
        a = rng.binomial(5, q)
        found = pairwise_agreement(np.column_stack([a, 5 - a, 0 * a]), resamples=200, seed=run)
        inside += found["low"] <= truth <= found["high"]
    assert inside >= 52  # 57 expected


def test_krippendorffs_own_example():
    # 4 observers, 12 units, values 1..5, missing votes: nominal alpha 0.743 (Krippendorff 2011, section C)
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    assert all(len(row) == 12 for row in observers)
    counts = [[sum(row[unit] == str(value) for row in observers) for value in range(1, 6)] for unit in range(12)]
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_random_votes_is_about_zero_and_of_equal_ones_unknown():
    votes = np.random.default_rng(1).multinomial(5, [0.5, 0.3, 0.2], size=4000)
    assert krippendorff_alpha(votes) == pytest.approx(0, abs=0.02)
    assert krippendorff_alpha([[5, 0, 0]] * 3) is None


def test_summary_of_a_data_set():
    found = agreement_summary(COUNTS, resamples=50)
    assert found["unanimous"]["share"] == 2 / 4
    assert found["ties"] == pytest.approx(6 / 21)
    assert found["level_items"] == 2
    assert found["pairwise_without_ties"]["pairs"] == 10 + 10 + 6


# --- Mallows --------------------------------------------------------------------------------------------------------


def ranked(orders) -> RankedPrompt:
    ranks = {f"p{n}": tuple(float(r) for r in np.argsort(order)) for n, order in enumerate(orders)}
    names = tuple(f"s{k}" for k in range(len(orders[0])))
    return RankedPrompt("q", names, names, ranks)


@pytest.mark.parametrize("phi", [0.2, 0.6, 0.9])
def test_phi_of_a_prompt_is_the_fit_of_its_rankings(phi):
    orders = sample_mallows_phi(np.random.default_rng(3), 5, phi, 400)
    found, fitted = phi_of_rankings(ranked(orders.tolist())), fit_mallows_phi(orders)
    assert (found["phi"], found["phi_error"]) == (fitted.phi, fitted.phi_error)
    assert abs(found["phi"] - phi) < 3 * found["phi_error"]


def test_ties_are_broken_both_ways():
    # two of three are tied by everyone: phi as of rankings in which half of the annotators put either first
    tied = RankedPrompt("q", ("x", "y", "z"), ("x", "y", "z"), {f"p{n}": (1.0, 1.0, 3.0) for n in range(40)})
    half = fit_mallows_phi([[0, 1, 2]] * 20 + [[1, 0, 2]] * 20)
    found = phi_of_rankings(tied)
    assert found["phi"] == pytest.approx(half.phi, abs=0.03)
    assert found["phi_error"] == pytest.approx(half.phi_error, rel=0.1)  # 40 annotators, not 40 times the copies
    assert phi_of_rankings(ranked([[0, 1, 2]])) is None


# --- Davidson -------------------------------------------------------------------------------------------------------


def test_two_systems_have_a_closed_form():
    # pi_a : pi_b : nu sqrt(pi_a pi_b) = 60 : 20 : 30, so theta_a - theta_b = log 3 and nu = 30 / sqrt(1200)
    fitted = davidson(["x"], ["y"], [[60, 20, 30]])
    assert fitted.systems == ("x", "y")
    assert fitted.strength.tolist() == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    assert fitted.nu == pytest.approx(30 / math.sqrt(1200))
    assert fitted.probabilities(0, 1).tolist() == pytest.approx([60 / 110, 20 / 110, 30 / 110])
    p = np.array([60, 20, 30]) / 110
    assert fitted.log_likelihood == pytest.approx(float(np.array([60, 20, 30]) @ np.log(p)))


def test_without_ties_it_is_bradley_terry_and_turning_pairs_changes_nothing():
    counts = np.array([[30, 10, 0], [25, 15, 0], [20, 12, 0]])
    a, b = ["x", "x", "y"], ["y", "z", "z"]
    fitted = davidson(a, b, counts)
    assert fitted.nu == 0.0
    turned = davidson(b, a, counts[:, [1, 0, 2]])
    assert turned.strength == pytest.approx(fitted.strength)
    from prefopt.evaluation.bradley_terry import bradley_terry

    pd = pytest.importorskip("pandas")
    rows = [
        (p, q, y)
        for p, q, (won, lost, _) in zip(a, b, counts, strict=True)
        for y, n in ((1, won), (0, lost))
        for _ in range(n)
    ]
    other = bradley_terry(pd.DataFrame(rows, columns=["model_a", "model_b", "outcome"]))
    assert fitted.strength == pytest.approx(other.strength, abs=1e-6)
    assert fitted.error == pytest.approx(np.sqrt(np.diag(other.hessian)), rel=1e-5)


def test_davidson_recovers_strengths_and_ties():
    rng = np.random.default_rng(5)
    theta, nu = np.array([0.9, 0.1, -0.3, -0.7]), 0.8
    a, b, counts = [], [], []
    for i in range(4):
        for j in range(i + 1, 4):
            pi = np.exp(theta[[i, j]])
            p = np.array([*pi, nu * np.sqrt(pi.prod())])
            a.append(f"s{i}"), b.append(f"s{j}"), counts.append(rng.multinomial(3000, p / p.sum()))
    fitted = davidson(a, b, counts)
    assert fitted.systems == ("s0", "s1", "s2", "s3")
    assert (np.abs(fitted.strength - theta) < 4 * fitted.error).all()
    assert fitted.nu == pytest.approx(nu, rel=0.05)


def test_davidson_refuses_what_has_no_best_fit():
    with pytest.raises(BadInput, match="never lost"):
        davidson(["x"], ["y"], [[5, 0, 0]])
    with pytest.raises(BadInput, match="no comparison connects"):
        davidson(["x", "u"], ["y", "v"], [[5, 1, 0], [2, 2, 0]])
    with pytest.raises(BadInput, match="compared with itself"):
        davidson(["x"], ["x"], [[5, 1, 0]])


# --- Dawid and Skene ------------------------------------------------------------------------------------------------

CONFUSIONS = np.array(
    [
        [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8]],
        [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.2, 0.2, 0.6]],
        [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]],
        [[0.1, 0.85, 0.05], [0.85, 0.1, 0.05], [0.1, 0.1, 0.8]],  # mixes a and b up
    ]
)
PRIOR = np.array([0.5, 0.3, 0.2])


def simulated(items: int, seed: int = 0, copies: int = 2):
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, items, p=PRIOR)
    confusions = np.concatenate([CONFUSIONS[:3]] * copies + [CONFUSIONS[3:]])
    rows = [(i, j, rng.choice(3, p=confusions[j, truth[i]])) for i in range(items) for j in range(len(confusions))]
    return truth, confusions, *np.array(rows).T


def test_dawid_skene_recovers_known_confusion_matrices():
    truth, confusions, item, person, vote = simulated(3000)
    fitted = dawid_skene(item, person, vote, 3)
    assert np.abs(fitted.confusion - confusions).max() < 0.06
    assert np.abs(fitted.prior - PRIOR).max() < 0.04
    assert fitted.quality == pytest.approx(np.einsum("k,jkk->j", PRIOR, confusions), abs=0.04)
    by_majority = np.array([np.bincount(vote[item == i], minlength=3).argmax() for i in range(len(truth))])
    assert (fitted.posterior.argmax(axis=1) == truth).mean() > (by_majority == truth).mean() + 0.02


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_never_falls(seed):
    _, _, item, person, vote = simulated(60, seed, copies=1)
    steps = np.diff(dawid_skene(item, person, vote, 3).objective)
    assert len(steps) > 2
    assert (steps >= -1e-9).all()


def test_order_of_votes_and_names_of_classes_do_not_matter():
    _, _, item, person, vote = simulated(80, 1)
    fitted = dawid_skene(item, person, vote, 3)
    order = np.random.default_rng(0).permutation(len(item))
    again = dawid_skene(item[order], person[order], (vote[order] + 1) % 3, 3)
    assert again.posterior[:, [1, 2, 0]] == pytest.approx(fitted.posterior, abs=1e-6)


def test_an_annotator_with_one_vote_stays_near_the_prior():
    _, _, item, person, vote = simulated(200, 2)
    newcomer = person.max() + 1
    fitted = dawid_skene([*item, 0], [*person, newcomer], [*vote, int(vote[0])], 3)
    assert 0.3 < fitted.quality[newcomer] < 0.75
    assert fitted.votes[newcomer] == 1
    with pytest.raises(BadInput, match="without a gap"):
        dawid_skene([0, 2], [0, 1], [0, 1], 3)


# --- association ----------------------------------------------------------------------------------------------------


def related(n: int = 400, seed: int = 0):
    rng = np.random.default_rng(seed)
    length = rng.lognormal(4, 0.6, size=(n, 2))
    covariates = length_covariates(*length.T)
    human = covariates[:, 0] + rng.normal(size=n)
    return covariates, human, rng, np.arange(n) // 4


def test_correlations_are_scipys_and_least_squares_on_ranks():
    covariates, human, rng, cluster = related()
    estimate = human + covariates[:, 1] + rng.normal(size=len(human))
    found = rank_correlations({"e": estimate}, human, covariates, cluster, resamples=100)["e"]
    assert found["spearman"]["mean"] == pytest.approx(spearmanr(estimate, human).statistic)
    ranks = rankdata(np.column_stack([estimate, human, covariates]), axis=0)
    design = np.column_stack([np.ones(len(ranks)), ranks[:, 2:]])
    left = ranks[:, :2] - design @ np.linalg.lstsq(design, ranks[:, :2], rcond=None)[0]
    assert found["partial"]["mean"] == pytest.approx(np.corrcoef(left.T)[0, 1])
    assert found["residual"]["mean"] == pytest.approx(np.corrcoef(left[:, 0], ranks[:, 1])[0, 1])


def test_an_estimate_of_length_alone_has_nothing_left_at_equal_length():
    covariates, human, rng, cluster = related(2000)
    found = rank_correlations({"e": covariates[:, 0] + 0.3 * rng.normal(size=2000)}, human, covariates, cluster)["e"]
    assert found["spearman"]["low"] > 0.2
    assert found["partial"]["low"] < 0 < found["partial"]["high"]


def test_clusters_that_repeat_a_prompt_widen_the_interval():
    covariates, human, rng, _ = related(60)
    estimate = human + rng.normal(size=60)
    apart = rank_correlations({"e": estimate}, human, covariates, np.arange(60))["e"]["spearman"]
    ten = [np.repeat(values, 10, axis=0) for values in (estimate, human, covariates, np.arange(60))]
    together = rank_correlations({"e": ten[0]}, ten[1], ten[2], ten[3])["e"]["spearman"]
    wrongly = rank_correlations({"e": ten[0]}, ten[1], ten[2], np.arange(600))["e"]["spearman"]
    width = {
        name: one["high"] - one["low"] for name, one in (("apart", apart), ("together", together), ("wrongly", wrongly))
    }
    assert width["together"] == pytest.approx(width["apart"], rel=0.05)
    assert width["wrongly"] < 0.5 * width["together"]


def test_auroc_is_sklearns_with_an_interval_around_it():
    rng = np.random.default_rng(2)
    split = rng.random(300) < 0.3
    estimate = np.round(split + rng.normal(size=300), 1)  # with ties
    found = auroc(estimate, split, np.arange(300) // 3)
    assert found["mean"] == pytest.approx(roc_auc_score(split, estimate))
    assert found["low"] < found["mean"] < found["high"]
    assert auroc(estimate, np.ones(300), np.arange(300))["mean"] is None
    assert auroc(np.ones(300), split, np.arange(300))["mean"] == 0.5


def test_a_side_that_does_not_vary_has_no_correlation():
    covariates, human, _, cluster = related(40)
    found = rank_correlations({"e": np.ones(40)}, human, covariates, cluster, resamples=20)["e"]
    assert [one["mean"] for one in found.values()] == [None] * 3


def test_estimates_beside_generated_people():
    rng = np.random.default_rng(7)
    p = rng.beta(2, 2, 300)
    chosen = rng.binomial(5, p)
    counts = np.column_stack([chosen, 5 - chosen, 0 * chosen])
    truth = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    lengths = rng.integers(5, 50, size=(2, 300))
    noise = rng.normal(size=300)
    found = compare_with_people({"token_entropy": truth, "reward_votes": noise}, counts, *lengths, np.arange(300) // 3)
    assert found["estimates"]["token_entropy"]["vote_entropy"]["partial"]["low"] > 0.2
    assert found["estimates"]["token_entropy"]["auroc"]["low"] > 0.5
    assert found["estimates"]["reward_votes"]["vote_entropy"]["spearman"]["low"] < 0
    assert set(found["estimates"]["length"]["vote_entropy"]) == {"spearman"}  # a control is not controlled for itself
    single = counts.copy()
    single[:, 1:] = 0
    with pytest.raises(BadInput, match="at least three"):
        compare_with_people({}, np.minimum(single, 1), *lengths, np.arange(300))


def test_rewards_of_different_scales_count_alike():
    margins = np.random.default_rng(0).normal(size=(50, 3))
    found = reward_estimates(margins)
    scaled = reward_estimates(margins * [1.0, 100.0, 0.01])
    assert scaled["reward_variance"] == pytest.approx(found["reward_variance"])
    assert scaled["reward_votes"] == pytest.approx(found["reward_votes"])
    with pytest.raises(BadInput, match="member 1"):
        reward_estimates(np.column_stack([margins[:, 0], np.ones(50)]))


# --- held-out votes -------------------------------------------------------------------------------------------------


def test_log_loss_of_votes_by_hand():
    assert vote_log_loss([0.0], [0.8]).tolist() == pytest.approx([math.log(2)])
    logit = math.log(0.8 / 0.2)
    assert vote_log_loss([logit], [0.8])[0] == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    around = vote_log_loss([logit - 0.1, logit, logit + 0.1], [0.8] * 3)
    assert around.argmin() == 1
    assert vote_accuracy([1.0, -1.0, 0.0, 2.0], [0.8, 0.8, 0.8, 0.5])[:3].tolist() == [1, 0, 0.5]


def test_calibration_does_not_ask_which_response_comes_first():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=5000)
    share = rng.binomial(5, 1 / (1 + np.exp(-logit))) / 5
    assert calibration_error(logit, share) < 0.02
    assert calibration_error(3 * logit, share) > 0.1
    turned = np.where(rng.random(5000) < 0.5, 1, -1)
    both = turned * logit, np.where(turned > 0, share, 1 - share)
    assert calibration_error(*both) == pytest.approx(calibration_error(logit, share), abs=1e-9)
    assert fitted_scale(3 * logit, share) == pytest.approx(1 / 3, rel=0.06)


def test_arms_that_differ_in_scale_alone_are_equal_after_scaling():
    rng = np.random.default_rng(4)
    n, seeds = 800, [0, 1, 2]
    prompt, split = np.arange(n) % 20, np.where(np.arange(n) % 20 < 8, "validation", "test")
    truth = rng.normal(size=n)
    share = rng.binomial(5, 1 / (1 + np.exp(-truth))) / 5

    def run(scale, noise):
        return {
            (beta, seed): Margins(size * scale * (truth + noise * rng.normal(size=n)), share, prompt, split)
            for beta, size in enumerate((0.1, 1.0))
            for seed in seeds
        }

    runs = {"good": run(1.0, 0.3), "loud": run(6.0, 0.3), "noisy": run(1.0, 2.0)}
    found = compare_arms(runs, [0.1, 1.0], seeds, [("good", "noisy"), ("good", "loud")])
    assert found["arms"]["good"]["beta"] == 1.0
    assert found["arms"]["loud"]["beta"] == 0.1  # the scale that fits the validation votes
    better = found["differences"]["good.over.noisy.scaled_log_loss"]
    assert better["low"] > 0
    same = found["differences"]["good.over.loud.scaled_log_loss"]
    assert abs(same["mean"]) < 0.01
    assert found["bounds"]["log_loss_of_one_half"] == pytest.approx(math.log(2))
    assert found["bounds"]["log_loss_of_the_votes_themselves"] < found["arms"]["good"]["metrics"]["log_loss"]["mean"]


def test_alpha_of_a_summary_does_not_depend_on_which_response_is_a():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(5, [0.45, 0.35, 0.2], size=300)
    majority = np.where((counts[:, 0] >= counts[:, 1])[:, None], counts, counts[:, [1, 0, 2]])
    found = [agreement_summary(table, resamples=10)["alpha"] for table in (counts, majority)]
    assert found[0] == pytest.approx(found[1])
    assert krippendorff_alpha(majority) < found[0] - 0.05
