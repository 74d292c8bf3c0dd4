"""Claims checked against their grid before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from grid_items import arm, claim, grid, point
from prefopt.errors import BadInput
from prefopt.grids.check import check_claims

CONDITIONS = {name: {"value": value, "label": name} for name, value in (("c", 0.2), ("d", 0.8), ("e", None))}
POINTS = [point("a", c, beta=b) for c in ("c", "d") for b in (0.1, 0.5)] + [
    point("b", "c", beta=0.1),
    point("b", "d", beta=0.1),
    point("only_e", "e", beta=0.1),
]
ARMS = {"a": arm(member_bias=[0.2, 0.8]), "b": arm(), "only_e": arm()}
SELECT = {"set": "test", "metric": "reward"}


def spec(row, **more):
    return grid(POINTS, [row], conditions=CONDITIONS, arms=ARMS, **({"select": SELECT, "at": [0.5, 1.0]} | more))


def trend(quantity="selected.beta", **more):
    row = {"kind": "trend", "claim": "c", "quantity": quantity, "arm": "a", "than": None, "set": "test"}
    return row | {"sign": "falls"} | more


def frontier(**more):
    return claim("a", "b", kind="frontier", part="all") | more


def weights(**more):
    row = {"kind": "weights", "claim": "c", "quantity": "sd", "condition": "c", "than": "d", "sign": "above"}
    return row | more


@pytest.mark.parametrize(
    "row",
    [
        claim("a", "b"),
        claim("a", "reference", conditions=["d"]),
        claim("a", 0.5, arm_at={"beta": 0.5}),
        claim("a", "b", arm_at="all", than_at="all"),
        claim("a", "b", sign="equal", margin=0.1),
        frontier(),
        trend(),
        trend("member_bias"),
        trend("gap", than="b"),
        trend("gap", than="reference"),
    ],
)
def test_claims_that_the_grid_can_answer(row):
    check_claims(spec(row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (claim("aa", "b"), r"claim 'c': no arm 'aa'; did you mean 'a'\?"),
        (claim("a", "referense"), r"no arm 'referense'; did you mean 'reference'\?"),
        (claim("a", "b", set="tset"), "no set 'tset'"),
        (claim("a", "b", conditions=["x"]), "no condition 'x'; known: c, d, e"),
        (claim("a", "b", conditions=["e"]), "a and b do not both run in the condition 'e'"),
        (claim("a", "only_e"), "a and only_e share no condition"),
        (claim("a", "b", arm_at={"bet": 0.1}), r"no setting of a 'bet'; did you mean 'beta'\?"),
        (claim("a", "b", than_at={"beta": 0.5}), "b has no point in c with beta 0.5"),
        (claim("a", "b", sign="equal", margin=None), "sign 'equal' needs a margin above 0"),
        (frontier(than="reference"), "no arm with a training curve 'reference'"),
        (frontier(arm_at={"beta": 3.0}), "a has no point in c with beta 3.0"),
        (trend("selected.bet"), r"no setting of a 'bet'"),
        (trend("gap"), "'gap' needs a 'than'"),
        (trend("member_bias", than="b"), "no other quantity takes one"),
        (trend("member_bias", arm="b"), "b chooses no members of known bias"),
        (trend(arm="only_e"), "needs two conditions with different values; only_e has 0"),
        (trend(set="x"), "no set 'x'"),
        (weights(), "kind 'weights' does not go with the layout 'bars'"),
    ],
)
def test_claims_that_it_cannot_answer_are_refused_by_name(row, message):
    with pytest.raises(BadInput, match=message) as caught:
        check_claims(spec(row))
    assert "claim 'c'" in str(caught.value)


def test_several_points_need_a_selection_or_a_place():
    with pytest.raises(BadInput, match="a has 2 points in c and nothing selects one; give arm_at or declare"):
        check_claims(spec(claim("a", "b"), select=None))
    with pytest.raises(BadInput, match="give than_at"):
        check_claims(spec(claim("b", "a"), select=None))
    check_claims(spec(claim("a", "b", arm_at={"beta": 0.1}), select=None))
    with pytest.raises(BadInput, match="a has 2 points in c and nothing selects"):
        check_claims(spec(trend("gap", than="b"), select=None))
    with pytest.raises(BadInput, match="nothing is selected in this grid"):
        check_claims(spec(trend(arm="b"), select=None))


def test_a_frontier_needs_answers_along_the_run():
    with pytest.raises(BadInput, match="two or more fractions"):
        check_claims(spec(frontier(), at=[1.0]))


def test_a_logarithm_needs_positive_numbers():
    zero = spec(trend())
    zero["grid"]["points"] = [point("a", c, beta=0.0) for c in ("c", "d")]
    with pytest.raises(BadInput, match=r"'beta' is 0\.0; the trend of its logarithm"):
        check_claims(zero)


def test_claims_about_weights():
    histogram = {"tier": "quick", "layout": "histogram", "conditions": CONDITIONS}
    for row in (weights(), weights(than=0.5)):
        check_claims({"grid": histogram, "expect": [row]})
    for row, message in (
        (weights(condition="x"), "no condition 'x'"),
        (weights(than="x"), "no condition 'x'"),
        (claim("a", "b"), "kind 'compare' does not go with the layout 'histogram'"),
    ):
        with pytest.raises(BadInput, match=message):
            check_claims({"grid": histogram, "expect": [row]})


def test_checking_imports_neither_numpy_nor_pandas_nor_torch():
    words = "import sys, prefopt.grids.check; print({'numpy', 'pandas', 'torch', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "set()\n"
