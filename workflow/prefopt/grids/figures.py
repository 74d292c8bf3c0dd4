"""Figures of grid items from the content of item.json, each laid out like the figure or table of its paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from prefopt.figures import COLOURS, drawing
from prefopt.grids.comparison_figures import bars, frontier, gains
from prefopt.grids.condition_figures import by_condition
from prefopt.grids.drawing import (
    SMALL,
    WIDTH,
    Item,
    Point,
    axes_grid,
    condition_label,
    course,
    legend,
    legend_height,
    look,
    main_set,
    neutral,
    point_label,
    series,
    standing_points,
    tidy,
    value,
    words,
)

_MOST_CURVES = 24
_CLOSED, _OPEN = COLOURS[0], COLOURS[5]


def grid_figures(item: Mapping[str, Any]) -> dict[str, str]:
    """Name -> SVG of a grid item; the first one, named like the layout, is the item's main figure.

    ``item``: the content of item.json. The same content gives the same bytes. Points that were not run are left out.
    """
    lines = _curve_lines(item)
    return _LAYOUTS[item["layout"]](item) | ({"curves": _curves(lines)} if lines else {})


def _ranking(item: Item) -> dict[str, str]:
    """Arms by reward advantage, the best first, with the sequence KL they paid beside it."""
    name = main_set(item)
    several = len(item["conditions"]) > 1
    points = _best_first(standing_points(item), name)
    labels = [
        point_label(item, point) + (f", {condition_label(item, point['condition'])}" if several else "")
        for point in points
    ]
    with drawing(WIDTH, 1.1 + 0.26 * len(points)) as canvas:
        left, right = canvas.figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        neutral(left, 0.0, across=True)
        for place, point in enumerate(points):
            control = item["arms"][point["arm"]]["control"]
            style = {"color": COLOURS[1 if control else 0], "marker": "D" if control else "o", "linestyle": "none"}
            for panel, metric in ((left, "advantage"), (right, "kl")):
                series(panel, [place], [value(point, name, metric)], style, across=True, joined=False)
        left.set_yticks(range(len(points)), labels, fontsize=SMALL)
        left.set_ylim(max(len(points), 1) - 0.5, -0.5)
        left.set_xlabel(f"reward advantage, {words(name)}")
        right.set_xlabel("sequence KL (nats)")
        for panel in (left, right):
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
            panel.xaxis.set_major_locator(MaxNLocator(5))
            tidy(panel, "x")
    return {"ranking": canvas.svg}


def _best_first(points: Sequence[Point], name: str) -> list[Point]:
    """Points from the largest mean advantage to the smallest; those that were not run at the end."""
    found = [(value(point, name, "advantage"), point) for point in points]
    return [point for _, point in sorted(found, key=lambda pair: -pair[0]["mean"] if pair[0] else float("inf"))]


def _histogram(item: Item) -> dict[str, str]:
    """Distribution of the weight c(x) per condition, prompts of both kinds stacked: MallowsPO, figure 7."""
    weights = {name: item["weights"][name] for name in item["conditions"] if name in item["weights"]}
    looks = [
        (label, {"color": colour, "linestyle": "-", "linewidth": 6})
        for label, colour in (("closed prompts", _CLOSED), ("open prompts", _OPEN))
    ]
    columns = 1 if len(weights) == 1 else 2
    rows = -(-len(weights) // columns)
    with drawing(WIDTH, 0.3 + 2.3 * max(rows, 1) + legend_height(looks)) as canvas:
        axes = axes_grid(canvas.figure, len(weights), columns, sharex=True, sharey=True)
        for panel, (name, entry) in zip(axes, weights.items(), strict=True):
            edges, closed, open_ = (entry["histogram"][key] for key in ("edges", "closed", "open"))
            both = [a + b for a, b in zip(closed, open_, strict=True)]
            panel.stairs(closed, edges, fill=True, color=_CLOSED, alpha=0.75)
            panel.stairs(both, edges, baseline=closed, fill=True, color=_OPEN, alpha=0.75)
            neutral(panel, 1.0, across=True)
            panel.set_title(condition_label(item, name))
            known = (("φ*", "phi_star"), ("sd", "sd"), ("skewness", "skewness"))
            spread = "\n".join(f"{word} {entry[key]:.3g}" for word, key in known if entry.get(key) is not None)
            panel.text(0.98, 0.96, spread, transform=panel.transAxes, ha="right", va="top", fontsize=SMALL)
            panel.set_xlabel("dispersion weight c(x)")
            tidy(panel)
        for panel in axes[::columns]:
            panel.set_ylabel("share of prompts")
        legend(canvas.figure, looks)
    return {"histogram": canvas.svg}


def _curve_lines(item: Item) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, curve) of the points that stand for each arm in the first condition that has curves."""
    for condition in item["conditions"]:
        points = [point for point in standing_points(item, condition) if point["curve"].get("loss")]
        if len(points) > _MOST_CURVES:
            points = list({point["arm"]: point for point in reversed(points)}.values())[::-1]
        if points:
            return [(point_label(item, point), point["curve"]) for point in points]
    return []


def _curves(lines: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Loss and accuracy against the fraction of training, mean of the seeds with its interval."""
    looks = [(label, look(number) | {"marker": ""}) for number, (label, _) in enumerate(lines)]
    with drawing(WIDTH, 2.6 + legend_height(looks)) as canvas:
        axes = canvas.figure.subplots(1, 2)
        for panel, metric in zip(axes, ("loss", "accuracy"), strict=True):
            for (_, style), (_, curve) in zip(looks, lines, strict=True):
                course(panel, curve.get(metric) or [], style, band=min(0.18, 0.6 / len(lines)))
            panel.set_title(metric)
            panel.set_xlabel("fraction of training")
            tidy(panel)
        means = [row[1] for _, curve in lines for row in curve["loss"]]
        if min(means) > 0 and max(means) > 30 * min(means):  # losses of different names have different scales
            axes[0].set_yscale("log")
            axes[0].set_title("loss (logarithmic)")
        legend(canvas.figure, looks)
    return canvas.svg


_LAYOUTS = {
    "bars": bars,
    "frontier": frontier,
    "gains": gains,
    "by_condition": by_condition,
    "histogram": _histogram,
    "ranking": _ranking,
}
