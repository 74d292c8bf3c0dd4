"""What the figures of grid items share: looks of arms, means with intervals, panels, legends, and points of an item."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from prefopt.figures import COLOURS, DASHES, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2  # inches: 518 points, so that a 9-point letter is 11 pixels high in the 40 rem that a page gives at least
SMALL = 8.5
_MARKERS = "osD^vPX"  # seven against six colours: 42 arms before a marker comes back in the same colour
_LONGEST_LABEL = 32
_SYMBOLS = {"beta": "β", "tau": "τ", "gamma": "γ", "alpha": "α", "phi": "φ", "learning_rate": "lr"}

Estimate = Mapping[str, Any]
Item = Mapping[str, Any]
Point = Mapping[str, Any]


def look(number: int) -> dict[str, Any]:
    """Colour, line style and marker of the arm with that number; different for the first 42 arms."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def safe(text: str) -> str:
    """A label from outside as one short line that is no formula to matplotlib."""
    line = " ".join(str(text).split())
    short = line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def folded(label: str, width: int) -> str:
    """A label over as many lines of at most ``width`` letters as it needs, for the title of a small panel."""
    return "\n".join(textwrap.wrap(label, width)) or label


def short_number(number: float) -> str:
    """``.2`` for 0.2, as the papers print shares."""
    return f"{number:g}".replace("0.", ".", 1) if abs(number) < 1 else f"{number:g}"


def arm_label(item: Item, arm: str) -> str:
    """The arm's own label."""
    return safe(item["arms"][arm]["label"])


def condition_label(item: Item, condition: str) -> str:
    """The condition's own label."""
    return safe(item["conditions"][condition]["label"])


def words(name: str) -> str:
    """A name of a set, metric or setting as words."""
    return safe(name.replace("_", " "))


def symbol(setting: str) -> str:
    """The letter that the papers use for a setting, or its name."""
    return _SYMBOLS.get(setting, words(setting))


def settings_label(item: Item, settings: Mapping[str, Any], joint: str = ", ") -> str:
    """``β 0.1, lr 0.0003``: the settings that vary over the item's points, all of them where none does."""
    varying = [key for key in settings if len({_text(p["settings"].get(key)) for p in item["points"]}) > 1]
    return safe_joined([f"{symbol(key)} {_text(settings[key])}" for key in varying or settings], joint)


def safe_joined(parts: Iterable[str], joint: str) -> str:
    """Labels joined, each made safe on its own so that the joint may be a line break."""
    return joint.join(map(safe, parts))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def main_set(item: Item) -> str:
    """The evaluation set that a figure over one set shows: ``test``, or the first."""
    return "test" if "test" in item["sets"] else item["sets"][0]


def shown_sets(item: Item) -> list[str]:
    """The evaluation sets without the one that points are selected on, unless there is no other."""
    spent = (item.get("select") or {}).get("set")
    return [name for name in item["sets"] if name != spent] or list(item["sets"])


def value(point: Point | None, name: str, metric: str) -> Estimate | None:
    """The estimate of a metric on one set; None where the point was not run or not measured so."""
    found = ((point or {}).get("sets") or {}).get(name, {}).get(metric)
    return found if found and found["mean"] is not None else None


def points_of(item: Item, arm: str, condition: str | None = None) -> list[Point]:
    """The points of an arm in declared order, in one condition or in all."""
    return [p for p in item["points"] if p["arm"] == arm and condition in (None, p["condition"])]


def chosen_point(item: Item, arm: str, condition: str) -> Point | None:
    """The point that stands for an arm in a condition: the selected one, or the first."""
    points = points_of(item, arm, condition)
    return next((p for p in points if p["selected"]), points[0] if points else None)


def standing_points(item: Item, condition: str | None = None) -> list[Point]:
    """The selected points of every arm and condition; all of an arm's points there where none is selected."""
    found = []
    for here in item["conditions"] if condition is None else [condition]:
        for arm in item["arms"]:
            points = points_of(item, arm, here)
            found += [point for point in points if point["selected"]] or points
    return found


def point_label(item: Item, point: Point) -> str:
    """``DPO, β 0.1``: the arm's label, with the settings where the item tries more than one of the arm."""
    label = arm_label(item, point["arm"])
    if len({str(p["settings"]) for p in points_of(item, point["arm"])}) == 1:
        return label
    return f"{label}, {settings_label(item, point['settings'])}"


