"""MallowsPO's dispersion estimator against the true dispersion of Mallows-phi rankings (figure 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefopt.lazy import LazyModule
from prefopt.specs import Count, Positive
from prefopt.studies.registry import StudyResult, study

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")


def estimate_curve(n_items: int, phi_star: float, lam: NDArray[np.float64]) -> NDArray[np.float64]:
    """The noiseless estimate -phi_star log(H / log n) of lambda = -log phi, H the entropy of the top item.

    The bottom item's law is the top item's mirrored, so both have the same entropy.

    Source: 2405.14953, eq. 11 and figure 3.
    """
    from prefopt.dispersion import dispersion_weight
    from prefopt.mallows import top_item_law

    laws = [top_item_law(n_items, math.exp(-value)) for value in lam]
    return dispersion_weight([-(law * np.log(law)).sum() / math.log(n_items) for law in laws], phi_star)


def sampled_estimate(
    rng: np.random.Generator, n_items: int, phi_star: float, lam: float, rankings: int
) -> float:  # fmt: skip
    """The estimate from the best (chosen) and the worst (rejected) items of sampled rankings."""
    from prefopt.dispersion import dispersion_weight, normalised_entropy
    from prefopt.mallows import sample_mallows_phi

    drawn = sample_mallows_phi(rng, n_items, math.exp(-lam), rankings)
    chosen, rejected = (_entropy(np.bincount(drawn[:, place], minlength=n_items)) for place in (0, -1))
    return float(dispersion_weight(normalised_entropy([chosen], [rejected], [1], [1], n_items), phi_star)[0])


def _entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of observed counts in nats, plus Miller and Madow's (classes - 1) / (2 size) for its bias."""
    seen = counts[counts > 0]
    share = seen / seen.sum()
    corrected = -(share * np.log(share)).sum() + (len(seen) - 1) / (2 * seen.sum())
    return float(min(corrected, math.log(len(counts))))


@study("mallows_estimator", "the entropy estimate of dispersion against the truth: closed form and sampling")
def estimator(
    *,
    n_items: Annotated[int, Field(ge=2)] = 5,
    phi_star: Positive = 1.39,
    lambdas: list[Positive],
    rankings: Count = 5000,
    repeats: Annotated[int, Field(ge=2)] = 20,
    seed: int = 0,
) -> StudyResult:
    """x = estimate, y = true -log phi: the closed form, and the mean over repeated samples with its error.

    Values: ``y_at_<x>``, the closed form read at x = .5, 1, 2, 3; ``crossing``, where it meets y = x;
    ``largest_deviation`` of |y - x| on the range; ``largest_z`` of sampled mean against closed form over all points,
    in standard errors; ``share_inside``, the share of 95 % intervals that hold the closed form.

    Source: 2405.14953, figure 3; n and phi_star are inferred from its points.
    """
    from scipy.optimize import brentq
    from scipy.stats import t

    rng, lam = np.random.default_rng(seed), np.asarray(lambdas, dtype=float)
    exact = estimate_curve(n_items, phi_star, lam)
    sampled = np.array(
        [[sampled_estimate(rng, n_items, phi_star, value, rankings) for _ in range(repeats)] for value in lam]
    )
    mean, error = sampled.mean(axis=1), sampled.std(axis=1, ddof=1) / math.sqrt(repeats)
    reach = t.ppf(0.975, repeats - 1) * error
    table = pd.DataFrame(
        {"neg_log_phi": lam, "closed_form": exact, "sampled": mean, "low": mean - reach, "high": mean + reach}
        | {"one_sample_sd": sampled.std(axis=1, ddof=1), "deviation": lam - exact, "z": (mean - exact) / error}
    )

    def at(value: float) -> float:
        return float(estimate_curve(n_items, phi_star, np.array([value]))[0])

    values = {f"y_at_{x:g}": brentq(lambda y, x=x: at(y) - x, 1e-3, 20.0) for x in (0.5, 1.0, 2.0, 3.0)}
    values |= {
        "crossing": brentq(lambda y: at(y) - y, 1.0, 20.0),
        "largest_deviation": float(np.abs(lam - exact).max()),
        "largest_z": float(table["z"].abs().max()),
        "share_inside": float(((table["low"] <= exact) & (exact <= table["high"])).mean()),
    }
    return StudyResult(values, {"points": table}, {"estimator": _figure(table, sampled, n_items, phi_star)})


def _figure(table: pd.DataFrame, sampled: NDArray[np.float64], n_items: int, phi_star: float) -> str:
    from prefopt.figures import COLOURS, INK, drawing

    with drawing(5.2, 3.8) as canvas:
        panel = canvas.figure.subplots()
        top = float(table["neg_log_phi"].max())
        panel.plot([0, top], [0, top], color=INK, linestyle=(0, (4, 3)), linewidth=0.8, label="y = x")
        panel.plot(table["closed_form"], table["neg_log_phi"], color=COLOURS[0], linewidth=1.6, label="closed form")
        panel.plot(
            sampled.ravel(), np.repeat(table["neg_log_phi"], sampled.shape[1]), ".", color=COLOURS[1], markersize=3,
            alpha=0.45, label="single samples",
        )  # fmt: skip
        panel.set_xlabel(f"estimate −φ* log(H / log n), n = {n_items}, φ* = {phi_star:g}")
        panel.set_ylabel("true −log φ")
        panel.legend(loc="upper left")
    return canvas.svg
