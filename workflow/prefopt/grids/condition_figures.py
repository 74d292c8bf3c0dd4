"""Figures of grid items over conditions: advantage, selected settings, matched members and log ratios in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from prefopt.figures import COLOURS, INK, drawing
from prefopt.grids.drawing import (
    SMALL,
    WIDTH,
    Item,
    arm_label,
    axes_grid,
    chosen_point,
    condition_label,
    course,
    folded,
    legend,
    legend_height,
    look,
    main_set,
    neutral,
    points_of,
    series,
    short_number,
    symbol,
    tidy,
    value,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = 4  # small panels in a row
_MOST_PANELS = 12
_START, _END = 0.1, 0.9  # fractions of training before and after which members count as start and end
_CHOSEN = {"color": COLOURS[0], "linestyle": "-", "marker": ""}
_REJECTED = {"color": COLOURS[1], "linestyle": "--", "marker": ""}


def by_condition(item: Item) -> dict[str, str]:
    """Reward advantage over the conditions with one line per arm, controls below; then what is behind it."""
    return {"by_condition": _advantage(item), **_selected(item), **_members(item), **_collapse(item)}


def places_of(item: Item) -> list[float]:
    """Where the conditions stand along x: their values, or their numbers where one has no value of its own."""
    values = [entry["value"] for entry in item["conditions"].values()]
    known = all(v is not None for v in values) and len(set(values)) == len(values)
    return [float(v) for v in values] if known else [float(n) for n in range(len(values))]


def _advantage(item: Item) -> str:
    """Distillation, figure 2: reward advantage of the selected points, a panel for arms and one for controls."""
    groups = {
        title: [arm for arm, entry in item["arms"].items() if entry["control"] == control and points_of(item, arm)]
        for title, control in (("", False), ("controls; grey: the arms above", True))
    }
    groups = {title: arms for title, arms in groups.items() if arms}
    numbers = {arm: n for arms in groups.values() for n, arm in enumerate(arms)}
    heights = [legend_height([(arm_label(item, arm), None) for arm in arms]) for arms in groups.values()]
    with drawing(WIDTH, 0.3 + sum(2.8 + height for height in heights)) as canvas:
        # Limits are shared by hand: axes of two subfigures cannot share them.
        parts = canvas.figure.subfigures(max(len(groups), 1), 1, squeeze=False, height_ratios=_ratios(heights))
        panels: list[Axes] = []
        for part, (title, arms) in zip(parts.flat, groups.items(), strict=False):
            panel = part.subplots()
            panels.append(panel)
            neutral(panel, 0.0)
            if title:
                _behind(panel, item, groups.get("", []))
            looks = []
            for arm in arms:
                style = look(numbers[arm]) | ({"linestyle": "--"} if title else {})
                _over_conditions(panel, item, arm, style, (numbers[arm], len(arms)))
                looks.append((arm_label(item, arm), style))
            _condition_axis(panel, item)
            panel.set_title(title)
            panel.set_ylabel("reward advantage over SFT")
            tidy(panel)
            legend(part, looks)
        limits = [limit for panel in panels for limit in panel.get_ylim()]
        for panel in panels:
            panel.set_ylim(min(limits), max(limits))
    return canvas.svg


def _ratios(heights: Sequence[float]) -> list[float]:
    return [2.8 + height for height in heights] or [1.0]


def _over_conditions(panel: Axes, item: Item, arm: str, style: dict[str, Any], place: tuple[int, int]) -> None:
    """One arm's line; ``place``: its number among how many, which moves it aside so that intervals do not overlap."""
    places = places_of(item)
    step = min((b - a for a, b in pairwise(sorted(places))), default=1.0)
    aside = 0.5 * step * ((place[0] + 0.5) / place[1] - 0.5)
    points = [chosen_point(item, arm, condition) for condition in item["conditions"]]
    estimates = [value(point, main_set(item), "advantage") for point in points]
    series(panel, [x + aside for x in places], estimates, style | {"size": 4.5})


def _behind(panel: Axes, item: Item, arms: Sequence[str]) -> None:
    """The means of other arms as thin lines of the page's colour."""
    for arm in arms:
        points = [chosen_point(item, arm, condition) for condition in item["conditions"]]
        found = [(x, value(p, main_set(item), "advantage")) for x, p in zip(places_of(item), points, strict=True)]
        panel.plot([x for x, e in found if e], [e["mean"] for _, e in found if e], color=INK, linewidth=0.8, alpha=0.5)


