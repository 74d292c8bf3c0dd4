"""Grid items: metrics, opponents, selection, and every kind of claim with every verdict."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grid_items import PROMPTS, answers, arm, claim, grid, judged, noise, point, trial
from prefopt.errors import FailedCheck
from prefopt.evaluation.items import DIRECTION_ONLY, NO_CLAIM, NOT_REPRODUCED, NOT_RUN
from prefopt.grids.collect import collect_runs
from prefopt.grids.estimates import crossed_interval, seed_interval, welch
from prefopt.grids.lengths import length_controlled
from prefopt.reporting.addresses import item_numbers

BASE = noise(0)


def test_reading_sorts_prompts_and_refuses_incomplete_draws():
    score = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mixed = answers(score, tokens=score * 10, order=[4, 0, 5, 2, 1, 3])
    found = trial(mixed, answers(score + 1, where=("test", 0.5, 5))).sets["test"]
    assert list(found) == [0.5, 1.0]
    assert found[1.0].score.tolist() == score.tolist()
    assert found[1.0].tokens.tolist() == (10 * score).tolist()
    assert (found[0.5].step, found[0.5].score[0, 0]) == (5, 2.0)
    with pytest.raises(FailedCheck, match="different numbers of prompts"):
        trial(answers(score, order=[0, 1, 2, 3, 4]))
    with pytest.raises(FailedCheck, match="a prompt stands twice"):
        trial(answers(score).replace({"prompt_id": {10: 3}}))
    with pytest.raises(FailedCheck, match="answer 1 has no finite score"):
        trial(answers([1.0, np.nan]))


def test_trials_of_one_set_must_have_the_same_prompts():
    other = answers(BASE)
    other["prompt_id"] += 1
    with pytest.raises(FailedCheck, match="answered different prompts of the set 'test'"):
        collect_runs(grid([point("dpo")]), {(0, 0): trial(answers(BASE)), (0, 1): trial(other)}, {})


def test_metrics_of_a_point_by_arithmetic():
    # Reference: 0 and 1 over its two seeds, mean 1/2. Arm: 0, 1, 2, 3 in seed 0, one more in seed 1.
    score = np.array([0.0, 1.0, 2.0, 3.0])
    reference = {s: trial(answers(np.full(4, float(s)), tokens=7)) for s in (0, 1)}
    runs = {(0, s): trial(answers(score + s, log_ratio=2.0 + s, tokens=10 + s), ref=f"trials/t{s}") for s in (0, 1)}
    item = collect_runs(grid([point("dpo", beta=0.1)], seeds=[0, 1]), runs, reference)
    (found,) = item["points"]
    test = found["sets"]["test"]
    assert test["reward"] == crossed_interval(np.stack([score, score + 1])).summary()
    assert test["reward"]["mean"] == pytest.approx((1.5 + 2.5) / 2)
    assert test["advantage"]["mean"] == pytest.approx(2.0 - 0.5)
    assert test["kl"]["mean"] == pytest.approx(2.5)
    assert test["tokens"]["mean"] == pytest.approx(10.5)
    assert test["score_positive"]["mean"] == pytest.approx((3 / 4 + 1) / 2)  # above 0
    # Against the reference of the same seed (0 and 1): a tie and three wins in both seeds.
    assert test["win_rate"]["mean"] == pytest.approx(100 * 3.5 / 4)
    assert item["reference"]["test"]["reward"]["mean"] == pytest.approx(0.5)
    assert item["reference"]["test"]["tokens"]["mean"] == pytest.approx(7)
    assert found["runs"] == {"0": "trials/t0", "1": "trials/t1"}
    assert found["selected"] is True
    assert "sd_over_draws" not in test
    assert (item["kind"], item["frontier"], item["verdict"]) == ("grid", [], NO_CLAIM)


def test_the_length_controlled_win_rate_knows_who_wrote_more():
    rng = np.random.default_rng(0)
    mine, other = rng.integers(5, 30, (2, PROMPTS)), rng.integers(5, 20, PROMPTS)
    score = noise(1, (2, PROMPTS)) + 0.2 * mine - 3  # longer answers score higher
    runs = {(0, s): trial(answers(score[s], tokens=mine[s])) for s in (0, 1)}
    reference = {s: trial(answers(BASE, tokens=other)) for s in (0, 1)}
    test = collect_runs(grid([point("a")], seeds=[0, 1]), runs, reference)["points"][0]["sets"]["test"]
    expected = length_controlled((score > BASE)[:, None] * 1.0, (other - mine)[:, None])
    assert test["lc_win_rate"] == pytest.approx(expected.summary())
    assert test["lc_win_rate"]["mean"] < test["win_rate"]["mean"] - 5


def test_a_classifiers_probability_is_positive_above_one_half():
    runs = {(0, 0): trial(answers([0.4, 0.5, 0.6, 0.9]))}
    spec = grid([point("dpo")], seeds=[0], judge="classifier")
    assert collect_runs(spec, runs, {})["points"][0]["sets"]["test"]["score_positive"]["mean"] == 0.5


def test_what_cannot_be_measured_is_null():
    # No reference trial, no log ratio, one prompt and one seed.
    spec = grid([point("dpo")], seeds=[0])
    test = collect_runs(spec, {(0, 0): trial(answers([1.0], log_ratio=np.nan))}, {})["points"][0]["sets"]["test"]
    assert [test[metric] for metric in ("kl", "advantage", "win_rate", "lc_win_rate")] == [None] * 4
    assert (test["reward"]["mean"], test["reward"]["low"]) == (1.0, None)


def test_points_that_did_not_run_stay_in_the_list():
    item = collect_runs(grid([point("dpo"), point("ipo")]), {(0, 1): trial(answers(BASE))}, {})
    assert item["points"][1] == point("ipo") | {"selected": True, "runs": {}, "sets": {}, "curve": {}}
    assert list(item["points"][0]["runs"]) == ["1"]


def test_win_rate_is_against_the_point_with_the_same_shared_settings():
    arms = {"dpo": arm("dpo"), "mallows": arm("dpo")}
    points = [
        point("dpo", beta=0.1),
        point("dpo", beta=0.5),
        point("mallows", beta=0.5, phi=0.2),
        point("mallows", beta=0.9, phi=0.2),
    ]
    score = np.array([0.0, 1.0, 2.0, 3.0])
    runs = {
        (0, 0): trial(answers(score + 9)),
        (1, 0): trial(answers([0, 0, 2, 5])),
        (2, 0): trial(answers(score)),
        (3, 0): trial(answers(score)),
    }
    item = collect_runs(grid(points, arms=arms, seeds=[0]), runs, {})
    dpo, _, mallows, unmatched = (p["sets"]["test"] for p in item["points"])
    assert (dpo["win_rate"]["mean"], dpo["win_rate"]["low"]) == (50.0, None)  # itself
    assert dpo["lc_win_rate"]["mean"] == 50.0
    assert mallows["win_rate"]["mean"] == pytest.approx(100 * (0.5 + 1 + 0.5 + 0) / 4)
    assert unmatched["win_rate"] is None
    assert unmatched["lc_win_rate"] is None


def test_an_opponent_without_the_setting_is_the_selected_one():
    arms = {"ipo": arm(), "mallows": arm("ipo")}
    points = [point("ipo", tau=0.1), point("ipo", tau=1.0), point("mallows", beta=0.5)]
    runs = {(0, 0): trial(answers([9.0, 9.0])), (1, 0): trial(answers([0.0, 0.0])), (2, 0): trial(answers([5.0, 5.0]))}
    spec = grid(points, arms=arms, seeds=[0])
    assert collect_runs(spec, runs, {})["points"][2]["sets"]["test"]["win_rate"] is None
    spec["grid"]["select"] = {"set": "test", "metric": "reward"}
    assert collect_runs(spec, runs, {})["points"][2]["sets"]["test"]["win_rate"]["mean"] == 0.0


def selection_runs(levels):
    """Trials with these validation rewards, [points][seeds]; the test reward is ten times as much."""
    return {
        (i, s): trial(answers(BASE + value, where=("validation", 1.0, 10)), answers(BASE + 10 * value))
        for i, row in enumerate(levels)
        for s, value in enumerate(row)
    }


def selected(item):
    return [i for i, p in enumerate(item["points"]) if p["selected"]]


def test_selection_takes_the_highest_validation_mean_and_the_first_on_ties():
    points = [point("dpo", beta=b) for b in (0.1, 0.2, 0.3)] + [point("dpo", "d", beta=0.1)]
    spec = grid(points, sets=["test", "validation"], select={"set": "validation", "metric": "reward"})
    assert selected(collect_runs(spec, selection_runs([[1, 1, 1], [0, 2, 2], [0, 0, 0], [0, 0, 0]]), {})) == [1, 3]
    assert selected(collect_runs(spec, selection_runs([[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]), {})) == [0, 3]


def compared(row, shift=0.0, seeds=3, spread=0.02, **more):
    """The claim's row where arm a is ``shift`` above arm b on every prompt, up to small noise per seed and prompt."""
    runs = {(0, s): trial(answers(BASE + shift + spread * noise(s + 1))) for s in range(seeds)}
    runs |= {(1, s): trial(answers(BASE)) for s in range(seeds)}
    spec = grid([point("a"), point("b")], [row], seeds=list(range(seeds)), **more)
    return judged(spec, runs, {s: trial(answers(BASE - 1)) for s in range(seeds)})[0]


