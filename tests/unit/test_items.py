"""Paper items: paired intervals, verdict rules, and the arm that is the baseline itself."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from prefopt.errors import FailedCheck
from prefopt.evaluation import items

PROMPTS = 120


def prompts_table(outcome, advantage=0.0, tokens=10.0, order=None):
    outcome = np.asarray(outcome, dtype=float)
    table = pd.DataFrame(
        {
            "prompt_id": np.arange(len(outcome)),
            "outcome": outcome,
            "reward_model": 1.0 + advantage,
            "reward_baseline": 1.0,
            "tokens_model": tokens,
            "tokens_baseline": 8.0,
        }
    )
    return table if order is None else table.iloc[order].reset_index(drop=True)


def run(outcome, **more):
    table = prompts_table(outcome, **more)
    return {"policy": "policy/p-00000000", "metrics_ref": "metrics/m-00000000", "metrics": {}, "prompts": table}


def claim(arm="mallows", than="dpo", metric="win_rate", reported=""):
    return {"claim": "c", "arm": arm, "metric": metric, "than": than, "source": "table 1", "reported": reported}


def spec(*rows, scale="demo", against="reference", arms=("dpo", "mallows"), seeds=(0, 1)):
    head = {"paper": "p", "name": "n", "title": "T", "arxiv": None, "scale": scale, "note": ""}
    losses = {arm: {"name": arm} for arm in arms}
    return {"item": head, "arms": losses, "seeds": list(seeds), "against": against, "expect": list(rows)}


def verdicts(item):
    return [row["verdict"] for row in item["expect"]]


def test_interval_of_one_seed_is_the_prompt_bootstrap():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=(1, 400))
    low, high = items.two_way_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.06)
    assert high == pytest.approx(values.mean() + half, abs=0.06)


def test_variance_over_seeds_is_unbiased():
    # Values that differ by seed only: the mean's variance is s^2 / S with s^2 over S-1, whatever the prompts do.
    for seeds in (2, 3, 8):
        level = np.random.default_rng(seeds).normal(size=seeds)
        values = np.repeat(level[:, None], 50, axis=1)
        rng = np.random.default_rng(1)
        share = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=200_000) / (seeds - 1)
        assert (share @ level).var() == pytest.approx(level.var(ddof=1) / seeds, rel=0.02)
        low, high = items.two_way_interval(values)
        assert (low, high) == pytest.approx(tuple(np.quantile(share @ level, [0.025, 0.975])), abs=0.05)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(150):
        values = rng.normal(size=(6, 1)) + rng.normal(size=(1, 80)) * 2 + rng.normal(size=(6, 80))
        low, high = items.two_way_interval(values)
        covered += low <= 0 <= high
    assert 0.85 <= covered / 150 <= 1.0


def test_same_prompts_make_the_difference_sharper_than_the_arms():
    # One arm wins 5 points more on every prompt: the prompts' own spread cancels, so the difference has no width.
    base = np.random.default_rng(0).uniform(0.1, 0.9, PROMPTS)
    results = {(arm, s): run(base + shift) for arm, shift in (("dpo", 0.0), ("mallows", 0.05)) for s in (0, 1)}
    item = items.collect_item(spec(claim()), results)
    difference = item["expect"][0]["difference"]
    assert difference["mean"] == pytest.approx(5.0)
    assert difference["high"] - difference["low"] == pytest.approx(0.0, abs=1e-9)
    summary = item["arms"]["dpo"]["summary"]["win_rate"]
    assert summary["mean"] == pytest.approx(100 * base.mean())
    assert summary["high"] - summary["low"] > 2.0
    assert (summary["n_seeds"], difference["n_seeds"], difference["n_prompts"]) == (2, 2, PROMPTS)


def test_rows_are_paired_by_prompt_id_and_not_by_position():
    base = np.random.default_rng(0).uniform(0.1, 0.9, PROMPTS)
    shuffled = np.random.default_rng(9).permutation(PROMPTS)
    results = {("dpo", 0): run(base), ("mallows", 0): run(base + 0.05, order=shuffled)}
    difference = items.collect_item(spec(claim(), seeds=(0,)), results)["expect"][0]["difference"]
    assert difference["low"] == pytest.approx(5.0)
    assert difference["high"] == pytest.approx(5.0)


def test_row_order_of_the_tables_does_not_matter():
    rng = np.random.default_rng(0)
    outcomes = {arm: rng.uniform(0, 1, PROMPTS) for arm in ("dpo", "mallows")}
    plain = {(arm, 0): run(values) for arm, values in outcomes.items()}
    mixed = {(arm, 0): run(values, order=rng.permutation(PROMPTS)) for arm, values in outcomes.items()}
    first, second = (items.collect_item(spec(claim(), seeds=(0,)), results) for results in (plain, mixed))
    assert first == second


def test_prompts_without_a_judgement_leave_the_pair_and_are_counted_out():
    base = np.full(PROMPTS, 0.5)
    gap = base.copy()
    gap[:20] = np.nan
    results = {("dpo", 0): run(base), ("mallows", 0): run(gap)}
    item = items.collect_item(spec(claim(), seeds=(0,)), results)
    assert item["expect"][0]["difference"]["n_prompts"] == PROMPTS - 20


@pytest.mark.parametrize(("shift", "expected"), [(0.1, items.DIRECTION_ONLY), (-0.1, items.NOT_REPRODUCED)])
def test_small_scales_give_directions_only(shift, expected):
    base = np.random.default_rng(0).uniform(0.2, 0.8, PROMPTS)
    results = {(arm, s): run(base + d) for arm, d in (("dpo", 0.0), ("mallows", shift)) for s in (0, 1)}
    for scale in ("demo", "local"):
        # The reported number equals ours; at these scales that must not matter.
        item = items.collect_item(spec(claim(reported=f"+{100 * shift:g}"), scale=scale), results)
        assert verdicts(item) == [expected]
        assert item["verdict"] == expected


def test_an_interval_that_reaches_zero_shows_no_direction():
    rng = np.random.default_rng(0)
    results = {(arm, s): run(rng.uniform(0, 1, PROMPTS)) for arm in ("dpo", "mallows") for s in (0, 1)}
    row = items.collect_item(spec(claim()), results)["expect"][0]
    assert row["difference"]["low"] < 0 < row["difference"]["high"]
    assert row["verdict"] == items.NOT_REPRODUCED
    assert "reaches 0" in row["reason"]


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("55", items.REPRODUCED),  # arm's own value: 55 lies in its interval
        ("55 %", items.REPRODUCED),
        ("70", items.DIRECTION_ONLY),
        ("+5", items.REPRODUCED),  # a difference
        ("60.5 vs 55.5", items.REPRODUCED),
        ("+9", items.DIRECTION_ONLY),
        ("about five points", items.DIRECTION_ONLY),
        ("", items.DIRECTION_ONLY),
    ],
)
def test_paper_scale_needs_the_direction_and_the_number(reported, expected):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, PROMPTS)
    base += 0.5 - base.mean()
    results = {}
    for s in (0, 1):
        noise = rng.normal(0, 0.02, PROMPTS)
        noise -= noise.mean()
        results["dpo", s], results["mallows", s] = run(base), run(base + 0.05 + noise)
    row = items.collect_item(spec(claim(reported=reported), scale="paper"), results)["expect"][0]
    assert row["difference"]["mean"] == pytest.approx(5.0)
    assert row["verdict"] == expected


def test_a_wrong_direction_is_never_reproduced_by_its_number():
    base = np.random.default_rng(0).uniform(0.2, 0.8, PROMPTS)
    results = {(arm, 0): run(base + d) for arm, d in (("dpo", 0.0), ("mallows", -0.1))}
    row = items.collect_item(spec(claim(reported="-10"), scale="paper", seeds=(0,)), results)["expect"][0]
    assert row["verdict"] == items.NOT_REPRODUCED


def test_the_baseline_arm_is_fifty_by_definition():
    base = np.random.default_rng(0).uniform(0.5, 0.9, PROMPTS)
    results = {("dpo", s): {"policy": "policy/dpo-00000000"} for s in (0, 1)}
    results |= {("mallows", s): run(base, advantage=0.3) for s in (0, 1)}
    rows = [claim(), claim(metric="reward_advantage"), claim(arm="dpo", than="mallows")]
    item = items.collect_item(spec(*rows, against="dpo"), results)
    summary = item["arms"]["dpo"]["summary"]
    assert (summary["win_rate"]["mean"], summary["win_rate"]["low"]) == (50.0, None)
    assert summary["reward_advantage"]["mean"] == 0.0
    assert summary["avg_tokens"]["mean"] == 8.0
    assert item["expect"][0]["difference"]["mean"] == pytest.approx(100 * base.mean() - 50)
    assert item["expect"][1]["difference"]["mean"] == pytest.approx(0.3)
    assert item["expect"][2]["difference"]["mean"] == pytest.approx(50 - 100 * base.mean())
    assert verdicts(item) == [items.DIRECTION_ONLY, items.DIRECTION_ONLY, items.NOT_REPRODUCED]
    assert item["verdict"] == items.NOT_REPRODUCED


def test_reference_and_numbers_can_be_what_an_arm_is_above():
    results = {(arm, 0): run(np.full(PROMPTS, 0.6)) for arm in ("dpo", "mallows")}
    item = items.collect_item(spec(claim(than="reference"), claim(than=55.0), claim(than=65), seeds=(0,)), results)
    means = [row["difference"]["mean"] for row in item["expect"]]
    assert means == pytest.approx([60 - 50, 60 - 55, 60 - 65])
    assert verdicts(item) == [items.DIRECTION_ONLY, items.DIRECTION_ONLY, items.NOT_REPRODUCED]


def test_arms_that_did_not_run_are_told_and_decide_the_item():
    results = {("dpo", 0): run(np.full(PROMPTS, 0.6))}
    item = items.collect_item(spec(claim(arm="dpo", than=50), claim()), results)
    assert verdicts(item) == [items.DIRECTION_ONLY, items.NOT_RUN]
    assert item["verdict"] == items.NOT_RUN
    assert "mallows" in item["expect"][1]["reason"]
    assert item["arms"]["mallows"]["summary"] == {}
    other_seed = {("dpo", 0): run(np.full(PROMPTS, 0.6)), ("mallows", 1): run(np.full(PROMPTS, 0.7))}
    assert items.collect_item(spec(claim()), other_seed)["expect"][0]["reason"] == "the two arms share no seed"


def test_no_rows_no_verdict():
    item = items.collect_item(spec(), {("dpo", 0): run(np.full(PROMPTS, 0.6))})
    assert item["verdict"] == items.NO_CLAIM


def test_repeated_and_disjoint_prompts_are_refused():
    twice = run(np.full(4, 0.5))
    twice["prompts"].loc[1, "prompt_id"] = 0
    with pytest.raises(FailedCheck, match="'dpo', seed 0: prompt_id 0 stands"):
        items.collect_item(spec(seeds=(0,)), {("dpo", 0): twice})
    apart = run(np.full(4, 0.5))
    apart["prompts"]["prompt_id"] += 100
    with pytest.raises(FailedCheck, match="no prompt was judged in all of"):
        items.collect_item(spec(claim(), seeds=(0,)), {("dpo", 0): run(np.full(4, 0.5)), ("mallows", 0): apart})


def test_item_is_json_and_the_same_every_time():
    rng = np.random.default_rng(0)
    results = {(arm, s): run(rng.uniform(0, 1, PROMPTS)) for arm in ("dpo", "mallows") for s in (0, 1)}
    first, second = (items.collect_item(spec(claim()), results) for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)


def test_tables_show_intervals_and_escape_pipes():
    results = {("dpo", s): {"policy": "policy/dpo-00000000"} for s in (0, 1)}
    results |= {("mallows", s): run(np.full(PROMPTS, 0.6)) for s in (0, 1)}
    item = items.collect_item(spec(claim() | {"claim": "a|b"}, against="dpo"), results)
    frame = items.table(item)
    assert list(frame["win rate %"]) == ["50.0", "60.0 [60.0, 60.0]"]
    assert list(frame["arm"]) == ["dpo (baseline)", "mallows"]
    assert list(frame["tokens"]) == ["8.0", "10.0 [10.0, 10.0]"]
    text = items.markdown(item)
    assert "a\\|b" in text
    assert "| mallows | mallows | 2 | 60.0 [60.0, 60.0] |" in text
