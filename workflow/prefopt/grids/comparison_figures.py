"""Figures of grid items that compare an arm with its base: win rates, frontiers over KL, gains of a plug-in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from prefopt.figures import COLOURS, INK, drawing
from prefopt.grids.drawing import (
    SMALL,
    WIDTH,
    Estimate,
    Item,
    Point,
    arm_label,
    axes_grid,
    condition_label,
    legend,
    legend_height,
    look,
    main_set,
    neutral,
    points_of,
    series,
    settings_label,
    shown_sets,
    tidy,
    value,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KL_LABEL = "sequence KL to the reference (nats)"
_BASE = {"color": COLOURS[0], "linestyle": "-", "marker": "o"}
_PLUG_IN = {"color": COLOURS[1], "linestyle": "-", "marker": "s"}
_RING = {"marker": "o", "linestyle": "none", "markerfacecolor": "none", "markeredgecolor": INK}


def plug_ins(item: Item) -> dict[str, str]:
    """Arm -> base of the arms that are set against another arm."""
    arms = item["arms"]
    return {name: arm["against"] for name, arm in arms.items() if arm["against"] in arms and arm["against"] != name}


def bars(item: Item) -> dict[str, str]:
    """Win rate of every arm against its base with the same settings, one panel per set: MallowsPO, figure 10."""
    against = plug_ins(item)
    arms = list(against) or [name for name in item["arms"] if points_of(item, name)]
    bases = {arm_label(item, base) for base in against.values()} or {"the reference"}
    opponent = bases.pop() if len(bases) == 1 else "each arm's base"
    groups, shared = _groups(item, arms), _shared(item, arms)
    panels = [(name, condition) for name in shown_sets(item) for condition in item["conditions"]]
    looks = [(arm_label(item, arm), look(n) | {"linestyle": "none"}) for n, arm in enumerate(arms)]
    columns = 1 if len(arms) * len(groups) > 12 else 2  # a dozen bars with their intervals fill half the width
    rows = -(-len(panels) // columns)
    with drawing(WIDTH, 2.5 * rows + legend_height(looks)) as canvas:
        axes = axes_grid(canvas.figure, len(panels), columns, sharey=True)
        for panel, (name, condition) in zip(axes, panels, strict=True):
            neutral(panel, 50.0)
            for n, arm in enumerate(arms):
                _bars_of_arm(panel, item, (arm, condition, name), (groups, shared), (n, len(arms)))
            several = len(item["conditions"]) > 1
            panel.set_title(f"{words(name)}, {condition_label(item, condition)}" if several else words(name))
            panel.set_xticks(range(len(groups)), groups, fontsize=SMALL)
            panel.set_xlim(-0.6, len(groups) - 0.4)
            tidy(panel)
        for panel in axes[::columns]:
            panel.set_ylabel(f"win rate (%)\nagainst {opponent}")
        legend(canvas.figure, looks)
    return {"bars": canvas.svg}


def _groups(item: Item, arms: Sequence[str]) -> list[str]:
    """Labels of all settings of these arms in declared order."""
    points = [point for arm in arms for point in points_of(item, arm)]
    return list(dict.fromkeys(_group(item, point, _shared(item, arms)) for point in points))


def _shared(item: Item, arms: Sequence[str]) -> set[str]:
    """The settings that every arm has: what one alone has, such as a smoothing, tells no groups apart."""
    names = [set(point["settings"]) for arm in arms for point in points_of(item, arm)]
    return set.intersection(*names) if names else set()


def _group(item: Item, point: Mapping[str, Any], shared: set[str]) -> str:
    """Label of the group of bars that a point belongs to."""
    return settings_label(item, {k: v for k, v in point["settings"].items() if k in shared}, "\n")


def _bars_of_arm(
    panel: Axes,
    item: Item,
    where: tuple[str, str, str],
    groups_by: tuple[Sequence[str], set[str]],
    place: tuple[int, int],
) -> None:
    """Bars of one arm from 50 %, a marker and an interval on each; ``place``: its number among how many arms."""
    arm, condition, name = where
    groups, shared = groups_by
    width = 0.8 / place[1]
    spots, found = [], []
    for point in points_of(item, arm, condition):
        group = groups.index(_group(item, point, shared))
        spots.append(group - 0.4 + width * (place[0] + 0.5))
        found.append(value(point, name, "win_rate"))
    style = look(place[0])
    heights = [e["mean"] - 50.0 if e else 0.0 for e in found]
    panel.bar(spots, heights, 0.86 * width, bottom=50.0, color=style["color"], alpha=0.3)
    series(panel, spots, found, style, joined=False)


def frontier(item: Item) -> dict[str, str]:
    """The metric against the sequence KL and against the fraction of training, one line per arm: MallowsPO, 8c."""
    lines = _frontier_lines(item)
    metric = _frontier_metric(item)
    looks = list({line["label"]: (line["label"], line["look"]) for line in lines}.values())
    with drawing(WIDTH, 3.1 * max(len(item["conditions"]), 1) + legend_height(looks)) as canvas:
        axes = axes_grid(canvas.figure, 2 * len(item["conditions"]), 2, sharey="row")
        for row, condition in enumerate(item["conditions"]):
            left, right = axes[2 * row : 2 * row + 2]
            for line in (line for line in lines if line["condition"] == condition):
                _frontier_line(left, right, line, metric)
            left.set_ylabel("share of positive sentiment" if metric == "score_positive" else words(metric))
            left.set_xlabel(KL_LABEL)
            right.set_xlabel("fraction of training")
            left.set_title(condition_label(item, condition) if len(item["conditions"]) > 1 else "")
            for panel in (left, right):
                tidy(panel)
        legend(canvas.figure, looks)
    return {"frontier": canvas.svg}


def _frontier_metric(item: Item) -> str:
    """What the item's frontier claims speak of; without one the share of positive answers, else the reward."""
    claimed = [row["metric"] for row in item["expect"] if row["kind"] == "frontier"]
    scored = any(entry.get("score_positive") for entry in item.get("frontier", []))
    return claimed[0] if claimed else "score_positive" if scored else "reward"


