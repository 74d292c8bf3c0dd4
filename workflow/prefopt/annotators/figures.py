"""Figures of items about several annotators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.annotators.estimates import ESTIMATES
from prefopt.figures import COLOURS, DASHES, INK, drawing
from prefopt.grids.drawing import axes_grid, legend, look, neutral, safe, series, tidy

_PANELS = (("spearman", "Spearman", 0.0), ("partial", "at equal length", 0.0), ("auroc", "AUROC, split pairs", 0.5))


def correlations_figure(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """Per estimate and data set: rank correlation with the entropy of votes, the same at equal length, and AUROC."""
    names = [name for name in ESTIMATES if any(name in result["estimates"] for result in results.values())]
    step = 0.7 / max(len(results), 1)
    with drawing(7.2, 1.3 + 0.12 * len(names) * (1 + len(results))) as canvas:
        panels = axes_grid(canvas.figure, len(_PANELS), len(_PANELS), sharey=True)
        for panel, (kind, label, level) in zip(panels, _PANELS, strict=True):
            neutral(panel, level, across=True)
            for number, result in enumerate(results.values()):
                places = [row + step * (number - (len(results) - 1) / 2) for row in range(len(names))]
                found = [_found(result["estimates"].get(name), kind) for name in names]
                series(panel, places, found, look(number), across=True, joined=False)
            panel.set_xlabel(label)
            tidy(panel, "x")
        shown = [ESTIMATES[name] for name in names]
        panels[0].set_yticks(range(len(names)), [safe(label) for label in shown])
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        legend(canvas.figure, [(safe(labels[name]), look(number)) for number, name in enumerate(results)])
    return canvas.svg


def _found(estimate: Mapping[str, Any] | None, kind: str) -> Mapping[str, Any] | None:
    if estimate is None:
        return None
    one = estimate["auroc"] if kind == "auroc" else estimate["vote_entropy"].get(kind)
    return one if one and one["mean"] is not None else None


def arms_figure(summary: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]) -> str:
    """One panel per metric, one row per arm: means over seeds and prompts with their intervals."""
    names = list(summary)
    with drawing(7.2, 0.9 + 0.3 * len(names)) as canvas:
        panels = axes_grid(canvas.figure, len(metrics), len(metrics), sharey=True)
        for panel, (metric, label) in zip(panels, metrics.items(), strict=True):
            found = [summary[name]["metrics"].get(metric) for name in names]
            series(panel, range(len(names)), found, look(0), across=True, joined=False)
            panel.set_xlabel(label)
            tidy(panel, "x")
        panels[0].set_yticks(range(len(names)), [safe(name.replace("_", " ")) for name in names])
        panels[0].set_ylim(len(names) - 0.5, -0.5)
    return canvas.svg


def reliability_figure(curves: Mapping[str, list[tuple[float, float]]]) -> str:
    """Share of held-out votes against the predicted probability, one line per arm, the diagonal dashed."""
    with drawing(7.2, 3.6) as canvas:
        panel = canvas.figure.subplots()
        panel.plot([0, 1], [0, 1], color=INK, linestyle=(0, (4, 3)), linewidth=0.8)
        for number, (name, points) in enumerate(curves.items()):
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            x, y = zip(*points, strict=True)
            panel.plot(x, y, color=colour, linestyle=dash, linewidth=1.4, label=safe(name.replace("_", " ")))
        panel.set_xlabel("predicted probability")
        panel.set_ylabel("share of votes")
        canvas.figure.legend(loc="outside right upper")
    return canvas.svg
