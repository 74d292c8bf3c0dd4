"""MallowsPO's pairwise links (figures 2, 4, 5 and 6) and the ranking laws behind them (corollaries 2 and 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from prefopt.lazy import LazyModule
from prefopt.specs import Positive
from prefopt.studies.registry import StudyResult, study

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from numpy.typing import NDArray
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")
    torch = LazyModule("torch")

Phi = Annotated[float, Field(gt=0.0, lt=1.0)]

_SIDES = 1e-9  # how far to the right of a jump or of a joint its sides are read


def link(
    name: str, s: NDArray[np.float64], *, weight: float = 1.0, lam: float = 1.0, **params: float
) -> NDArray[np.float64]:
    """The pairwise probability exp(-loss) that a loss of ``LOSSES`` gives to margins s at beta = 1."""
    from prefopt.batch import PairBatch
    from prefopt.losses import LOSSES

    margin = torch.as_tensor(np.asarray(s, dtype=float))
    zero, one = torch.zeros_like(margin), torch.ones(len(margin), dtype=torch.long)
    batch = PairBatch(
        pair_id=torch.arange(len(margin)),
        chosen_logp=margin,
        rejected_logp=zero,
        chosen_tokens=one,
        rejected_tokens=one,
        ref_chosen_logp=zero,
        ref_rejected_logp=zero,
        dispersion_weight=torch.full_like(margin, weight),
        neg_log_dispersion=torch.full_like(margin, lam),
    )
    return torch.exp(-LOSSES[name].fn(batch, beta=1.0, **params)).numpy()


@study("mallows_theta_links", "MallowsPO-theta's links for several dispersion weights beside the logistic")
def theta_links(
    *, weights: list[Positive], limit: Positive = 20.0, points: Annotated[int, Field(ge=2)] = 2001
) -> StudyResult:
    """g(s) = sigmoid(c s) on [-limit, limit] for every weight c, through the loss ``mallows_theta``.

    Values: ``at_1_c<c>`` = g(1); ``spread_c<c>`` = largest |g - 1/2|; ``gap_to_dpo_c<c>`` = largest distance from
    the link of ``dpo``; the same for c = 1 always.

    Source: 2405.14953, figure 2 and corollary 2.
    """
    s = np.linspace(-limit, limit, points)
    logistic = link("dpo", s)
    curves = {weight: link("mallows_theta", s, weight=weight) for weight in weights}
    values: dict[str, float] = {}
    for weight, curve in curves.items():
        values[f"at_1_c{weight:g}"] = float(link("mallows_theta", np.ones(1), weight=weight)[0])
        values[f"spread_c{weight:g}"] = float(np.abs(curve - 0.5).max())
        values[f"gap_to_dpo_c{weight:g}"] = float(np.abs(curve - logistic).max())
    table = pd.DataFrame({"s": s, "dpo": logistic} | {f"c{weight:g}": curve for weight, curve in curves.items()})
    return StudyResult(values, {"links": table}, {"links": _theta_figure(s, logistic, curves)})


@study("mallows_phi_links", "MallowsPO-phi's link: the jump at 0 and its smooth substitutes")
def phi_links(*, phi: Phi, width: Positive = 0.1) -> StudyResult:
    """The exact link, the sigmoid and the two cubic substitutes (``width`` and -2 log phi) through the losses.

    Values: the two sides of the jump; the links at 1 and 2; for each cubic its polynomial's a1 and a3 read off the
    curve, and by how much value and slope fail to continue at its ends; -d log g / ds at 0 for DPO and the cubics.

    Source: 2405.14953, corollary 3, section 3.4 and figures 4 to 6.
    """
    lam = -math.log(phi)
    # A width below every |s| that is asked for leaves the exact link.
    raw, cubic, adaptive, sigmoid = (
        {"name": "mallows_phi", "lam": lam, "smoothing": 1e-12},
        {"name": "mallows_phi", "lam": lam, "smoothing": width},
        {"name": "mallows_phi_adaptive", "lam": lam},
        {"name": "mallows_phi_sigmoid", "lam": lam},
    )
    values = {
        "right_of_jump": _at(raw, _SIDES),
        "left_of_jump": _at(raw, -_SIDES),
        "exact_at_1": _at(raw, 1.0),
        "exact_at_2": _at(raw, 2.0),
        "sigmoid_at_1": _at(sigmoid, 1.0),
        "dpo_steepness": _steepness({"name": "dpo"}),
    }
    for label, curve, end in (("cubic", cubic, width), ("adaptive", adaptive, 2 * lam)):
        values |= {f"{label}_{key}": value for key, value in _joint(curve, raw, end).items()}
    s = np.linspace(-5, 5, 2001)
    s = s[s != 0]
    curves: dict[str, dict[str, Any]] = {"exact": raw, "sigmoid": sigmoid, "cubic": cubic, "adaptive": adaptive}
    table = pd.DataFrame({"s": s} | {label: link(s=s, **curve) for label, curve in curves.items()})
    return StudyResult(values, {"links": table}, {"links": _phi_figure(table, phi, width)})


def _at(curve: dict[str, Any], s: float) -> float:
    return float(link(s=np.array([s]), **curve)[0])


def _steepness(curve: dict[str, Any], step: float = 1e-6) -> float:
    """-d log g / ds at 0 up to sign: slope over value, the value being 1/2."""
    return (_at(curve, step) - _at(curve, -step)) / (2 * step) / _at(curve, 0.0)


def _joint(curve: dict[str, Any], exact: dict[str, Any], end: float) -> dict[str, float]:
    """The polynomial 1/2 + a1 s + a3 s^3 through two of its points, and how it meets the exact link at ``end``."""
    near, far = end / 3, 2 * end / 3
    rise_near, rise_far = ((_at(curve, s) - 0.5) / s for s in (near, far))
    a3 = (rise_far - rise_near) / (far**2 - near**2)
    a1 = rise_near - a3 * near**2
    step = 1e-4 * end
    # Second order, from each side: the cubic's slope below the end, the exact link's above it.
    slope_in = (3 * _at(curve, end) - 4 * _at(curve, end - step) + _at(curve, end - 2 * step)) / (2 * step)
    slope_out = (-3 * _at(exact, end) + 4 * _at(exact, end + step) - _at(exact, end + 2 * step)) / (2 * step)
    return {
        "a1": a1,
        "a3": a3,
        "value_gap": abs(0.5 + a1 * end + a3 * end**3 - _at(exact, end)),
        "slope_gap": abs(slope_in - slope_out),
        "steepness": _steepness(curve, step=1e-6 * end),
    }


@study("mallows_laws", "the pairwise laws of corollaries 2 and 3 against enumeration of all rankings")
def laws(*, phis: list[Phi], largest: Annotated[int, Field(ge=3, le=8)] = 6, example_phi: Phi = 0.7) -> StudyResult:
    """Corollary 3 (Kendall distance) is the marginal of every pair; corollary 2 (squared distance) is not.

    Enumerates all rankings of n = 2..``largest`` items. Values: ``kendall_gap``, largest |corollary 3 - marginal|;
    ``spearman_gap_n<n>``, largest marginal - corollary 2, and ``spearman_lowest``, the smallest for n >= 3 among
    items next to each other in the centre (farther ones agree to rounding where phi is small);
    ``adjacent_gap``, largest |corollary 2 - marginal given that the two are adjacent|; the example n = 3.

    Source: 2405.14953, corollaries 2 and 3.
    """
    from prefopt.mallows import theta_conditional, theta_pairwise

    rows = [row for n in range(2, largest + 1) for phi in phis for row in _pair_rows(n, phi)]
    table = pd.DataFrame(rows)
    over = table["theta_marginal"] - table["corollary_2"]
    nearest = (table["items"] > 2) & (table["worse"] - table["better"] == 1)
    values = {
        "kendall_gap": float((table["phi_marginal"] - table["corollary_3"]).abs().max()),
        "adjacent_gap": float((table["theta_adjacent"] - table["corollary_2"]).abs().max()),
        "spearman_lowest": float(over[nearest].min()),
    }
    values |= {f"spearman_gap_n{n}": float(over[table["items"] == n].max()) for n in range(2, largest + 1)}
    example = theta_pairwise(3, example_phi)
    for distance in (1, 2):
        values[f"example_marginal_{distance}"] = float(example[0, distance])
        values[f"example_adjacent_{distance}"] = float(theta_conditional(distance, example_phi))
    return StudyResult(values, {"pairs": table}, {"laws": _laws_figure(table, example_phi)})


def _pair_rows(n_items: int, phi: float) -> list[dict[str, float]]:
    """One row per pair of items: marginals of both laws by enumeration beside the two corollaries."""
    from prefopt.mallows import kendall_distance, pairwise_marginal, theta_conditional, theta_law

    rankings, theta = theta_law(n_items, phi)
    kendall = float(phi) ** kendall_distance(rankings)
    kendall /= kendall.sum()
    place = np.argsort(rankings, axis=1)
    rows = []
    for better in range(n_items):
        for worse in range(better + 1, n_items):
            first = place[:, better] < place[:, worse]
            adjacent = np.abs(place[:, better] - place[:, worse]) == 1
            rows.append(
                {
                    "items": n_items,
                    "phi": phi,
                    "better": better,
                    "worse": worse,
                    "phi_marginal": kendall[first].sum(),
                    "corollary_3": float(pairwise_marginal(worse - better, phi)),
                    "theta_marginal": theta[first].sum(),
                    "theta_adjacent": theta[first & adjacent].sum() / theta[adjacent].sum(),
                    "corollary_2": float(theta_conditional(worse - better, phi)),
                }
            )
    return rows


def _theta_figure(s: Any, logistic: Any, curves: dict[float, Any]) -> str:
    from prefopt.figures import COLOURS, DASHES, INK, drawing

    with drawing(6.4, 3.4) as canvas:
        panel = canvas.figure.subplots()
        panel.plot(s, logistic, color=INK, linewidth=5, alpha=0.5, label="logistic (DPO)", solid_capstyle="butt")
        for number, (weight, curve) in enumerate(curves.items()):
            dash = DASHES[number % len(DASHES)]
            panel.plot(s, curve, color=COLOURS[number % len(COLOURS)], linestyle=dash, label=f"c = {weight:g}")
        panel.set_xlabel("s = beta × margin")
        panel.set_ylabel("probability of the chosen response")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas.svg


def _phi_figure(table: pd.DataFrame, phi: float, width: float) -> str:
    from matplotlib.ticker import MaxNLocator

    from prefopt.figures import COLOURS, INK, drawing

    end = -2 * math.log(phi)
    substitutes = (
        ("sigmoid", "sigmoid", "--"),
        ("cubic", f"cubic on ±{width:g}", "-"),
        ("adaptive", f"cubic on ±{end:.3f}", "-."),
    )
    panels = ((5.0, f"phi = {phi:g}"), (1.6 * width, "around the jump"))
    with drawing(7.2, 3.2) as canvas:
        for panel, (reach, title) in zip(canvas.figure.subplots(1, 2), panels, strict=True):
            part = table[table["s"].abs() <= reach]
            # Two pieces: nothing may be drawn across the jump.
            for side, label in ((part[part["s"] < 0], None), (part[part["s"] > 0], "exact, with its jump")):
                panel.plot(side["s"], side["exact"], color=INK, linewidth=4, alpha=0.6, label=label)
            for (column, label, dash), colour in zip(substitutes, COLOURS, strict=False):
                panel.plot(part["s"], part[column], color=colour, linestyle=dash, linewidth=1.6, label=label)
            panel.set_xlabel("s = beta × margin")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.set_title(title)
        handles, labels = panel.get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return canvas.svg


def _laws_figure(table: pd.DataFrame, phi: float) -> str:
    """Both marginals against the central distance at one phi, beside the corollaries."""
    from prefopt.figures import COLOURS, INK, drawing

    shown = table[np.isclose(table["phi"], phi)]
    panels = (
        ("Kendall: corollary 3 is the marginal", "phi_marginal", "corollary_3"),
        ("squared distance: corollary 2 is not", "theta_marginal", "corollary_2"),
    )
    with drawing(7.2, 3.2) as canvas:
        for panel, (title, marginal, corollary) in zip(canvas.figure.subplots(1, 2), panels, strict=True):
            for number, (n_items, part) in enumerate(shown.groupby("items")):
                distance = part["worse"] - part["better"] + 0.06 * (number - 2)
                panel.plot(
                    distance, part[marginal], "o", markersize=4, color=COLOURS[number % 6], label=f"n = {n_items}"
                )
            law = shown.drop_duplicates(corollary).sort_values(corollary)
            panel.plot(law["worse"] - law["better"], law[corollary], color=INK, linewidth=1.2, label="corollary")
            panel.set_title(title)
            panel.set_xlabel("distance of the two items in the centre")
        canvas.figure.axes[0].set_ylabel(f"P(better item first), phi = {phi:g}")
        handles, labels = panel.get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=7, columnspacing=1.0, handlelength=1.2)
    return canvas.svg