def _frontier_lines(item: Item) -> list[dict[str, Any]]:
    """The entries of ``frontier`` sorted into one line per condition, arm and settings, along the training."""
    lines: dict[Any, dict[str, Any]] = {}
    several = {arm for arm in item["arms"] if len({str(p["settings"]) for p in points_of(item, arm)}) > 1}
    numbers: dict[str, int] = {}
    for entry in item.get("frontier", []):
        arm, label = entry["arm"], arm_label(item, entry["arm"])
        label += f", {settings_label(item, entry['settings'])}" if arm in several else ""
        number = numbers.setdefault(label, len(numbers))
        start = {"condition": entry["condition"], "label": label, "look": look(number), "entries": []}
        lines.setdefault((entry["condition"], label), start)["entries"].append(entry)
    for line in lines.values():
        line["entries"].sort(key=lambda entry: entry["fraction"])
    return list(lines.values())


def _frontier_line(left: Axes, right: Axes, line: Mapping[str, Any], metric: str) -> None:
    """Crosses of both intervals against KL on the left, a band against the fraction on the right."""
    found = [entry for entry in line["entries"] if entry.get("kl") and entry.get(metric)]
    style = line["look"] | {"size": 4}
    values, kls = [entry[metric] for entry in found], [entry["kl"] for entry in found]
    series(left, [kl["mean"] for kl in kls], values, style)
    for kl, height in zip(kls, values, strict=True):
        if kl["low"] is not None:
            left.plot([kl["low"], kl["high"]], [height["mean"]] * 2, color=style["color"], linewidth=1.0, alpha=0.6)
    series(right, [entry["fraction"] for entry in found], values, style)