@pytest.mark.parametrize(
    ("sign", "shift", "verdict", "reason"),
    [
        ("above", 0.5, DIRECTION_ONLY, "lies above 0; numbers are not compared at the scale 'demo'"),
        ("above", -0.5, NOT_REPRODUCED, "lies below 0: the opposite direction"),
        ("above", 0.0, NOT_REPRODUCED, "reaches 0: no direction shown"),
        ("below", -0.5, DIRECTION_ONLY, "lies below 0; numbers"),
        ("below", 0.5, NOT_REPRODUCED, "lies above 0: the opposite direction"),
        ("equal", 0.0, DIRECTION_ONLY, "contains 0 and lies within ±0.1"),
        ("equal", 0.05, NOT_REPRODUCED, "does not contain 0: a small difference is shown"),
        ("equal", 0.5, NOT_REPRODUCED, "reaches beyond ±0.1"),
    ],
)
def test_verdicts_of_a_comparison(sign, shift, verdict, reason):
    row = compared(claim("a", "b", sign=sign, margin=0.1 if sign == "equal" else None), shift)
    assert row["difference"]["mean"] == pytest.approx(shift, abs=1e-12)
    assert (row["verdict"], row["difference"]["n_seeds"]) == (verdict, 3)
    assert reason in row["reason"]


