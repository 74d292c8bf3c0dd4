"""Figures as SVG text: the same bytes for the same data, readable on light and dark backgrounds."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#767676"  # contrast 4.5 against white and against black; becomes currentColor inside a page
# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers, visible on both backgrounds.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", ":", "-.")
CURVE_POINTS = 40

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefopt",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

Curve = Sequence[Mapping[str, float]]


class _Canvas:
    """A figure being drawn; ``svg`` is its text afterwards."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


def styled() -> AbstractContextManager[None]:
    """The look of all figures, for everything drawn inside the block."""
    return mpl.rc_context(_STYLE)


@contextmanager
def drawing(width: float, height: float) -> Iterator[_Canvas]:
    """A figure of that size in inches to draw on; its ``svg`` is there after the block."""
    with styled():
        canvas = _Canvas(Figure(figsize=(width, height), layout="constrained"))
        canvas.figure.get_layout_engine().set(wspace=0.06)
        yield canvas
        canvas.svg = svg_text(canvas.figure)


def svg_text(figure: Figure | str) -> str:
    """A figure as SVG text, the same bytes every time; text that is SVG already stays as it is."""
    if isinstance(figure, str):
        return figure
    stream = io.StringIO()
    with styled():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def arms_figure(item: Mapping[str, Any]) -> str:
    """Dot and whisker per arm in declared order: win rate and reward advantage against the item's baseline."""
    names = list(item["arms"])
    panels = (
        ("win_rate", f"win rate against {item['against']} (%)", 50.0),
        ("reward_advantage", "reward advantage", 0.0),
    )
    with drawing(7.2, 0.9 + 0.34 * len(names)) as canvas:
        axes = canvas.figure.subplots(1, 2, sharey=True)
        for panel, (metric, label, neutral) in zip(axes, panels, strict=True):
            panel.axvline(neutral, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            for row, name in enumerate(names):
                _dot(panel, row, item["arms"][name]["summary"].get(metric))
            panel.set_xlabel(label)
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
            panel.grid(axis="x", color=INK, alpha=0.2, linewidth=0.6)
            panel.set_axisbelow(True)
        axes[0].set_yticks(range(len(names)), [_arm_label(name, item["arms"][name]) for name in names])
        axes[0].set_ylim(len(names) - 0.5, -0.5)
    return canvas.svg


def _dot(panel: Axes, row: int, summary: Mapping[str, Any] | None) -> None:
    if not summary:
        return
    if summary["low"] is None:
        panel.plot(summary["mean"], row, "o", markerfacecolor="none", markeredgecolor=INK, markersize=6)
        return
    panel.plot([summary["low"], summary["high"]], [row, row], color=COLOURS[0], linewidth=2, solid_capstyle="round")
    panel.plot(summary["mean"], row, "o", color=COLOURS[0], markersize=6)


def _arm_label(name: str, arm: Mapping[str, Any]) -> str:
    if arm["baseline"]:
        return f"{name} (baseline)"
    return name if arm["summary"] else f"{name} (not run)"


def curves_figure(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Loss and accuracy against the step: one colour per arm, every seed thin, their mean thick.

    ``curves``: arm -> one list of {step, loss, accuracy, ...} per seed. Losses of different names have different
    scales; where they spread over more than a factor of 30 the loss axis is logarithmic.
    """
    rows = -(-len(curves) // 4)
    with drawing(7.2, 2.5 + 0.22 * rows) as canvas:
        axes = canvas.figure.subplots(1, 2)
        for panel, metric in zip(axes, ("loss", "accuracy"), strict=True):
            for number, runs in enumerate(curves.values()):
                _curve(panel, metric, runs, COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % 4])
            panel.set_title(metric)
            panel.set_xlabel("step")
            panel.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _log_scale_where_wide(axes[0], [point["loss"] for runs in curves.values() for run in runs for point in run])
        handles = [
            mpl.lines.Line2D(
                [], [], color=COLOURS[n % len(COLOURS)], linestyle=DASHES[n // len(COLOURS) % 4], label=name
            )
            for n, name in enumerate(curves)
        ]
        canvas.figure.legend(handles=handles, loc="outside lower center", ncols=min(len(curves), 4))
    return canvas.svg


def _curve(panel: Axes, metric: str, runs: Sequence[Curve], colour: str, dash: str) -> None:
    series = [_binned([p["step"] for p in run], [p[metric] for p in run]) for run in runs if run and metric in run[0]]
    if not series:
        return
    if len(series) > 1:
        for steps, values in series:
            panel.plot(steps, values, color=colour, linestyle=dash, linewidth=0.6, alpha=0.35)
    shared = min(len(steps) for steps, _ in series)
    mean = np.mean([values[:shared] for _, values in series], axis=0)
    panel.plot(series[0][0][:shared], mean, color=colour, linestyle=dash, linewidth=1.8)


def _binned(steps: Sequence[float], values: Sequence[float]) -> tuple[Any, Any]:
    """At most CURVE_POINTS points, each the mean of its neighbours: small files, and noise does not hide the course."""
    groups = min(CURVE_POINTS, len(steps))
    cut = [np.array_split(np.asarray(axis, dtype=float), groups) for axis in (steps, values)]
    first, second = (np.array([part.mean() for part in parts]) for parts in cut)
    return first, second


def _log_scale_where_wide(panel: Axes, values: Sequence[float]) -> None:
    positive = values and min(values) > 0
    if positive and max(values) > 30 * min(values):
        panel.set_yscale("log")
        panel.set_title("loss (logarithmic)")


def histogram_figure(weights: Mapping[str, Sequence[float]], phi_star: Mapping[str, float]) -> str:
    """Distribution of the dispersion weight c(x), mean 1 on the train split, one outline per estimate or control."""
    with drawing(7.2, 2.4) as canvas:
        panel = canvas.figure.subplots()
        everything = np.concatenate([np.asarray(w, dtype=float) for w in weights.values()])
        top = max(float(np.quantile(everything, 0.995)), 1e-6)
        edges = np.linspace(min(0.0, float(everything.min())), max(top, 1.05), 41)
        for number, (name, values) in enumerate(weights.items()):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            colour = COLOURS[number % len(COLOURS)]
            label = f"{name}, φ* = {phi_star[name]:.3g}" if name in phi_star else name
            panel.stairs(counts / max(len(values), 1), edges, color=colour, linewidth=1.6, label=label)
            if number == 0:
                panel.stairs(counts / max(len(values), 1), edges, color=colour, alpha=0.2, fill=True)
        panel.axvline(1.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_xlabel("dispersion weight c(x); larger: the responses agree more")
        panel.set_ylabel("share of pairs")
        panel.legend(loc="upper right")
    return canvas.svg


def inline(svg: str, label: str, prefix: str) -> str:
    """An SVG for the inside of a page: takes the page's colours, scales with it, and has a text alternative.

    The n-th of COLOURS becomes the page's ``--series-n``, where it declares one. Every id gets ``prefix``, so that the
    clip paths of several figures on a page do not mix.
    """
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS, start=1):
        svg = svg.replace(colour, f"var(--series-{number}, {colour})")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'((?:xlink:)?href="|url\()#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1).strip()