def gains(item: Item) -> dict[str, str]:
    """Base and plug-in joined by a line per base and settings, their difference beside: MallowsPO, tables 1 and 6."""
    name = main_set(item)
    rows = [row for base in item["arms"] for row in _gain_rows(item, base, name)]
    looks: list[tuple[str, Mapping[str, Any]]] = [
        ("base", _BASE),
        ("with the plug-in", _PLUG_IN),
        ("selected", _RING | {"size": 9}),
    ]
    with drawing(WIDTH, 1.0 + 0.27 * len(rows) + legend_height(looks)) as canvas:
        left, right = canvas.figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        neutral(right, 0.0, across=True)
        for place, row in enumerate(rows):
            _dumbbell(left, place, row["points"], name)
            series(right, [place], [row["difference"]], _PLUG_IN, across=True)
        left.set_xlabel(f"reward advantage, {words(name)}")
        right.set_xlabel("difference, paired" if all(row["paired"] for row in rows) else "difference, unpaired")
        left.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=SMALL)
        left.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        for panel in (left, right):
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
            panel.xaxis.set_major_locator(MaxNLocator(4 if panel is left else 2))
            tidy(panel, "x")
        legend(canvas.figure, looks)
    return {"gains": canvas.svg}


def _gain_rows(item: Item, base: str, name: str) -> list[dict[str, Any]]:
    """One row per point of each arm that is set against ``base``: its label, both points and their difference."""
    rows = []
    for arm in (arm for arm, against in plug_ins(item).items() if against == base):
        for number, point in enumerate(points_of(item, arm)):
            beside = _same_settings(points_of(item, base, point["condition"]), point["settings"])
            parts = [settings_label(item, point["settings"])]
            parts += [condition_label(item, point["condition"])] if len(item["conditions"]) > 1 else []
            # Both names stand once, at the first of their rows, as in a table.
            pair = "" if number else f"{arm_label(item, base)} → {arm_label(item, arm)}: "
            paired = value(point, name, "difference")
            difference = paired or _unpaired(value(point, name, "advantage"), value(beside, name, "advantage"))
            rows.append(
                {
                    "label": pair + ", ".join(parts),
                    "points": (beside, point),
                    "difference": difference,
                    "paired": bool(paired) or difference is None,
                }
            )
    return rows


def _same_settings(points: Sequence[Point], settings: Mapping[str, Any]) -> Point | None:
    """The point that agrees on every setting that both have: a plug-in may have one more than its base."""
    for point in points:
        if all(settings.get(key, held) == held for key, held in point["settings"].items()):
            return point
    return None


def _unpaired(one: Estimate | None, other: Estimate | None) -> Estimate | None:
    """``one - other`` with half widths added in squares: too wide where both answered the same prompts, never too sure.

    It stands in where item.json has no paired difference of the point.
    """
    if not one or not other:
        return None
    mean = one["mean"] - other["mean"]
    if one["low"] is None or other["low"] is None:
        return {"mean": mean, "low": None, "high": None}
    down = math.hypot(one["mean"] - one["low"], other["high"] - other["mean"])
    up = math.hypot(one["high"] - one["mean"], other["mean"] - other["low"])
    return {"mean": mean, "low": mean - down, "high": mean + up}


def _dumbbell(panel: Axes, place: int, points: tuple[Point | None, Point], name: str) -> None:
    """Base and plug-in slightly apart, so that their intervals stay visible, with a line between their means."""
    found = [value(point, name, "advantage") for point in points]
    means = [one["mean"] for one in found if one]
    if len(means) == len(points):
        panel.plot(means, [place - 0.14, place + 0.14], color=INK, linewidth=2.2, alpha=0.45)
    for point, one, offset, style in zip(points, found, (-0.14, 0.14), (_BASE, _PLUG_IN), strict=True):
        series(panel, [place + offset], [one], style, across=True)
        if one and point is not None and point["selected"]:
            panel.plot(one["mean"], place + offset, markersize=9, **_RING)