def axes_grid(figure: Figure, count: int, columns: int, **shared: Any) -> list[Axes]:
    """``count`` panels in rows of at most ``columns``; places left over stay empty."""
    columns = max(min(columns, count), 1)
    rows = max(-(-count // columns), 1)
    everything = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for panel in everything[count:]:
        panel.set_axis_off()
    for above in everything[max(count - columns, 0) : count]:
        above.tick_params(labelbottom=True)  # the last panel of its column, also where the row below is not full
    return everything[:count]


def tidy(panel: Axes, axis: str = "y") -> None:
    """Fine grid lines behind the data along the measured axis."""
    panel.grid(axis=axis, color=INK, alpha=0.2, linewidth=0.6)
    panel.set_axisbelow(True)


def neutral(panel: Axes, level: float, across: bool = False) -> None:
    """The line where nothing differs: horizontal, or vertical where values lie along x (``across``)."""
    draw = panel.axvline if across else panel.axhline
    draw(level, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)


def series(
    panel: Axes,
    places: Sequence[float],
    estimates: Sequence[Estimate | None],
    style: Mapping[str, Any],
    *,
    across: bool = False,
    joined: bool = True,
) -> None:
    """Means as markers with their 95 % intervals, joined by a line where ``joined``; values along x where ``across``.

    Places without an estimate are left out; a mean without an interval is hollow.
    """
    found = [(place, e) for place, e in zip(places, estimates, strict=True) if e]
    if not found:
        return
    whiskers(panel, [p for p, _ in found], [e for _, e in found], style["color"], across=across)
    xy = [[place for place, _ in found], [e["mean"] for _, e in found]]
    if joined:
        panel.plot(*(reversed(xy) if across else xy), color=style["color"], linestyle=style["linestyle"], linewidth=1.4)
    for fill, bare in ((style["color"], False), ("none", True)):
        kept = [(x, y) for x, y, (_, e) in zip(*xy, found, strict=True) if (e["low"] is None) == bare]
        if kept:
            x, y = zip(*(reversed(pair) if across else pair for pair in kept), strict=True)
            panel.plot(
                x,
                y,
                style["marker"],
                markerfacecolor=fill,
                markeredgecolor=style["color"],
                markersize=style.get("size", 5),
            )


def whiskers(
    panel: Axes, places: Sequence[float], estimates: Sequence[Estimate], colour: str, *, across: bool = False
) -> None:
    """One thin line from the low to the high limit per estimate that has them."""
    spans = [(place, e["low"], e["high"]) for place, e in zip(places, estimates, strict=True) if e["low"] is not None]
    if spans:
        draw = panel.hlines if across else panel.vlines
        draw(*zip(*spans, strict=True), color=colour, linewidth=1.4, alpha=0.75, gid=interval_id(panel))


def interval_id(panel: Axes) -> str:
    """Id of the next drawn interval or band of a figure."""
    return f"interval-{panel.get_figure(root=True).axes.index(panel)}-{len(panel.collections)}"


def course(panel: Axes, rows: Sequence[Sequence[float | None]], style: Mapping[str, Any], band: float = 0.18) -> None:
    """A training curve [[fraction, mean, low, high], ...]: its mean, with a band of that opacity between the limits."""
    if not rows:
        return
    panel.plot(
        [r[0] for r in rows],
        [r[1] for r in rows],
        color=style["color"],
        linestyle=style["linestyle"],
        linewidth=1.6,
    )
    known = [r for r in rows if r[2] is not None]
    if known:
        fraction, low, high = ([row[k] for row in known] for k in (0, 2, 3))
        panel.fill_between(fraction, low, high, color=style["color"], alpha=band, linewidth=0, gid=interval_id(panel))


def legend(figure: Figure, entries: Sequence[tuple[str, Mapping[str, Any]]], side: str = "lower") -> None:
    """Labels with their looks below all panels or above (``upper``), in as many columns as fit."""
    if not entries:
        return
    handles = [
        Line2D([], [], label=label, markersize=5, **{k: v for k, v in style.items() if k != "size"})
        for label, style in entries
    ]
    place = f"outside {side} center"
    key = figure.legend(handles=handles, loc=place, ncols=legend_columns(entries), fontsize=SMALL)
    key.set_gid(f"legend-{len(figure.get_figure(root=True).axes)}")  # each subfigure would number its own from 1


def legend_columns(entries: Sequence[tuple[str, Any]]) -> int:
    """How many labels fit side by side: about 104 letters of the small size, seven of them for each sample line."""
    longest = max((len(label) for label, _ in entries), default=1)
    return max(1, min(4, len(entries), 104 // (longest + 7)))


def legend_height(entries: Sequence[tuple[str, Any]]) -> float:
    """Inches that the legend takes below the panels."""
    return 0.15 + 0.19 * -(-len(entries) // legend_columns(entries)) if entries else 0.0
