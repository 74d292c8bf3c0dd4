"""Figures of an evaluation: win rates with intervals, outcome against length difference, win rates by data set.

Estimates are ``{mean, low, high}`` in points, as in the summaries of items; ``low`` None: there is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.evaluation.length_control import Comparison, length_term, sigmoid
from prefopt.figures import COLOURS, INK, drawing
from prefopt.grids.drawing import (
    SMALL,
    WIDTH,
    Estimate,
    axes_grid,
    folded,
    legend,
    legend_height,
    neutral,
    safe,
    tidy,
    whiskers,
)
from prefopt.winrate import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

BINS = 10
ROWS_PER_BIN = 12  # fewer make an interval that says nothing
_PANELS_ACROSS = 3
_BAR = 0.8  # of the place that a model or data set has
_TICKS = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class LengthRelation:
    """How the outcome goes with t = tanh(standardised length difference).

    ``bins``: (mean t, estimate in points) by rising t; ``curve`` [m, 2]: t and the fit's mean prediction in points,
    None without a fit; ``at_zero``: the curve at t = 0, which is the length-controlled win rate.
    """

    bins: Sequence[tuple[float, Estimate]]
    curve: Floats | None
    at_zero: float | None


def rate_estimate(p: ArrayLike) -> dict[str, float | int | None]:
    """100 mean(p) with its bootstrap interval and ``n``; no interval for one value, nothing for none."""
    values = np.asarray(p, dtype=float)
    if values.size == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    low, high = (100 * bound for bound in bootstrap_interval(values)) if values.size > 1 else (None, None)
    return {"mean": 100 * float(values.mean()), "low": low, "high": high, "n": int(values.size)}


def length_relation(comparison: Comparison, weights: Mapping[str, float] | None) -> LengthRelation:
    """Binned outcomes, and f(t) = 100 mean_i sigma(b_length t + b_difficulty difficulty_i + b_model) of the fit.

    ``weights``: by term, as ``length_controlled_win_rate`` returns them; None where nothing was fitted. Bins hold about
    equally many of the rows that have a preference; rows of one t stay together.
    """
    there = ~np.isnan(comparison.p)
    t, p = length_term(comparison.delta_length)[there], comparison.p[there]
    edges = np.unique(np.quantile(t, np.linspace(0, 1, max(1, min(BINS, len(t) // ROWS_PER_BIN)) + 1))[1:-1])
    place = np.searchsorted(edges, t, side="left")
    bins = [(float(t[place == k].mean()), rate_estimate(p[place == k])) for k in np.unique(place)]
    if weights is None:
        return LengthRelation(bins, None, None)
    rest = np.full(comparison.p.size, weights["model"])
    if comparison.difficulty is not None:
        rest = rest + weights["difficulty"] * comparison.difficulty
    places = np.linspace(-1, 1, 41)
    mean = [100 * float(sigmoid(weights["length"] * at + rest).mean()) for at in places]
    return LengthRelation(bins, np.column_stack([places, mean]), 100 * float(sigmoid(rest).mean()))


def win_rate_figure(models: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    """One group of bars per model, one bar per metric, with intervals; ``models``: label -> metric -> estimate."""
    metrics = list(dict.fromkeys(name for estimates in models.values() for name in estimates))
    entries = [(safe(name), _bar_look(number)) for number, name in enumerate(metrics)] if len(metrics) > 1 else []
    thick = _BAR / max(len(metrics), 1)
    with drawing(WIDTH, 0.7 + (0.12 + 0.2 * len(metrics)) * len(models) + legend_height(entries)) as canvas:
        panel = canvas.figure.subplots()
        for row, estimates in enumerate(models.values()):
            for number, name in enumerate(metrics):
                at = row + (number - (len(metrics) - 1) / 2) * thick
                _bar(panel, at, estimates.get(name), COLOURS[number], 0.9 * thick)
        _rates_across(panel, [safe(label) for label in models])
        panel.set_xlabel("win rate against the baseline (%)")
        panel.set_xlim(0, 112)  # the number of a bar at 100 stands inside
        panel.set_xticks(_TICKS)
        legend(canvas.figure, entries)
    return canvas.svg


def dataset_figure(models: Mapping[str, Mapping[str, Estimate]]) -> str:
    """One panel per model, one bar per data set with interval and ``n``; ``models``: label -> data set -> estimate."""
    names = list(dict.fromkeys(name for estimates in models.values() for name in estimates))
    panels_down = -(-len(models) // _PANELS_ACROSS)
    with drawing(WIDTH, 0.4 + (0.35 + 0.26 * len(names)) * panels_down) as canvas:
        panels = axes_grid(canvas.figure, len(models), _PANELS_ACROSS, sharex=True, sharey=True)
        for number, (panel, (label, estimates)) in enumerate(zip(panels, models.items(), strict=True)):
            for row, name in enumerate(names):
                _bar(panel, row, estimates.get(name), COLOURS[0], _BAR, note_at=168)
            _rates_across(panel, [safe(name) for name in names])
            if number >= len(models) - _PANELS_ACROSS:  # the last panel of its column
                panel.set_xlabel("win rate (%)", x=0.3)
            panel.set_xlim(0, 168)  # rates and counts stand in a column of their own
            panel.set_xticks(_TICKS[::2])
            panel.set_title(folded(safe(label), 26), fontsize=SMALL)
    return canvas.svg


def length_figure(models: Mapping[str, LengthRelation]) -> str:
    """One panel per model: binned outcomes with intervals, the fitted curve, and its point at no length difference."""
    panels_down = -(-len(models) // _PANELS_ACROSS)
    entries = [
        ("bin mean, 95 % interval", {"color": COLOURS[0], "marker": "o", "linestyle": ""}),
        ("fit", {"color": COLOURS[1], "linestyle": "-"}),
        ("fit at equal length", {"color": COLOURS[1], "marker": "D", "linestyle": ""}),
    ]
    with drawing(WIDTH, 0.35 + 2.2 * panels_down + legend_height(entries)) as canvas:
        panels = axes_grid(canvas.figure, len(models), _PANELS_ACROSS, sharex=True, sharey=True)
        for number, (panel, (label, relation)) in enumerate(zip(panels, models.items(), strict=True)):
            _relation(panel, relation)
            panel.set_title(folded(safe(label), 26), fontsize=SMALL)
            if number % _PANELS_ACROSS == 0:
                panel.set_ylabel("model preferred (%)")
        axis = "t = tanh(length difference): left of 0 the model's answer is longer, right of 0 the baseline's"
        canvas.figure.supxlabel(axis, size=10)
        legend(canvas.figure, entries, side="upper")
    return canvas.svg


def _relation(panel: Axes, relation: LengthRelation) -> None:
    places, estimates = [at for at, _ in relation.bins], [estimate for _, estimate in relation.bins]
    neutral(panel, 50)
    panel.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    whiskers(panel, places, estimates, COLOURS[0])
    panel.plot(places, [estimate["mean"] for estimate in estimates], "o", color=COLOURS[0], markersize=4)
    if relation.curve is not None:
        panel.plot(*relation.curve.T, color=COLOURS[1], linewidth=1.6)
        panel.plot(0, relation.at_zero, "D", color=COLOURS[1], markersize=6)
    panel.set_xlim(-1.05, 1.05)
    panel.set_ylim(-4, 104)
    panel.set_yticks(_TICKS)
    tidy(panel)


def _bar_look(number: int) -> dict[str, object]:
    return {"color": COLOURS[number], "marker": "s", "linestyle": ""}


def _bar(
    panel: Axes, at: float, estimate: Estimate | None, colour: str, thick: float, *, note_at: float | None = None
) -> None:
    """A bar with its interval and its number: behind it, or with the count in a column that ends at ``note_at``."""
    if not estimate or estimate["mean"] is None:
        return
    panel.barh(at, estimate["mean"], thick, color=colour, alpha=0.85)
    whiskers(panel, [at], [estimate], INK, across=True)
    if note_at is None:
        end = estimate["mean"] if estimate["high"] is None else estimate["high"]
        panel.text(end + 1.5, at, f"{estimate['mean']:.1f}", va="center", fontsize=SMALL)
    else:
        panel.text(note_at, at, f"{estimate['mean']:.1f} ({estimate['n']})", va="center", ha="right", fontsize=SMALL)


def _rates_across(panel: Axes, labels: Sequence[str]) -> None:
    """Rows with these labels from the top down, and the line of equal play."""
    neutral(panel, 50, across=True)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.spines["bottom"].set_bounds(0, 100)
    tidy(panel, "x")