def test_a_difference_too_uncertain_to_call_equal():
    row = compared(claim("a", "b", sign="equal", margin=0.1), spread=5.0)
    assert row["verdict"] == NOT_REPRODUCED
    assert "reaches beyond" in row["reason"]


def test_differences_are_paired_by_prompt_within_a_seed():
    row = compared(claim("a", "b"), 0.25, spread=0.0)
    assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx((0.25, 0.25))
    assert row["p"] < 1e-6


def test_the_other_side_may_be_the_reference_or_a_number():
    assert compared(claim("a", "reference"), 0.5)["difference"]["mean"] == pytest.approx(1.5)
    assert compared(claim("a", 0.2), 0.5)["difference"]["mean"] == pytest.approx(0.3)
    assert compared(claim("a", "reference", "win_rate"), 0.5)["difference"]["mean"] == pytest.approx(50)
    assert compared(claim("a", 60, "win_rate"), 0.5)["difference"]["mean"] == pytest.approx(40)


def test_head_to_head_counts_ties_as_half():
    runs = {(0, 0): trial(answers([1.0, 2.0, 3.0, 4.0])), (1, 0): trial(answers([0.0, 2.0, 3.0, 5.0]))}
    row = judged(grid([point("a"), point("b")], [claim("a", "b", "win_rate")], seeds=[0]), runs)[0]
    assert row["difference"]["mean"] == pytest.approx(100 * (1 + 0.5 + 0.5 + 0) / 4 - 50)


def test_one_seed_covers_the_prompts():
    row = compared(claim("a", "b"), 0.5, seeds=1)
    assert row["difference"] == pytest.approx(crossed_interval(0.5 + 0.02 * noise(1)[None, :]).summary())
    assert row["difference"]["high"] - row["difference"]["low"] < 0.02
    assert row["verdict"] == DIRECTION_ONLY


