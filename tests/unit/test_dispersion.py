"""The dispersion estimator against its vectors, from logits to weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from artifact_builds import run_stage, save_table
from prefopt.dispersion import (
    apply_control,
    check_weights,
    dispersion_weight,
    neg_log_dispersion,
    normalised_entropy,
    phi_star,
    sequence_entropy,
    vote_entropy,
)
from prefopt.errors import BadInput, FailedCheck
from prefopt.specs import DispersionSpec

VOCAB = 4
# Logits of each response position, chosen and rejected.
PAIRS = {
    "A": ([[2, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], [[3, 0, 0, 0], [0, 1, 2, 3]]),
    "B": ([[6, 0, 0, 0], [5, 0, 0, 0]], [[4, 0, 0, 0]]),
    "C": ([[0.5, 0, 0, 0]], [[0, 0, 0, 0], [0.2, 0.1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
}


def token_entropies(logits) -> np.ndarray:
    logp = log_softmax(np.array(logits, dtype=float), axis=1)
    return -(np.exp(logp) * logp).sum(axis=1)


def estimate(names="ABC", **options) -> np.ndarray:
    sides = [[token_entropies(PAIRS[name][side]) for name in names] for side in (0, 1)]
    means = [[entropies.mean() for entropies in side] for side in sides]
    lengths = [[len(entropies) for entropies in side] for side in sides]
    return normalised_entropy(*means, *lengths, VOCAB, **options)


def test_token_entropies_of_the_fixture():
    chosen, rejected = (token_entropies(side) for side in PAIRS["A"])
    np.testing.assert_allclose(chosen, [0.9182837654579437, 1.2753502894481634, math.log(4)], rtol=1e-13)
    np.testing.assert_allclose(rejected, [0.529060794535233, 0.9475369639754254], rtol=1e-13)


def test_per_response_mean_vectors():
    np.testing.assert_allclose(estimate(), [0.6966804473270681, 0.12523257199234306, 0.9792931075556498], rtol=1e-12)
    np.testing.assert_allclose(-np.log(estimate()), [0.36142844203477764, 2.07758269446855, 0.020924286413874203])


def test_sum_over_max_len_vector():
    entropy = estimate("A", norm="sum_over_max_len")
    np.testing.assert_allclose(entropy, [0.6079187696774396], rtol=1e-12)
    assert -math.log(entropy[0]) == pytest.approx(0.4977140084457907, rel=1e-12)
    # Without dividing by the length the sum is 1.82 > 1, and its -log negative: an inverted preference.
    assert 3 * entropy[0] == pytest.approx(1.8237563090323188, rel=1e-12)


def test_calibration_vectors():
    star = phi_star(estimate())
    assert star == pytest.approx(1.2195442091899888, rel=1e-12)
    weight = dispersion_weight(estimate(), star)
    np.testing.assert_allclose(weight, [0.44077796352007265, 2.5337039441524536, 0.02551809232747304], rtol=1e-11)
    assert weight.mean() == pytest.approx(1.0, rel=1e-14)


def test_sure_prompts_weigh_more():
    weight = dispersion_weight([0.1, 0.5, 0.9], phi_star([0.1, 0.5, 0.9]))
    assert (np.diff(weight) < 0).all()
    assert (weight > 0).all()


@pytest.mark.parametrize("norm", ["per_response_mean", "sum_over_max_len"])
def test_entropy_is_clamped_so_that_weights_stay_positive_and_finite(norm):
    # A model that is entirely sure, and one that is entirely unsure with float32 noise above log V.
    entropy = normalised_entropy([0.0, np.log(4) + 1e-7], [0.0, np.log(4) + 1e-7], [3, 3], [3, 3], VOCAB, norm=norm)
    np.testing.assert_allclose(entropy, [1e-6, 1 - 1e-6], rtol=1e-12)
    weight = dispersion_weight(entropy, 1.0)
    assert np.isfinite(weight).all()
    assert (weight > 0).all()


def test_norms_agree_at_equal_lengths():
    arguments = [0.3, 0.9], [0.5, 0.2], [4, 6], [4, 6], 10
    np.testing.assert_allclose(
        normalised_entropy(*arguments), normalised_entropy(*arguments, norm="sum_over_max_len"), rtol=1e-14
    )


def test_mappings_to_lambda():
    np.testing.assert_array_equal(neg_log_dispersion([0.5, 2.0]), [0.5, 2.0])
    np.testing.assert_array_equal(neg_log_dispersion([0.5, 2.0], mapping="half"), [0.25, 1.0])
    # A mean prompt: phi = exp(-1) = .368, or exp(-1/2) = .607, where the theta link is plain DPO.
    assert math.exp(-neg_log_dispersion(1.0, mapping="half")) == pytest.approx(0.60653, abs=1e-5)


def test_controls():
    rng = np.random.default_rng(0)
    weight, train = rng.uniform(0.2, 3, 60), np.arange(60) < 40
    weight[train] /= weight[train].mean()
    np.testing.assert_array_equal(apply_control(weight, train, None), weight)
    np.testing.assert_array_equal(apply_control(weight, train, "constant"), np.ones(60))

    inverse = apply_control(weight, train, "inverse")
    assert inverse[train].mean() == pytest.approx(1.0, rel=1e-14)
    np.testing.assert_allclose(np.ptp(inverse * weight), 0, atol=1e-12)  # inverse * weight is one constant

    shuffled = apply_control(weight, train, "shuffled", seed=3)
    for part in (train, ~train):
        np.testing.assert_array_equal(np.sort(shuffled[part]), np.sort(weight[part]))
    assert (shuffled != weight).mean() > 0.8
    np.testing.assert_array_equal(shuffled, apply_control(weight, train, "shuffled", seed=3))
    assert (shuffled != apply_control(weight, train, "shuffled", seed=4)).any()


def test_controls_leave_their_input_alone():
    weight = np.array([0.5, 1.5, 1.0])
    for control in ("shuffled", "inverse", "constant", None):
        apply_control(weight, [True, True, False], control)[:] = -1
    np.testing.assert_array_equal(weight, [0.5, 1.5, 1.0])


def test_check_weights_accepts_calibrated_weights():
    check_weights(dispersion_weight(estimate(), phi_star(estimate())), [True] * 3)
    check_weights([0.5, 1.5, 9.0], [True, True, False])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, 1.0, 1.0], "same on every training pair"),
        ([-0.5, 2.5, 1.0], "row 0 is -0.5; all must be positive"),
        ([0.5, 1.5, math.nan], "row 2 is nan"),
        ([0.5, 1.0, 1.0], "mean over 2 training pairs is 0.75, not 1"),
    ],
)
def test_check_weights_finds_what_is_wrong(weight, message):
    with pytest.raises(FailedCheck, match=message):
        check_weights(weight, [True, True, False])


def test_check_weights_needs_training_pairs():
    with pytest.raises(FailedCheck, match="mean over 0 training pairs"):
        check_weights([0.5, 1.5], [False, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalised_entropy([0.1, -0.5], [0.1, 0.1], [1, 1], [1, 1], VOCAB), "chosen_entropy: row 1 is -0.5"),
        (lambda: normalised_entropy([0.1], [math.nan], [1], [1], VOCAB), "rejected_entropy: row 0 is nan"),
        # A sum over ten tokens given for a mean: above log 4.
        (lambda: normalised_entropy([9.0], [0.1], [10], [1], VOCAB), "expected nats per token <= 1.386"),
        (lambda: normalised_entropy([0.1], [0.1], [0], [1], VOCAB, norm="sum_over_max_len"), "at least one token"),
        (lambda: normalised_entropy([0.1], [0.1], [1], [1], VOCAB, norm="mean"), "unknown norm 'mean'"),
        (lambda: phi_star([]), "no training pairs"),
        (lambda: phi_star([0.5, 1.0]), "row 1 is 1.0"),
        (lambda: dispersion_weight([0.0], 1.0), "row 0 is 0.0"),
        (lambda: dispersion_weight([0.5], -0.29), "preference would be inverted"),
        (lambda: neg_log_dispersion([1.0], mapping="halves"), "did you mean 'half'"),
        (lambda: apply_control([1.0], [True], "shufled"), "did you mean 'shuffled'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(BadInput, match=message):
        call()


def test_sequence_entropy_is_nats_per_sampled_token_over_log_v():
    # prompt 7: (2 + 4) nats over 3 + 5 tokens; prompt 3: 1 nat over 2 tokens; V = 8
    found = sequence_entropy([7, 3, 7], [-2.0, -1.0, -4.0], [3, 2, 5], vocab_size=8)
    assert found == pytest.approx({7: 6 / (8 * np.log(8)), 3: 1 / (2 * np.log(8))})


def test_sequence_entropy_converges_to_the_entropy_it_samples():
    law = np.array([0.5, 0.25, 0.125, 0.125])  # entropy 1.75 bits of at most 2
    drawn = np.random.default_rng(0).choice(4, size=20_000, p=law)
    found = sequence_entropy(np.zeros(20_000, int), np.log(law[drawn]), np.ones(20_000), vocab_size=4)
    assert found[0] == pytest.approx(1.75 / 2, abs=0.005)  # standard error .0023


def test_sequence_entropy_refuses_what_is_no_log_probability():
    with pytest.raises(BadInput, match="ref_logp"):
        sequence_entropy([0], [0.5], [1], vocab_size=4)


# --- other estimators, and the stage ----------------------------------------------------------------------------------


def binary_entropy(p: float) -> float:
    return -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)


def test_vote_entropy_counts_members_with_one_pseudo_vote_each_way():
    # Five members, votes 5, 4, 3, 0 and 2 with a tie: p = 6/7, 5/7, 4/7, 1/7, 3.5/7 (clamped below 1).
    margins = [[1, 2, 3, 4, 5], [1, 1, 1, 1, -9], [1, 1, 1, -1, -1], [-1, -1, -1, -1, -1], [0, 3, 3, -3, -3]]
    expected = [binary_entropy(p) for p in (6 / 7, 5 / 7, 4 / 7, 1 / 7)] + [1 - 1e-6]
    np.testing.assert_allclose(vote_entropy(margins), expected, rtol=1e-12)
    # Which of the two responses is called chosen does not matter, nor does the size of a margin.
    np.testing.assert_allclose(vote_entropy(-7 * np.array(margins)), vote_entropy(margins), rtol=1e-14)


@pytest.mark.parametrize(
    ("margins", "message"),
    [([1.0, 2.0], "shape"), (np.zeros((3, 0)), "shape"), ([[1.0], [np.nan]], "row 1"), ([[np.inf, 1.0]], "row 0")],
)
def test_margins_that_are_no_votes_are_refused(margins, message):
    with pytest.raises(BadInput, match=message):
        vote_entropy(margins)


PHIS = [0.2, 0.8, 0.2, 0.5, 0.8, 0.3]
SPLITS = ["train", "train", "train", "train", "test", "test"]


def artifacts(results, metas=None):
    """Parents of a dispersion artifact for six pairs; tables in different orders, pairs with one row too many."""
    ids = np.arange(6) + 100
    save_table(results, "tokens", "tokens", pd.DataFrame({"pair_id": ids, "prompt_id": ids // 2, "split": SPLITS}))
    votes = np.array([[3, 3, 3], [3, -1, -1], [1, 1, -1], [-2, -2, -2], [1, 1, 1], [1, -1, 1]], dtype=float)
    scores = pd.DataFrame(
        {"pair_id": ids, "chosen_reward": list(votes + 5), "rejected_reward": list(np.full((6, 3), 5.0))}
    )
    save_table(results, "rewards", "scores", scores.iloc[::-1])
    metas = metas or [json.dumps({"kind": "open", "phi": phi}) for phi in PHIS]
    pairs = pd.DataFrame({"pair_id": [*ids, 999], "meta": [*metas, "{}"]})
    save_table(results, "pairs", "pairs", pairs.iloc[::-1])
    reference = {"pair_id": ids}
    for side, entropy in (("chosen", 0.5), ("rejected", 0.1)):
        reference |= {f"{side}_entropy": entropy * np.arange(1, 7) / 6, f"{side}_tokens": np.full(6, 4)}
    save_table(results, "reference", "scores", pd.DataFrame(reference).iloc[::-1])
    (results / "reference" / "reference.json").write_text('{"vocab_size": 4}')


def dispersion_table(results, **spec) -> pd.DataFrame:
    declared = DispersionSpec(**spec).model_dump()
    build = run_stage(results, "estimate-dispersion", declared, ["tokens", "reference", "rewards", "pairs"])
    return pd.read_parquet(build.work / "dispersion.parquet")


def test_true_dispersion_is_minus_log_phi_of_the_rater_scaled_to_mean_one(tmp_path):
    artifacts(tmp_path)
    table = dispersion_table(tmp_path, estimator="truth")
    logs = [-math.log(phi) for phi in PHIS]
    scale = sum(logs[:4]) / 4
    np.testing.assert_allclose(table["dispersion_weight"], [value / scale for value in logs], rtol=1e-12)
    assert table["split"].tolist() == SPLITS
    calibration = json.loads((tmp_path / "built" / "calibration.json").read_text())
    assert calibration["phi_star"] == pytest.approx(1 / scale, rel=1e-12)


def test_votes_of_an_ensemble_weigh_its_agreement(tmp_path):
    artifacts(tmp_path)
    table = dispersion_table(tmp_path, estimator="vote_entropy")
    # Three members, votes 3, 1, 2, 0, 3, 2: p = 4/5 or 1/5 where all agree, 2/5 or 3/5 elsewhere.
    sure, split = -math.log(binary_entropy(1 / 5)), -math.log(binary_entropy(2 / 5))
    expected = np.array([sure, split, split, sure, sure, split]) / ((2 * sure + 2 * split) / 4)
    np.testing.assert_allclose(table["dispersion_weight"], expected, rtol=1e-12)


def test_token_entropy_is_joined_on_the_pair(tmp_path):
    artifacts(tmp_path)
    table = dispersion_table(tmp_path)
    # E = (H_chosen + H_rejected) / (2 log V) = .6 n / 6 / (2 log 4) for the pairs n = 1..6.
    np.testing.assert_allclose(table["normalised_entropy"], 0.1 * np.arange(1, 7) / (2 * math.log(4)), rtol=1e-12)
    assert table["pair_id"].tolist() == [100, 101, 102, 103, 104, 105]


@pytest.mark.parametrize("meta", ["{}", '{"phi": 1.0}', '{"phi": 0.0}', '{"phi": null}'])
def test_true_dispersion_needs_the_phi_of_every_pair(tmp_path, meta):
    artifacts(tmp_path, [json.dumps({"phi": 0.3})] * 2 + [meta] + [json.dumps({"phi": 0.8})] * 3)
    with pytest.raises(BadInput, match="pair_id 102 has no phi between 0 and 1"):
        dispersion_table(tmp_path, estimator="truth")


@pytest.mark.parametrize("estimator", ["vote_entropy", "truth"])
def test_norms_belong_to_token_entropy(estimator):
    with pytest.raises(ValueError, match="no norm"):
        DispersionSpec(estimator=estimator, norm="sum_over_max_len")
    with pytest.raises(ValueError, match="no norm"):
        DispersionSpec(estimator=estimator, norm="mc_sequence", samples=2)
