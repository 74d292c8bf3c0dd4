"""Joining reward models, diagnosing them, and length-biased subsamples."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from artifact_builds import build_of, run_stage, save_table
from prefopt.ensemble import (
    diagnostics,
    largest_subsample,
    length_outcome,
    longer_wins_fraction,
    resample_longer_wins,
    reward_margins,
    stack_members,
)
from prefopt.errors import BadInput
from prefopt.specs import EnsembleSpec, TrainSpec
from prefopt.stages.reward import _longer_wins, _member_rows
from prefopt.world import WorldParams, generate_pairs, oracle_reward


def member(ids, chosen, rejected) -> pd.DataFrame:
    return pd.DataFrame({"pair_id": ids, "chosen_reward": chosen, "rejected_reward": rejected})


def test_members_join_on_pair_id_not_on_row_order():
    stacked = stack_members(
        [member([7, 3, 5], [1.0, 2.0, 3.0], [0.0, 0.5, 1.0]), member([5, 7, 3], [30, 10, 20], [3, 1, 2])]
    )
    assert stacked["pair_id"].tolist() == [7, 3, 5]
    assert [list(row) for row in stacked["chosen_reward"]] == [[1, 10], [2, 20], [3, 30]]
    np.testing.assert_array_equal(reward_margins(stacked), [[1, 9], [1.5, 18], [2, 27]])


def test_text_ids_and_extra_columns_are_fine():
    first = member(["a", "b"], [1, 2], [0, 0]).assign(split="train")
    assert stack_members([first])["pair_id"].tolist() == ["a", "b"]


def test_stacked_members_survive_parquet(tmp_path):
    stacked = stack_members([member([1, 2], [1.0, 2.0], [0.0, 0.5]), member([2, 1], [4.0, 3.0], [0.0, 0.5])])
    stacked.to_parquet(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(reward_margins(pd.read_parquet(tmp_path / "scores.parquet")), reward_margins(stacked))


GOOD = member([1, 2], [1.0, 2.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no members"),
        ([GOOD, member([1, 3], [1, 1], [0, 0])], "member 1 lacks 1 of the pair_ids, e.g. 2"),
        ([GOOD, member([1, 2, 4], [1, 1, 1], [0, 0, 0])], "member 1 alone has 1 of the pair_ids, e.g. 4"),
        ([GOOD, member([1, 1], [1, 1], [0, 0])], "member 1 has pair_id 1 more than once"),
        ([GOOD.drop(columns="rejected_reward")], "member 0 has no column 'rejected_reward'"),
        ([GOOD, member([1, 2], [1, math.nan], [0, 0])], "member 1, pair_id 2: reward not finite"),
    ],
)
def test_members_that_do_not_fit_are_named(frames, message):
    with pytest.raises(BadInput, match=message):
        stack_members(frames)


def test_diagnostics_of_known_margins():
    # Margins: member 0 [1, 1, -1, 3], member 1 its double, member 2 its negative, member 3 always 1, member 4 a tie.
    base = np.array([1.0, 1.0, -1.0, 3.0])
    margins = np.stack([base, 2 * base, -base, np.ones(4), [0.0, 1.0, -1.0, 2.0]])
    stacked = stack_members([member(range(4), row, np.zeros(4)) for row in margins])
    report = diagnostics(stacked)
    assert (report["members"], report["pairs"]) == (5, 4)
    assert report["accuracy"] == [0.75, 0.75, 0.25, 1.0, (0.5 + 1 + 0 + 1) / 4]
    np.testing.assert_allclose(report["margin_mean"], [1, 2, -1, 1, 0.5])
    np.testing.assert_allclose(report["margin_std"], margins.std(axis=1))
    varying = [0, 1, 2, 4]
    correlation = np.array(report["correlation"])
    np.testing.assert_allclose(correlation[np.ix_(varying, varying)], np.corrcoef(margins[varying]), rtol=1e-12)
    assert (correlation[3] == 0).all()
    # Shares of votes for chosen: (1+1+0+1+.5)/5, (1+1+0+1+1)/5, (0+0+1+1+0)/5, (1+1+0+1+1)/5
    shares = [0.7, 0.8, 0.4, 0.8]
    expected = np.mean([-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in shares])
    assert report["vote_entropy"] == pytest.approx(expected, rel=1e-12)
    assert report["below_chance"] == [2]
    assert report["constant"] == [3]
    assert report["identical"] == []
    assert report["warnings"] == [
        "member 2 is right on 25.0% of the pairs, less than chance",
        "member 3 has the same reward margin on every pair",
    ]


def test_diagnostics_flag_identical_members_and_full_agreement():
    rewards = np.random.default_rng(0).normal(size=20) ** 2 + 0.1
    # The second differs by a constant per response only: the same reward model for every purpose here.
    stacked = stack_members([member(range(20), rewards, 0 * rewards), member(range(20), rewards + 4, 0 * rewards + 4)])
    report = diagnostics(stacked)
    assert report["identical"] == [(0, 1)]
    assert report["warnings"] == ["members 0 and 1 have the same reward margins"]
    assert diagnostics(stacked.iloc[:0]) == {"pairs": 0, "warnings": ["no pairs to compare the members on"]}
    assert report["vote_entropy"] == 0


def test_longer_means_a_tenth_more_tokens():
    for short in range(10, 500, 10):
        assert length_outcome([short * 11 // 10], [short]) == 1
        assert length_outcome([short], [short * 11 // 10]) == -1
        assert length_outcome([short * 11 // 10 - 1], [short]) == 0
    # 107 against 100 is a gap of 7 %, although 0.07 * 100 rounds to more than 7.
    assert length_outcome([107, 100], [100, 107], gap=0.07).tolist() == [1, -1]
    assert length_outcome([5, 5], [5, 6], gap=0).tolist() == [0, -1]


def test_longer_wins_fraction_leaves_out_the_gap():
    assert longer_wins_fraction([20, 10, 10, 21, 30], [10, 20, 10, 20, 10]) == pytest.approx(2 / 3)
    assert math.isnan(longer_wins_fraction([10], [10]))


def lengths(wins: int, losses: int, ties: int = 0):
    chosen = np.concatenate([np.full(wins, 20), np.full(losses, 10), np.full(ties, 20)])
    rejected = np.concatenate([np.full(wins, 10), np.full(losses, 20), np.full(ties, 19)])
    order = np.random.default_rng(1).permutation(len(chosen))
    return chosen[order], rejected[order]


# Largest |D_{rho,b}| from |D_rho| = 30000: N min(rho/b, (1-rho)/(1-b)), b = .2 .4 .5 .6 .8
LARGEST = {
    0.2: [30000, 15000, 12000, 10000, 7500],
    0.3: [26250, 22500, 18000, 15000, 11250],
    0.4: [22500, 30000, 24000, 20000, 15000],
    0.5: [18750, 25000, 30000, 25000, 18750],
    0.6: [15000, 20000, 24000, 30000, 22500],
    0.7: [11250, 15000, 18000, 22500, 26250],
    0.8: [7500, 10000, 12000, 15000, 30000],
}


@pytest.mark.parametrize("rho", list(LARGEST))
def test_largest_biased_subsets(rho):
    wins = round(30000 * rho)
    chosen, rejected = lengths(wins, 30000 - wins, ties=500)
    for bias, size in zip((0.2, 0.4, 0.5, 0.6, 0.8), LARGEST[rho], strict=True):
        assert largest_subsample(chosen, rejected, bias) == size
        rows = resample_longer_wins(chosen, rejected, bias, seed=2)
        assert len(rows) == len(set(rows.tolist())) == size
        assert longer_wins_fraction(chosen[rows], rejected[rows]) == pytest.approx(bias, abs=1e-12)
        assert (length_outcome(chosen[rows], rejected[rows]) != 0).all()


def test_random_sizes_and_fractions_are_met_as_closely_as_counts_allow():
    rng = np.random.default_rng(3)
    for _ in range(200):
        wins, losses = rng.integers(5, 60, 2)
        fraction = rng.uniform(0.1, 0.9)
        chosen, rejected = lengths(wins, losses, ties=3)
        rows = resample_longer_wins(chosen, rejected, fraction, seed=4)
        got = longer_wins_fraction(chosen[rows], rejected[rows])
        assert abs(got - fraction) <= 0.5 / len(rows) + 1e-12
        # One more pair would need more wins or losses than there are.
        more = len(rows) + 1
        assert more * fraction > wins or more * (1 - fraction) > losses
        size = int(rng.integers(1, len(rows) + 1))
        assert len(resample_longer_wins(chosen, rejected, fraction, size=size)) == size


def test_resampling_is_seeded_and_keeps_the_order_of_rows():
    chosen, rejected = lengths(60, 40)
    first = resample_longer_wins(chosen, rejected, 0.5, size=30, seed=1)
    np.testing.assert_array_equal(first, resample_longer_wins(chosen, rejected, 0.5, size=30, seed=1))
    assert (np.diff(first) > 0).all()
    assert set(first) != set(resample_longer_wins(chosen, rejected, 0.5, size=30, seed=2))


def test_the_ends_take_one_side_only():
    chosen, rejected = lengths(6, 4)
    assert len(resample_longer_wins(chosen, rejected, 1.0)) == 6
    assert len(resample_longer_wins(chosen, rejected, 0.0)) == 4


@pytest.mark.parametrize(
    ("wins", "losses", "fraction", "size", "message"),
    [
        (10, 10, 1.2, None, "expected a number from 0 to 1"),
        (10, 10, math.nan, None, "expected a number from 0 to 1"),
        (0, 10, 0.5, None, "at most 0 from 0 pairs where the longer response wins and 10"),
        (10, 0, 0.5, None, "any subsample"),
        (10, 10, 0.5, 21, "no way to draw 21 pairs with longer-wins fraction 0.5: at most 20"),
        (10, 10, 0.8, 13, "at most 12 from 10 pairs"),
        (10, 10, 0.5, 0, "no way to draw 0 pairs"),
    ],
)
def test_impossible_subsamples_are_refused(wins, losses, fraction, size, message):
    with pytest.raises(BadInput, match=message):
        resample_longer_wins(*lengths(wins, losses), fraction, size)


# --- declarations and stages ------------------------------------------------------------------------------------------

BIASES = [0.2, 0.4, 0.5, 0.6, 0.8]
TRAIN = TrainSpec(steps=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": TRAIN, "equal_size": True}, "equal_size is about the subsamples"),
        ({}, "give 'train'"),
        ({"oracle": True, "train": TRAIN}, "remove 'train'"),
        ({"oracle": True, "members": 2}, "remove 'members'"),
        ({"oracle": True, "seeds": [3]}, "remove 'seeds'"),
        ({"oracle": True, "subset": 0.5}, "remove 'subset'"),
        ({"oracle": True, "split": "judge"}, "remove 'split'"),
    ],
)
def test_ensembles_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EnsembleSpec(**fields)


def test_good_ensembles_are_accepted():
    assert EnsembleSpec(oracle=True).train is None
    assert EnsembleSpec(members=5, longer_wins=BIASES, equal_size=True, train=TRAIN).equal_size


def token_lengths(wins: int, losses: int, ties: int = 7) -> pd.DataFrame:
    chosen, rejected = lengths(wins, losses, ties)
    return pd.DataFrame({"pair_id": np.arange(len(chosen)), "chosen_tokens": chosen, "rejected_tokens": rejected})


def member_rows(tmp_path, rows, bias, seed=0, subset=1.0, **spec) -> pd.DataFrame:
    spec |= {"longer_wins": bias, "subset": subset, "seeds": {"subset": seed}}
    return _member_rows(rows, build_of(tmp_path, "reward", spec, []))


@pytest.mark.parametrize("rho", list(LARGEST))
def test_members_of_equal_size_have_the_size_of_the_smallest(tmp_path, rho):
    # A thousandth of the table's 30000 pairs times ten: 300 pairs, sizes LARGEST / 100.
    rows = token_lengths(round(300 * rho), 300 - round(300 * rho))
    sizes = [len(member_rows(tmp_path, rows, bias)) for bias in BIASES]
    assert sizes == [math.floor(size / 100) for size in LARGEST[rho]]
    for bias in BIASES:
        kept = member_rows(tmp_path, rows, bias, equal_to=BIASES)
        assert len(kept) == min(sizes)
        assert _longer_wins(kept) == pytest.approx(round(bias * min(sizes)) / min(sizes), abs=0.5 / min(sizes) + 1e-6)


def test_a_share_of_a_biased_subsample_is_taken_after_its_size_is_set(tmp_path):
    rows = token_lengths(150, 150)
    assert len(member_rows(tmp_path, rows, 0.2, subset=0.5, equal_to=BIASES)) == round(0.5 * math.floor(150 / 0.8))


def test_share_of_longer_wins_is_null_without_pairs_that_differ(tmp_path):
    assert _longer_wins(token_lengths(3, 1)) == 0.75
    assert _longer_wins(token_lengths(0, 0, ties=4)) is None


def world_artifacts(results, prompt=None) -> list[dict]:
    pairs = generate_pairs(WorldParams(prompts=20, pairs=20))
    ids = np.arange(20) + 50
    splits = ["train"] * 15 + ["test"] * 5
    table = pd.DataFrame(
        {
            "pair_id": ids,
            "prompt": [[{"role": "user", "content": prompt or pair["prompt"]}] for pair in pairs],
            "chosen": [pair["chosen"] for pair in pairs],
            "rejected": [pair["rejected"] for pair in pairs],
        }
    )
    save_table(results, "pairs", "pairs", table.iloc[::-1])
    save_table(results, "tokens", "tokens", pd.DataFrame({"pair_id": ids, "split": splits}))
    return pairs


def test_the_oracle_is_an_ensemble_of_one_that_knows_the_true_reward(tmp_path):
    pairs = world_artifacts(tmp_path)
    build = run_stage(tmp_path, "collect-ensemble", {"oracle": True}, ["tokens", "pairs"])
    table = pd.read_parquet(build.work / "scores.parquet")
    assert table["pair_id"].tolist() == list(range(50, 70))
    for side in ("chosen", "rejected"):
        expected = [[oracle_reward(pair["prompt"], pair[side])] for pair in pairs]
        np.testing.assert_allclose(np.stack(table[f"{side}_reward"].to_list()), expected, rtol=1e-15)
    assert build.summary["members"] == 1
    assert json.loads((build.work / "diagnostics.json").read_text())["members"] == ["oracle"]
    assert build.summary["held_out"]["pairs"] == 5


def test_the_oracle_knows_prompts_of_the_demo_world_only(tmp_path):
    world_artifacts(tmp_path, prompt="how do i bake bread")
    with pytest.raises(BadInput, match="pair_id 50: the prompt 'how do i bake bread' is none of the demo world's"):
        run_stage(tmp_path, "collect-ensemble", {"oracle": True}, ["tokens", "pairs"])


def test_trained_members_stand_side_by_side(tmp_path):
    world_artifacts(tmp_path)
    for number in range(2):
        ids = np.arange(20) + 50
        scores = member(ids, number + np.arange(20.0), np.zeros(20))
        save_table(tmp_path, f"member{number}", "scores", scores.iloc[::-1])
    build = run_stage(tmp_path, "collect-ensemble", {}, ["tokens", "member0", "member1"])
    table = pd.read_parquet(build.work / "scores.parquet")
    np.testing.assert_array_equal(reward_margins(table), np.column_stack([np.arange(20.0), 1 + np.arange(20.0)]))
    assert build.summary["held_out"]["margin_std"] == pytest.approx([math.sqrt(2)] * 2)  # of 15..19, and of 16..20