def test_conditions_count_alike_and_default_to_those_that_both_arms_have():
    # a - b is 1 in c and 3 in d; a alone runs in e.
    points = [point("a", "c"), point("b", "c"), point("a", "d"), point("b", "d"), point("a", "e")]
    levels = [1.0, 0.0, 5.0, 2.0, 99.0]
    runs = {(i, s): trial(answers(BASE + v)) for i, v in enumerate(levels) for s in range(3)}
    rows = [
        claim("a", "b"),
        claim("a", "b", conditions=["d"]),
        claim("a", "b", conditions=["c", "e"]),
        claim("a", "b", conditions=["e"]),
    ]
    both, one, part, missing = judged(grid(points, rows), runs)
    assert both["difference"]["mean"] == pytest.approx((1 + 3) / 2)
    assert one["difference"]["mean"] == pytest.approx(3)
    assert part["difference"]["mean"] == pytest.approx(1)  # b has no point in e
    assert (missing["verdict"], missing["reason"]) == (NOT_RUN, "not run: a and b in one condition")


def test_a_condition_with_more_points_counts_no_more():
    points = [point("a", "c", beta=0.1), point("a", "c", beta=0.2), point("a", "d", beta=0.1)]
    runs = {(i, s): trial(answers(BASE + v)) for i, v in enumerate((1.0, 3.0, 8.0)) for s in range(3)}
    row = judged(grid(points, [claim("a", 0.0, arm_at="all")]), runs)[0]
    assert row["difference"]["mean"] == pytest.approx(((1 + 3) / 2 + 8) / 2)


def test_points_of_a_claim_all_selected_or_named():
    # a at beta 1, 2, 3 has 10, 20, 30; b at beta 1, 2 has 1, 2: matched differences 9 and 18.
    points = [point("a", beta=float(b)) for b in (1, 2, 3)] + [point("b", beta=float(b)) for b in (1, 2)]
    levels = [10.0, 20.0, 30.0, 1.0, 2.0]
    runs = {(i, s): trial(answers(BASE + v)) for i, v in enumerate(levels) for s in range(3)}
    rows = [
        claim("a", "b", arm_at="all", than_at="all"),
        claim("a", "b"),
        claim("a", "b", arm_at={"beta": 1.0}, than_at={"beta": 2.0}),
        claim("a", "b", arm_at="all"),
        claim("a", "b", arm_at={"beta": 7.0}),
        claim("a", "b", "win_rate", arm_at="all", than_at="all"),
    ]
    matched, best, named, against_best, absent, rate = judged(
        grid(points, rows, select={"set": "test", "metric": "reward"}), runs
    )
    assert matched["difference"]["mean"] == pytest.approx((9 + 18) / 2)
    assert best["difference"]["mean"] == pytest.approx(30 - 2)
    assert named["difference"]["mean"] == pytest.approx(10 - 2)
    assert against_best["difference"]["mean"] == pytest.approx((10 + 20 + 30) / 3 - 2)
    assert (absent["verdict"], absent["reason"]) == (NOT_RUN, "not run: a in c at beta 7.0")
    assert rate["difference"]["mean"] == 50
    apart = [point("a", beta=1.0), point("a", beta=2.0), point("b", beta=3.0), point("b", beta=4.0)]
    assert "no points of equal settings" in judged(grid(apart, rows[:1]), runs)[0]["reason"]


def test_claims_on_runs_that_are_not_here_were_not_run():
    runs = {(0, s): trial(answers(BASE)) for s in range(3)}
    rows = [claim("a", "b"), claim("a", "reference"), claim("a", "gone"), claim("a", 0.0, set="validation")]
    spec = grid([point("a"), point("b")], rows)
    item = collect_runs(spec, runs, {})
    reasons = ["not run: b in c, seed 0", "not run: the reference, seed 0", "not run: gone"]
    assert [row["reason"] for row in item["expect"][:3]] == reasons
    assert "has no answers to the set 'validation'" in item["expect"][3]["reason"]
    assert {row["verdict"] for row in item["expect"]} == {NOT_RUN}
    assert item["expect"][0]["difference"] is None
    assert item["verdict"] == NOT_RUN
    one_seed = runs | {(1, 2): trial(answers(BASE - 1))}
    assert judged(spec, one_seed)[0]["difference"]["n_seeds"] == 1  # the seeds that both have


