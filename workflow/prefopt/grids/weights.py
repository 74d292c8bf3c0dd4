"""Dispersion weights of a training set: their spread and shape, closed against open prompts, bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.grids.estimates import LEVEL, Interval, Values
from prefopt.grids.runs import Missing

RESAMPLES = 2000
BINS = 40
EXTREMES = 5
_BLOCK = 250  # resamples at once: memory, not results


@dataclass(frozen=True)
class Sample:
    """Weights [N pairs] of one condition with each pair's prompt, its kind (None where unknown) and its text."""

    phi_star: float
    weight: Values
    prompt_id: NDArray[np.int64]
    kind: NDArray[Any]
    text: NDArray[Any]

    def counts(self, seed: int) -> Iterator[Values]:
        """Blocks [R, N] of how often each pair stands in a resample of the prompts."""
        prompts, place = np.unique(self.prompt_id, return_inverse=True)
        rng = np.random.default_rng([20240514, seed])
        for _ in range(0, RESAMPLES, _BLOCK):
            drawn = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=_BLOCK)
            yield drawn[:, place].astype(float)

    def of_kind(self, name: str) -> NDArray[np.bool_]:
        """Which pairs are ``closed`` or ``open``; Missing where none is."""
        found = self.kind == name
        if not found.any():
            raise Missing(f"no pair says that its prompt is {name}")
        return found


def sd(sample: Sample, counts: Values) -> Values:
    """Standard deviation of the weights per resample."""
    return np.sqrt(_central(sample, counts, 2))


def skewness(sample: Sample, counts: Values) -> Values:
    """Third central moment over sd cubed per resample; 0 without spread."""
    spread = sd(sample, counts)
    return np.where(spread > 0, _ratio(_central(sample, counts, 3), spread**3), 0.0)


def _ratio(above: Values, below: Values) -> Values:
    """NaN where a resample has nothing to divide by, such as no closed prompt."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _central(sample: Sample, counts: Values, power: int) -> Values:
    total = counts.sum(axis=1)
    mean = counts @ sample.weight / total
    return (counts * (sample.weight - mean[:, None]) ** power).sum(axis=1) / total


def closed_minus_open(sample: Sample, counts: Values) -> Values:
    """Mean weight of closed minus that of open prompts per resample."""
    means = []
    for name in ("closed", "open"):
        chosen = sample.of_kind(name)
        means.append(_ratio(counts[:, chosen] @ sample.weight[chosen], counts[:, chosen].sum(axis=1)))
    return means[0] - means[1]


def auroc_closed(sample: Sample, counts: Values) -> Values:
    """P(a closed prompt's weight is above an open one's), ties half, per resample."""
    closed, other = sample.of_kind("closed"), sample.of_kind("open")
    order = np.argsort(sample.weight[other], kind="stable")
    ranked = sample.weight[other][order]
    below = np.pad(np.cumsum(counts[:, other][:, order], axis=1), ((0, 0), (1, 0)))
    sides = [below[:, np.searchsorted(ranked, sample.weight[closed], side=side)] for side in ("left", "right")]
    beaten = (counts[:, closed] * (sides[0] + sides[1]) / 2).sum(axis=1)
    return _ratio(beaten, counts[:, closed].sum(axis=1) * below[:, -1])


QUANTITIES: Mapping[str, Callable[[Sample, Values], Values]] = {
    "sd": sd,
    "skewness": skewness,
    "closed_minus_open": closed_minus_open,
    "auroc_closed": auroc_closed,
}


def value_of(sample: Sample, quantity: str) -> float:
    """The quantity of the sample itself."""
    return float(QUANTITIES[quantity](sample, np.ones((1, len(sample.weight))))[0])


def weights_claim(row: Mapping[str, Any], samples: Mapping[str, Sample]) -> tuple[Interval, dict[str, Any]]:
    """Quantity of a condition minus that of another, or minus a number: percentile bootstrap over prompts.

    Two conditions are resampled independently; ``p`` is twice the smaller share of resamples on one side of 0.
    Missing where a condition or its kinds are not here.
    """
    sides = [row["condition"], *([row["than"]] if isinstance(row["than"], str) else [])]
    if absent := [name for name in sides if name not in samples]:
        raise Missing(f"not run: {', '.join(absent)}")
    level = 0.0 if isinstance(row["than"], str) else float(row["than"])
    mean, drawn, signs = -level, np.full(RESAMPLES, -level), (1, -1)
    for place, (name, sign) in enumerate(zip(sides, signs, strict=False)):
        sample, statistic = samples[name], QUANTITIES[row["quantity"]]
        mean += sign * value_of(sample, row["quantity"])
        drawn = drawn + sign * np.concatenate([statistic(sample, counts) for counts in sample.counts(place)])
    drawn = drawn[np.isfinite(drawn)]  # a small sample drawn again may lack one kind
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    one_sided = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(one_sided)) / (1 + len(drawn)))
    prompts = min(len(np.unique(samples[name].prompt_id)) for name in sides)
    return Interval(mean, float(low), float(high), p, 1, prompts), {}


def describe(samples: Mapping[str, Sample]) -> dict[str, dict[str, Any]]:
    """Per condition what item.json holds of its weights; one row of bin edges for all conditions.

    Histogram heights are shares of the condition's pairs: closed, open and other add up to 1.
    """
    if not samples:
        return {}
    everything = np.concatenate([sample.weight for sample in samples.values()])
    edges = np.histogram_bin_edges(everything, BINS)
    return {name: _describe(sample, edges) for name, sample in samples.items()}


def _describe(sample: Sample, edges: Values) -> dict[str, Any]:
    kinds = {"closed": sample.kind == "closed", "open": sample.kind == "open"}
    kinds["other"] = ~(kinds["closed"] | kinds["open"])
    heights = {
        name: (np.histogram(sample.weight[chosen], edges)[0] / len(sample.weight)).tolist()
        for name, chosen in kinds.items()
    }
    order = np.argsort(sample.weight, kind="stable")
    return {
        "phi_star": sample.phi_star,
        "mean": float(sample.weight.mean()),
        "sd": value_of(sample, "sd"),
        "skewness": value_of(sample, "skewness"),
        "closed_minus_open": _or_none(sample, "closed_minus_open"),
        "auroc_closed": _or_none(sample, "auroc_closed"),
        "pairs": len(sample.weight),
        "histogram": {"edges": edges.tolist(), **heights},
        "lowest": _extremes(sample, order),
        "highest": _extremes(sample, order[::-1]),
    }


def _or_none(sample: Sample, quantity: str) -> float | None:
    try:
        return value_of(sample, quantity)
    except Missing:
        return None


def _extremes(sample: Sample, order: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The first five different prompts of an order."""
    _, first = np.unique(sample.prompt_id[order], return_index=True)
    kept = order[np.sort(first)[:EXTREMES]]
    return [{"prompt": str(sample.text[i]), "weight": float(sample.weight[i]), "kind": sample.kind[i]} for i in kept]
