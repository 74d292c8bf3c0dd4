"""Exact items: registry, declarations, plan, verdicts, and the studies of the reward-distillation paper."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from pydantic import Field

from prefopt.errors import BadInput, FailedCheck
from prefopt.evaluation import exact
from prefopt.figures import svg_text
from prefopt.plan import load_plan
from prefopt.planning.config import load_item, parse
from prefopt.specs import ExactItemSpec
from prefopt.studies import STUDIES, Study, StudyResult, get_study, registry, study

SVG = "<svg></svg>"
NUMBER = {"claim": "a number", "value": "x", "reported": 2.0, "tolerance": 0.25, "source": "table 1"}
ORDER = {"claim": "an order", "value": "x", "above": "y", "source": "table 2"}
ITEM = {
    "item": {"paper": "own", "name": "e", "title": "t", "scale": "exact"},
    "study": {"name": "distillation_recovery", "beta": 0.5},
    "expect": [NUMBER],
}


def example(
    *,
    beta: Annotated[float, Field(gt=0.0)],
    exponents: list[int] = [1, 2],  # noqa: B006
    kind: Literal["left", "right"] = "left",
) -> StudyResult:
    """A study for the tests."""
    return StudyResult({"x": beta * sum(exponents)}, {}, {"figure": SVG})


EXAMPLE = Study("example", example, "a study for the tests", 1)


# --- registry -------------------------------------------------------------------------------------------------------


def test_parameters_get_their_defaults():
    assert EXAMPLE.check_params({"beta": 2}) == {"beta": 2.0, "exponents": [1, 2], "kind": "left"}
    assert EXAMPLE.run({"beta": 2.0, "exponents": [5]}).values == {"x": 10.0}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"bta": 1.0}, "study 'example': unknown key 'bta'; did you mean 'beta'?"),
        ({}, "study 'example': the key 'beta' is missing"),
        ({"beta": 0.0}, "study 'example': beta: input should be greater than 0, found 0.0"),
        ({"beta": "1"}, "study 'example': beta: input should be a valid number, found '1'"),
        ({"beta": 1.0, "exponents": [1, 2.5]}, "exponents.1: input should be a valid integer"),
        ({"beta": 1.0, "kind": "lft"}, "kind: unknown value 'lft'; did you mean 'left'?"),
    ],
)
def test_wrong_parameters_are_one_line_with_a_way_out(params, expected):
    with pytest.raises(BadInput) as caught:
        EXAMPLE.check_params(params)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_studies_point_to_the_nearest():
    with pytest.raises(BadInput, match="unknown study 'dpo_degenracy'; did you mean 'dpo_degeneracy'"):
        get_study("dpo_degenracy")


def test_a_name_is_registered_once_and_parameters_are_keyword_only():
    def positional(beta: float) -> StudyResult: ...

    with pytest.raises(ValueError, match="name taken"):
        study("dpo_degeneracy", "again")(example)
    with pytest.raises(ValueError, match="keyword-only"):
        study("positional", "wrong")(positional)
    assert "positional" not in STUDIES


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (StudyResult({"x": math.nan}, figures={"a": SVG}), "the value 'x' is nan"),
        (StudyResult({"x": math.inf}, figures={"a": SVG}), "the value 'x' is inf"),
        (StudyResult({"x": 1.0}), "no figure"),
        (StudyResult({"x": 1.0}, figures={"../a": SVG}), "is no file name"),
        (StudyResult({"x": 1.0}, {"A b": pd.DataFrame()}, {"a": SVG}), "is no file name"),
    ],
)
def test_results_that_cannot_be_written_are_refused(result, expected):
    with pytest.raises(FailedCheck, match=f"study 's': .*{expected}"):
        result.check("s")


def test_figures_may_be_drawn_or_given_as_text():
    figure = Figure()
    figure.subplots().plot([1, 2])
    assert svg_text(figure) == svg_text(figure)
    assert "<svg" in svg_text(figure)
    assert svg_text(SVG) == SVG


# --- declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"expect": [{**NUMBER, "tolerence": 1}]}, "unknown key 'expect.0.tolerence'; did you mean 'tolerance'"),
        (
            {"expect": [{k: v for k, v in NUMBER.items() if k != "tolerance"}]},
            "the key 'expect.0.tolerance' is missing",
        ),
        ({"expect": [{**NUMBER, "tolerance": -1.0}]}, "expect.0.tolerance: input should be greater than or equal to 0"),
        ({"expect": [{**NUMBER, "reported": "2"}]}, "expect.0.reported: input should be a valid number"),
        ({"expect": [{**ORDER, "intrval": ["a", "b"]}]}, "unknown key 'expect.0.intrval'; did you mean 'interval'"),
        ({"expect": [{**ORDER, "interval": ["a"]}]}, "expect.0.interval: list should have at least 2 items"),
        ({"arms": {}}, "unknown key 'arms'"),
        ({"item": {**ITEM["item"], "scale": "demo"}}, "item.scale: unknown value 'demo'"),
        ({"study": {"beta": 0.5}}, "the key 'study.name' is missing"),
    ],
)
def test_every_mistake_in_an_exact_item_is_one_line(changes, expected):
    with pytest.raises(BadInput) as caught:
        parse(ExactItemSpec, {**ITEM, **changes}, "f.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def declared(folder, content):
    path = folder / "config" / "experiments" / "own" / "e.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump({"items": ["*/*"]}))
    return path


def test_a_misspelt_study_is_told_as_that(tmp_path):
    content = {"stduy" if key == "study" else key: value for key, value in ITEM.items()}
    with pytest.raises(BadInput, match="unknown key 'stduy'; did you mean 'study'"):
        load_item(declared(tmp_path, content))


# --- plan -----------------------------------------------------------------------------------------------------------


def planned(folder, **changes):
    declared(folder, {**ITEM, **changes})
    plan = load_plan(folder / "config" / "config.yaml")
    (item,) = plan.items.values()
    return item, plan.node(item.parents["study"])


def test_an_exact_item_is_one_study_and_one_item(tmp_path):
    item, node = planned(tmp_path)
    assert item.stage == "papers/own"
    assert node.ref.startswith("studies/distillation-recovery-")
    assert node.spec["params"]["horizon"] == 1e6  # what is not said is in the identity too
    assert item.spec["study"] == {"name": "distillation_recovery", "params": node.spec["params"]}


def test_parameters_and_version_change_the_study_and_claims_do_not(tmp_path, monkeypatch):
    _, first = planned(tmp_path)
    assert planned(tmp_path, expect=[ORDER])[1].ref == first.ref
    assert planned(tmp_path, study={"name": "distillation_recovery"})[1].ref == first.ref  # 0.5 is the default
    assert planned(tmp_path, study={"name": "distillation_recovery", "beta": 0.6})[1].ref != first.ref
    newer = replace(get_study("distillation_recovery"), version=2)
    monkeypatch.setitem(registry._studies, "distillation_recovery", newer)
    assert planned(tmp_path)[1].ref != first.ref


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"name": "distillation_recovry"}, "did you mean 'distillation_recovery'"),
        ({"name": "distillation_recovery", "btea": 1.0}, "unknown key 'btea'; did you mean 'beta'"),
        ({"name": "distillation_recovery", "beta": -1.0}, "beta: input should be greater than 0"),
    ],
)
def test_wrong_studies_are_refused_when_planning(tmp_path, params, expected):
    with pytest.raises(BadInput, match=f"e.yaml: .*{expected}"):
        planned(tmp_path, study=params)


# --- verdicts -------------------------------------------------------------------------------------------------------


def judged(row, **values):
    spec = {"item": ITEM["item"], "study": {"name": "s", "params": {}}, "expect": [row]}
    item = exact.collect_exact(spec, values, "studies/s-00000000")
    assert item["verdict"] == item["expect"][0]["verdict"]
    return item["expect"][0]


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(2.25, "reproduced"), (1.75, "reproduced"), (2.26, "not reproduced"), (1.0, "not reproduced")],
)
def test_a_number_is_compared_within_its_tolerance(value, verdict):
    row = judged(NUMBER, x=value)
    assert (row["verdict"], row["difference"]) == (verdict, pytest.approx(value - 2.0))


@pytest.mark.parametrize(
    ("row", "values", "verdict"),
    [
        (ORDER, {"x": 1.0, "y": 0.5}, "reproduced"),
        (ORDER, {"x": 0.5, "y": 0.5}, "not reproduced"),
        ({**ORDER, "above": 0.7}, {"x": 0.6}, "not reproduced"),
        ({**ORDER, "interval": ["low", "high"]}, {"x": 1.0, "y": 0.5, "low": 0.6, "high": 1.4}, "reproduced"),
        ({**ORDER, "interval": ["low", "high"]}, {"x": 1.0, "y": 0.5, "low": 0.4, "high": 1.6}, "not reproduced"),
    ],
)
def test_an_order_needs_the_value_or_its_whole_interval(row, values, verdict):
    assert judged({"interval": None, **row}, **values)["verdict"] == verdict


def test_a_value_that_the_study_does_not_have_is_named():
    with pytest.raises(BadInput, match="the study has no value 'x'; did you mean 'xx'"):
        judged(NUMBER, xx=1.0)


def test_one_failed_claim_decides_the_item_and_none_gives_no_verdict():
    spec = {"item": {**ITEM["item"], "note": ""}, "study": {"name": "s", "params": {"beta": 1}}}
    rows = [NUMBER, {**ORDER, "interval": None}]
    item = exact.collect_exact({**spec, "expect": rows}, {"x": 2.0, "y": 3.0}, "studies/s-00000000")
    assert item["verdict"] == "not reproduced"
    assert [line["claim"] for line in exact.claim_lines(item)] == ["an order", "a number"], "what fails stands first"
    assert list(exact.table(item)["verdict"]) == ["reproduced", "not reproduced"]
    assert "| a number | 2 | 2 | +0 | 0.25 | reproduced | table 1 |" in exact.markdown(item)
    assert exact.collect_exact({**spec, "expect": []}, {}, "a")["verdict"] == "no claim declared"


# --- the studies of the reward-distillation paper -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prop1_degeneracy", "theorem1_recovery", "theorem2_pessimism", "pdpo_confidence_set"])
def test_declared_items_are_reproduced(root, name):
    declaration = load_item(root / "config" / "experiments" / "reward_distillation" / f"{name}.yaml")
    result = get_study(declaration.study.name).run(declaration.study.params)
    failed = [
        (row.claim, result.values[row.value])
        for row in declaration.expect
        if exact.judge(row.model_dump(), result.values)["verdict"] != "reproduced"
    ]
    assert not failed
    assert "not available" in declaration.item.note  # nobody takes our derivations for the paper's figures


def test_rounds_on_three_responses_are_reproduced(root):
    """The item's claims, and momentum 1/2 by hand: e = 1.5, then 2.5 + .5 (2.5 - 1) = 3.25."""
    declaration = load_item(root / "config" / "experiments" / "own" / "tabular_rounds.yaml")
    found = get_study("tabular_rounds")
    values = found.run(declaration.study.params).values
    verdicts = {row.claim: exact.judge(row.model_dump(), values)["verdict"] for row in declaration.expect}
    assert set(verdicts.values()) == {"reproduced"}, verdicts
    other = found.run({"momentum": 0.5, "accelerated": 2, "rounds": 1}).values
    assert other["accelerated_exponent"] == pytest.approx(3.25)
    assert other["momentum_gap"] < 1e-12


def test_other_parameters_give_other_numbers():
    recovery = get_study("distillation_recovery")
    values = recovery.run({"beta": 2.0, "draws": 1}).values
    # pi proportional to ref exp(r / 2)
    weights = [p * math.exp(r / 2) for p, r in zip((0.1, 0.2, 0.3, 0.4), (1.0, -0.5, 0.25, 2.0), strict=True)]
    assert values["optimum_3"] == pytest.approx(weights[3] / sum(weights), abs=1e-14)
    assert values["gap_path"] < 1e-12


def test_rewards_of_another_length_are_refused():
    with pytest.raises(BadInput, match=r"4 responses, rewards of \[4, 3\]"):
        get_study("pessimistic_policy").run({"rewards": [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0]]})


def test_random_problems_follow_the_seed():
    pessimism = get_study("pessimistic_policy")
    first, again, other = (pessimism.run({"draws": 5, "seed": seed}).tables["random"]["hull"] for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert list(first) != list(other)