def test_several_draws_are_averaged_and_compared_by_welch():
    rng = np.random.default_rng(5)
    a, b, reference = (rng.normal(m, 1, (3, 4, PROMPTS)) for m in (0.5, 0.0, 0.0))  # seeds, draws, prompts
    runs = {(i, s): trial(answers(x[s])) for i, x in enumerate((a, b)) for s in range(3)}
    rows = [claim("a", "b"), claim("a", "b", "win_rate"), claim("a", 0.0)]
    of_reference = {s: trial(answers(reference[s])) for s in range(3)}
    item = collect_runs(grid([point("a"), point("b")], rows, draws=4), runs, of_reference)
    plain, rate, number = item["expect"]
    expected = crossed_interval((a - b).mean(axis=1)).summary()
    assert plain["difference"] == pytest.approx(expected)
    assert plain["welch"] == pytest.approx(welch(a.mean(axis=(0, 2)), b.mean(axis=(0, 2))))
    wins = [100 * (x > reference).mean(axis=(0, 2)) for x in (a, b)]
    assert rate["difference"]["mean"] == pytest.approx(100 * (a > b).mean() - 50)
    assert rate["welch"] == pytest.approx(welch(*wins))
    assert number["welch"] is None
    opponents = {"a": arm("b"), "b": arm()}  # win rates against different opponents are not comparable
    apart = judged(grid([point("a"), point("b")], rows[:2], draws=4, arms=opponents), runs, of_reference)
    assert apart[0]["welch"] == plain["welch"]
    assert apart[1]["welch"] is None
    spread = item["points"][0]["sets"]["test"]["sd_over_draws"]
    assert spread == pytest.approx({"reward": a.mean(axis=(0, 2)).std(ddof=1), "win_rate": wins[0].std(ddof=1)})
    numbers = item_numbers({**item, "kind": "grid"})  # what is tracked and compared: means with limits, no spread
    assert {"a/c/test/reward", "b/c/test/win_rate", "claim1"} <= set(numbers)
    assert all({"mean", "low", "high"} <= set(number.value) for number in numbers.values())


def test_training_curve_metrics_have_one_value_per_seed():
    # 20 steps: the last tenth are two of them. Chosen falls to -(1 + s) - 1/2 on their mean.
    def run(s, scale):
        records = [{"chosen_log_ratio": 0.0}] * 18 + [{"chosen_log_ratio": scale * -(x + s)} for x in (1.0, 2.0)]
        return trial(answers(BASE), curve=records)

    runs = {(0, s): run(s, 1.0) for s in range(3)} | {(1, s): run(s, 0.0) for s in range(3)}
    rows = [claim("a", than, "chosen_log_ratio", sign="below") for than in ("b", "reference", -1.0)]
    found = judged(grid([point("a"), point("b")], rows), runs)
    ends = np.array([-1.5, -2.5, -3.5])
    assert found[0]["difference"] == pytest.approx(seed_interval(ends).summary())
    assert found[1]["difference"] == found[0]["difference"]
    assert found[2]["difference"]["mean"] == pytest.approx(-2.5 + 1)
    single = judged(grid([point("a"), point("b")], rows[:1], seeds=[0]), runs)[0]
    assert (single["verdict"], single["reason"]) == (NOT_RUN, "one seed: no interval over seeds")
    assert single["difference"]["mean"] == pytest.approx(-1.5)
    none = judged(grid([point("a"), point("b")], [claim("a", "b", "margin")]), runs)[0]
    assert none["reason"].endswith("has no margin in its training curve")


def test_the_item_is_json_and_the_same_every_time():
    texts = []
    for _ in range(2):
        runs = {(i, s): trial(answers(noise(3 * i + s))) for i in range(2) for s in range(3)}
        item = collect_runs(grid([point("a"), point("b")], [claim("a", "b")]), runs, {})
        texts.append(json.dumps(item, allow_nan=False))
    assert texts[0] == texts[1]