def _condition_axis(panel: Axes, item: Item, short: bool = False) -> None:
    """One tick per condition: its label, or in a small panel its value."""
    labels = [condition_label(item, condition) for condition in item["conditions"]]
    if short:
        values = [entry["value"] for entry in item["conditions"].values()]
        labels = [label if v is None else short_number(v) for label, v in zip(labels, values, strict=True)]
    panel.xaxis.set_major_locator(FixedLocator(places_of(item)))
    panel.xaxis.set_major_formatter(FixedFormatter(labels))
    panel.tick_params(axis="x", labelsize=SMALL)


def _varied(item: Item) -> list[tuple[str, str]]:
    """(arm, setting) of every numeric setting that an arm varies; settings in the order of the points."""
    found: dict[tuple[str, str], set[Any]] = {}
    for point in item["points"]:
        for key, held in point["settings"].items():
            if isinstance(held, int | float) and held > 0:
                found.setdefault((key, point["arm"]), set()).add(held)
    settings = list(dict.fromkeys(key for key, _ in found))
    return [(arm, key) for key in settings for arm in item["arms"] if len(found.get((key, arm), ())) > 1]


def _selected(item: Item) -> dict[str, str]:
    """Which setting the validation selects, one small panel per arm, logarithmic; grey lines: the values tried."""
    varied = _varied(item)
    if not varied or not any(point["selected"] for point in item["points"]):
        return {}
    rows = -(-len(varied) // _PANELS)
    with drawing(WIDTH, 0.3 + 1.45 * rows) as canvas:
        panels = axes_grid(canvas.figure, len(varied), _PANELS)
        for n, (panel, (arm, key)) in enumerate(zip(panels, varied, strict=True)):
            _selected_panel(panel, item, arm, key)
            tried = sorted({level for other, k in varied if k == key for level in _tried(item, other, key)})
            panel.set_ylim(tried[0] / 1.6, tried[-1] * 1.6)
            panel.yaxis.set_major_locator(FixedLocator(tried))
            panel.yaxis.set_major_formatter(FixedFormatter([f"{level:g}" for level in tried]))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.tick_params(axis="y", labelsize=SMALL)
            if n % _PANELS == 0 or varied[n - 1][1] != key:
                panel.set_ylabel(f"selected {symbol(key)}", fontsize=SMALL)
    return {"selected": canvas.svg}


def _tried(item: Item, arm: str, key: str) -> set[float]:
    """The values of a setting that an arm was tried with."""
    return {p["settings"][key] for p in points_of(item, arm) if key in p["settings"]}


def _selected_panel(panel: Axes, item: Item, arm: str, key: str) -> None:
    """One arm's selected values of one setting over the conditions, on grey lines at the values it was tried with."""
    for level in _tried(item, arm, key):
        panel.axhline(level, color=INK, linewidth=0.6, alpha=0.35)
    where = zip(places_of(item), item["conditions"], strict=True)
    chosen = [(x, p["settings"][key]) for x, c in where if (p := chosen_point(item, arm, c)) and p["selected"]]
    if chosen:
        panel.plot(*zip(*chosen, strict=True), "o-", color=COLOURS[0], markersize=4, linewidth=1.2)
    panel.set_yscale("log")
    panel.set_title(folded(arm_label(item, arm), 17), fontsize=SMALL)
    _condition_axis(panel, item, short=True)


def _members(item: Item) -> dict[str, str]:
    """Per arm that matches members of an ensemble, the share of pairs of each member at the start and at the end."""
    drawn = {}
    for arm in item["arms"]:
        shares = {
            condition: rows
            for condition in item["conditions"]
            if (point := chosen_point(item, arm, condition)) and (rows := point["curve"].get("members"))
        }
        if shares:
            drawn[f"members_{arm}"] = _members_figure(item, arm, shares)
    return {"members" if len(drawn) == 1 else name: svg for name, svg in drawn.items()}


def _members_figure(item: Item, arm: str, shares: dict[str, list[list[float]]]) -> str:
    looks: list[tuple[str, Mapping[str, Any]]] = [
        ("first tenth of training", {"color": COLOURS[4], "linestyle": "-", "linewidth": 6}),
        ("last tenth", {"color": COLOURS[1], "linestyle": "-", "linewidth": 6}),
        ("the data's own value", {"color": INK, "linestyle": (0, (2, 2))}),
    ]
    bias = item["arms"][arm].get("member_bias")
    rows = -(-len(shares) // _PANELS)
    with drawing(WIDTH, 0.5 + 1.5 * rows + legend_height(looks)) as canvas:
        axes = axes_grid(canvas.figure, len(shares), _PANELS, sharey=True)
        for panel, (condition, curve) in zip(axes, shares.items(), strict=True):
            labels = [short_number(b) for b in bias] if bias else [str(k) for k in range(len(curve[0]) - 1)]
            for offset, part, (_, style) in zip((-0.2, 0.2), _both_ends(curve), looks, strict=False):
                panel.bar([k + offset for k in range(len(part))], part, 0.38, color=style["color"])
            here = item["conditions"][condition]["value"]
            if bias and here is not None and min(bias) <= here <= max(bias):
                panel.axvline(_between(here, bias), color=INK, linewidth=1.0, linestyle=(0, (2, 2)))
            panel.set_xticks(range(len(labels)), labels, fontsize=SMALL)
            panel.tick_params(axis="y", labelsize=SMALL)
            panel.set_title(folded(condition_label(item, condition), 17), fontsize=SMALL)
            panel.set_ylim(bottom=0.0)
            tidy(panel)
        canvas.figure.supxlabel("member's bias b" if bias else "member", fontsize=SMALL)
        canvas.figure.supylabel(f"share of pairs, {arm_label(item, arm)}", fontsize=SMALL)
        legend(canvas.figure, looks, "upper")
    return canvas.svg


def _both_ends(curve: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean share of every member in the first and in the last tenth of training; at least one row each."""
    ends = (
        [row for row in curve if row[0] <= _START] or [curve[0]],
        [row for row in curve if row[0] >= _END] or [curve[-1]],
    )
    first, last = ([math.fsum(column) / len(rows) for column in list(zip(*rows, strict=True))[1:]] for rows in ends)
    return first, last


def _between(here: float, bias: Sequence[float]) -> float:
    """Place of a bias among the members' bars, linear between the two neighbours in their order."""
    for k, (a, b) in enumerate(pairwise(bias)):
        if a != b and min(a, b) <= here <= max(a, b):
            return k + (here - a) / (b - a)
    return float(bias.index(here)) if here in bias else 0.0


def _collapse(item: Item) -> dict[str, str]:
    """Chosen and rejected log ratio in training, a panel per arm and condition; of many, the first condition only."""
    conditions = list(item["conditions"])
    arms = [arm for arm in item["arms"] if any("chosen_log_ratio" in p["curve"] for p in points_of(item, arm))]
    if not arms:
        return {}
    shown = conditions if len(conditions) * len(arms) <= _MOST_PANELS else conditions[:1]
    panels = [
        (arm, condition, point["curve"])
        for condition in shown
        for arm in arms
        if (point := chosen_point(item, arm, condition)) and "chosen_log_ratio" in point["curve"]
    ]
    looks = [("chosen", _CHOSEN), ("rejected", _REJECTED)]
    columns = min(3, len(panels))
    with drawing(WIDTH, 0.4 + 1.6 * -(-len(panels) // columns) + legend_height(looks)) as canvas:
        axes = axes_grid(canvas.figure, len(panels), columns, sharex=True, sharey=True)
        for panel, (arm, condition, curve) in zip(axes, panels, strict=True):
            neutral(panel, 0.0)
            course(panel, curve["chosen_log_ratio"], _CHOSEN)
            course(panel, curve.get("rejected_log_ratio", []), _REJECTED)
            title = (
                f"{arm_label(item, arm)}, {condition_label(item, condition)}"
                if len(shown) > 1
                else arm_label(item, arm)
            )
            panel.set_title(folded(title, 26), fontsize=SMALL)
            panel.set_xticks([0.0, 0.5, 1.0], ["0", ".5", "1"])
            panel.tick_params(labelsize=SMALL)
            tidy(panel)
        here = f"; {condition_label(item, shown[0])}" if len(conditions) > 1 == len(shown) else ""
        canvas.figure.supxlabel(f"fraction of training{here}", fontsize=SMALL)
        canvas.figure.supylabel("log policy − log reference (nats)", fontsize=SMALL)
        legend(canvas.figure, looks, "upper")
    return {"collapse": canvas.svg}
