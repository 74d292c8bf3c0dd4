"""Figures of grid items: every arm and interval is in them, absent runs are left out, the same bytes every time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

import fake_grids
from prefopt.grids import comparison_figures, condition_figures, drawing
from prefopt.grids.figures import grid_figures

SVG = "{http://www.w3.org/2000/svg}"
LAYOUTS = ("bars", "frontier", "gains", "by_condition", "histogram", "ranking")
WITH_ARMS = tuple(layout for layout in LAYOUTS if layout != "histogram")


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


def main_figure(item) -> str:
    """The main figure alone: without curves nothing else is drawn."""
    for point in item["points"]:
        point["curve"] = {}
    return grid_figures(item)[item["layout"]]


def intervals(svg: str) -> int:
    """Whiskers (one path each) and bands (one each) of a figure."""
    groups = [node for node in ET.fromstring(svg).iter(f"{SVG}g") if node.get("id", "").startswith("interval-")]
    return sum(len(list(node.iter(f"{SVG}path"))) for node in groups)


@pytest.fixture(scope="module")
def drawn():
    return {layout: grid_figures(fake_grids.item(layout)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_figure_is_first_and_curves_are_last(drawn, layout):
    names = list(drawn[layout])
    assert names[0] == layout
    assert (names[-1] == "curves") == (layout != "histogram")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_item_same_bytes_without_background(drawn, layout):
    assert grid_figures(fake_grids.item(layout)) == drawn[layout]
    for svg in drawn[layout].values():
        assert "#ffffff" not in svg
        assert "#000000" not in svg
        assert "dc:date" not in svg


@pytest.mark.parametrize("layout", WITH_ARMS)
def test_every_arm_is_named_in_the_main_figure(drawn, layout):
    words = " ".join(texts(drawn[layout][layout]))
    assert all(label in words for label in ("DPO", "Mallows θ", "shuffled"))


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ("bars", 2 * 2 * 2),  # plug-ins x betas x sets; the base's own win rate is no bar
        ("gains", 2 * 2 * 3),  # plug-ins x betas x (base, plug-in, difference)
        ("by_condition", 3 * 2),  # arms and controls x conditions
        ("ranking", 3 * 2),  # selected points x (advantage, KL)
        ("frontier", 3 * 3 * 2),  # arms x fractions x panels; the crosses' other bars are lines
    ],
)
def test_every_estimate_has_its_interval(drawn, layout, count):
    assert intervals(drawn[layout][layout]) == count


@pytest.mark.parametrize("layout", WITH_ARMS)
def test_estimates_without_limits_have_a_mark_and_no_interval(layout):
    item = fake_grids.item(layout)
    for held in [*item["points"], *item.get("frontier", [])]:
        for measured in [held, *held.get("sets", {}).values()]:
            for key in [key for key, held in measured.items() if isinstance(held, dict) and "mean" in held]:
                measured[key] = measured[key] | {"low": None, "high": None}
    svg = main_figure(item)
    assert intervals(svg) == 0
    assert "Mallows θ" in " ".join(texts(svg))


@pytest.mark.parametrize("layout", WITH_ARMS)
def test_points_that_were_not_run_are_left_out(layout):
    item = fake_grids.item(layout, frontier=[])
    for point in item["points"]:
        point |= {"sets": {}, "curve": {}, "selected": False}
    found = grid_figures(item)
    assert "curves" not in found
    assert intervals(found[layout]) == 0


def test_bars_say_whom_they_are_against_and_name_sets_and_betas(drawn):
    words = texts(drawn["bars"]["bars"])
    assert "against DPO" in words
    assert {"near", "far", "β 0.1", "β 0.5"} <= set(words)
    assert "lr 0.001" not in " ".join(words)  # the same in all points


def test_frontier_shows_the_metric_of_its_claims():
    item = fake_grids.item("frontier")
    assert "share of positive sentiment" in texts(main_figure(item))
    item["expect"] = [fake_grids.claim(kind="frontier", metric="reward")]
    assert "reward" in texts(main_figure(item))


def test_gains_use_the_paired_difference_where_the_item_has_it():
    item = fake_grids.item("gains")
    assert "difference, unpaired" in texts(main_figure(item))
    for point in item["points"]:
        point["sets"]["test"]["difference"] = fake_grids.estimate(0.1)
    assert "difference, paired" in texts(main_figure(item))


def test_unpaired_half_widths_add_in_squares():
    one, other = fake_grids.estimate(1.0, 0.3), fake_grids.estimate(0.5, 0.4)
    found = comparison_figures._unpaired(one, other)
    assert found == pytest.approx({"mean": 0.5, "low": 0.5 - 0.5, "high": 0.5 + 0.5})  # 0.3² + 0.4² = 0.5²
    assert comparison_figures._unpaired(one, None) is None
    assert comparison_figures._unpaired(one, fake_grids.estimate(0.5, None))["low"] is None


def test_a_plug_in_is_set_beside_the_base_with_the_settings_that_both_have():
    base = [fake_grids.point("dpo", "c", {"beta": beta}, False, []) for beta in (0.1, 0.5)]
    assert comparison_figures._same_settings(base, {"beta": 0.5, "gamma": 2.0}) is base[1]
    assert comparison_figures._same_settings(base, {"beta": 0.3}) is None


def test_an_arm_against_itself_is_no_plug_in():
    item = fake_grids.item("gains")
    item["arms"]["dpo"]["against"] = "dpo"
    assert comparison_figures.plug_ins(item) == {"theta": "dpo", "shuffled": "dpo"}


def test_by_condition_has_the_figures_behind_it(drawn):
    assert list(drawn["by_condition"]) == ["by_condition", "selected", "members", "collapse", "curves"]
    words = texts(drawn["by_condition"]["selected"])
    assert words.count("0.1") == words.count("0.5") == 3  # the values tried, on the axis of each arm's panel
    assert {"DPO", "Mallows θ", "shuffled", ".25", ".75"} <= set(words)
    assert {"0", ".5", "1", "member's bias b"} <= set(texts(drawn["by_condition"]["members"]))


def test_members_of_several_arms_have_a_figure_each():
    item = fake_grids.item("by_condition")
    for point in item["points"]:
        point["curve"] = {"members": [[0.5, 0.25, 0.75]]}
    assert [name for name in grid_figures(item) if name.startswith("members")] == [
        "members_dpo",
        "members_theta",
        "members_shuffled",
    ]


def test_members_at_both_ends_are_means_over_a_tenth_of_training():
    curve = [[0.02, 0.9, 0.1], [0.08, 0.7, 0.3], [0.5, 0.5, 0.5], [0.95, 0.25, 0.75]]
    start, end = condition_figures._both_ends(curve)
    assert start == pytest.approx([(0.9 + 0.7) / 2, (0.1 + 0.3) / 2])
    assert end == [0.25, 0.75]
    assert condition_figures._both_ends([[0.5, 0.4, 0.6]]) == ([0.4, 0.6], [0.4, 0.6])  # the only row is both


def test_a_conditions_value_lies_between_its_neighbouring_members():
    assert condition_figures._between(0.35, [0.2, 0.3, 0.4]) == pytest.approx(1.5)
    assert condition_figures._between(0.8, [0.8, 0.5, 0.2]) == 0.0  # in falling order too
    assert condition_figures._between(0.5, [0.5]) == 0.0


def test_conditions_stand_at_their_values_or_in_a_row():
    item = fake_grids.item("by_condition")
    assert condition_figures.places_of(item) == [0.25, 0.75]
    item["conditions"]["c1"]["value"] = None
    assert condition_figures.places_of(item) == [0.0, 1.0]


def test_collapse_shows_the_first_condition_only_where_panels_would_be_too_many(drawn):
    words = texts(drawn["by_condition"]["collapse"])
    assert {"DPO, condition 0", "DPO, condition 1"} <= set(words)  # 3 arms x 2 conditions
    item = fake_grids.item("by_condition")
    for point in item["points"]:
        point["curve"].pop("members", None)
    item["conditions"] |= {f"c{n}": {"value": n / 10, "label": f"condition {n}"} for n in range(2, 7)}
    words = texts(grid_figures(item)["collapse"])
    assert "DPO" in words
    assert "fraction of training; condition 0" in words


def test_ranking_puts_the_best_first():
    item = fake_grids.item("ranking")
    for point, mean in zip([p for p in item["points"] if p["selected"]], (0.1, 0.9, 0.5), strict=True):
        point["sets"]["test"]["advantage"] = fake_grids.estimate(mean)
    labels = [text.split(",")[0] for text in texts(main_figure(item))]
    places = [labels.index(label) for label in ("Mallows θ", "shuffled", "DPO")]
    assert places == sorted(places)


def test_histogram_names_conditions_kinds_and_what_is_known_of_the_weights(drawn):
    words = texts(drawn["histogram"]["histogram"])
    assert {"data narrow", "data wide", "closed prompts", "open prompts", "φ* 0.29", "sd 0.25"} <= set(words)
    assert not any("skewness" in word for word in words)  # None: too few prompts to have one


@pytest.mark.parametrize("layout", WITH_ARMS)
def test_dozens_of_arms_are_all_named(layout):
    item = fake_grids.item(layout)
    extra = {f"x{n}": fake_grids.arm(f"arm number {n}", "dpo", control=n % 2 == 1) for n in range(30)}
    item["arms"] |= extra
    item["points"] += [
        fake_grids.point(name, "c0", {"beta": 0.1, "learning_rate": 0.001}, False, item["sets"]) for name in extra
    ]
    if layout == "frontier":
        item["frontier"] += [entry | {"arm": name} for name in extra for entry in item["frontier"][:3]]
    words = "|".join(texts(main_figure(item))) + "|"
    assert [n for n in range(30) if not re.search(rf"arm number {n}[|,:]", words)] == []


def test_arms_differ_in_look_up_to_42():
    looks = {tuple(sorted((k, str(v)) for k, v in drawing.look(n).items() if k != "linestyle")) for n in range(42)}
    assert len(looks) == 42


def test_labels_from_outside_are_text_and_no_formula():
    item = fake_grids.item("ranking")
    item["arms"]["dpo"]["label"] = "$x$ <b>&\n" + "y" * 60
    svg = main_figure(item)
    assert "<b>" not in svg
    label = next(text for text in texts(svg) if text.startswith("$x$"))
    assert label.startswith("$x$ <b>& yyy")
    assert "…" in label


def test_settings_labels_keep_what_varies():
    item = fake_grids.item("ranking")
    assert drawing.settings_label(item, {"beta": 0.5, "learning_rate": 0.001}) == "β 0.5"
    item["points"] = item["points"][:1]
    assert drawing.settings_label(item, {"beta": 0.1, "learning_rate": 0.001}) == "β 0.1, lr 0.001"


def test_the_set_of_selection_is_not_shown_unless_it_is_the_only_one():
    item = fake_grids.item("gains")
    assert drawing.shown_sets(item) == ["test"]
    assert drawing.shown_sets(item | {"sets": ["validation"]}) == ["validation"]


def test_short_numbers_as_the_papers_print_them():
    assert [drawing.short_number(x) for x in (0.25, 1.0, 10.0, 0.0, -0.5)] == [".25", "1", "10", "0", "-.5"]
