"""The ranking at equal KL: order, what was not run, costs, and items that have none."""

from __future__ import annotations

import fake_grids
from prefopt.grids.matched import matched_markdown, matched_rows


def frontier(arm, mean, **more):
    found = None if mean is None else fake_grids.estimate(mean)
    return fake_grids.claim(kind="frontier", arm=arm, than="dpo", difference=found, **more)


def ranked(*claims, **more):
    return fake_grids.item("ranking", expect=list(claims), **more)


def test_arms_stand_best_first_and_those_not_run_last():
    item = ranked(frontier("shuffled", None), frontier("theta", -0.25), frontier("dpo", 0.5))
    rows = matched_rows(item, {"theta": 2.5, "dpo": 1.0})
    assert [row["arm"] for row in rows] == ["dpo", "theta", "shuffled"]
    assert [row["cpu_seconds"] for row in rows] == [1.0, 2.5, None]
    text = matched_markdown(item, rows)
    assert text.startswith("\n## At equal KL, minus DPO\n")
    lines = text.strip().splitlines()[4:]
    assert [line.split("|")[2].strip() for line in lines] == ["DPO", "Mallows θ", "shuffled"]
    assert [line.split("|")[4].strip() for line in lines] == ["1.0", "2.5", "–"]
    assert "-0.25" in lines[1].replace("−", "-")


def test_each_condition_is_ranked_on_its_own():
    conditions = {"low": {"value": 0.2, "label": "ρ = .2"}, "high": {"value": 0.5, "label": "ρ = .5"}}
    claims = [
        frontier(a, m, conditions=[c])
        for c, a, m in (("high", "theta", 9.0), ("low", "theta", 1.0), ("low", "dpo", 2.0))
    ]
    rows = matched_rows(ranked(*claims, conditions=conditions), {})
    assert [(row["conditions"], row["arm"]) for row in rows] == [
        (["low"], "dpo"),
        (["low"], "theta"),
        (["high"], "theta"),
    ]


def test_other_layouts_and_items_without_such_claims_have_no_ranking():
    assert matched_rows(ranked(fake_grids.claim()), {}) == []
    assert matched_rows(fake_grids.item("frontier", expect=[frontier("theta", 1.0)]), {}) == []
    assert matched_markdown(ranked(), []) == ""
