"""From a declared claim and the trials to a number with its interval, and from that to a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from prefopt.evaluation.items import DIRECTION_ONLY, NOT_REPRODUCED, NOT_RUN
from prefopt.grids.check import REFERENCE
from prefopt.grids.estimates import Interval, Values, crossed_interval, seed_interval, welch
from prefopt.grids.measures import Measures, outcome
from prefopt.grids.runs import CURVE_METRICS, Missing

Row = Mapping[str, Any]
FRONTIER_PLACES = 20


def judge(row: Row, scale: str, measured: Callable[[Row], tuple[Interval, dict[str, Any]]]) -> dict[str, Any]:
    """Difference, p, verdict and reason of one claim, and what ``measured`` adds to its row.

    The verdict is the direction alone: numbers of small models are not compared with reported ones. A claim whose runs
    are not here, or whose interval would need more seeds, was not run at this scale.
    """
    try:
        interval, more = measured(row)
    except Missing as missing:
        return {"difference": None, "p": None, "verdict": NOT_RUN, "reason": str(missing)}
    found = {"difference": interval.summary(), "p": interval.p} | more
    if interval.low is None or interval.high is None:
        return found | {"verdict": NOT_RUN, "reason": "one seed: no interval over seeds"}
    holds, why = _direction(row.get("sign") or "above", interval.low, interval.high, row.get("margin") or 0.0)
    if holds:
        why = f"{why}; numbers are not compared at the scale '{scale}'"
    return found | {"verdict": DIRECTION_ONLY if holds else NOT_REPRODUCED, "reason": why}


def _direction(sign: str, low: float, high: float, margin: float) -> tuple[bool, str]:
    """Whether an interval lies where the claim says, and the sentence that says so; ``margin`` is of sign equal."""
    text = f"the interval [{low:.3g}, {high:.3g}]"
    if sign == "equal":
        if max(-low, high) > margin:
            return False, f"{text} reaches beyond ±{margin:g}"
        if low <= 0 <= high:
            return True, f"{text} contains 0 and lies within ±{margin:g}"
        return False, f"{text} lies within ±{margin:g} and does not contain 0: a small difference is shown"
    if low <= 0 <= high:
        return False, f"{text} reaches 0: no direction shown"
    above = low > 0
    wanted = sign in ("above", "rises")
    where = f"{text} lies {'above' if above else 'below'} 0"
    return above == wanted, where if above == wanted else f"{where}: the opposite direction"


def _two(a: int, b: int | None) -> tuple[int, int]:
    """The points of a claim that is about two arms; one about an arm and a number, or the reference, has no second."""
    if b is None:
        raise ValueError("a claim about two arms has two points")
    return a, b


@dataclass(frozen=True)
class RunClaims:
    """Claims about trained runs: compare, frontier, trend."""

    measures: Measures

    def measured(self, row: Row) -> tuple[Interval, dict[str, Any]]:
        """The claim's difference or slope; a compare claim over several draws adds ``welch``."""
        return {"compare": self.compare, "frontier": self.frontier, "trend": self.trend}[row["kind"]](row)

    def compare(self, row: Row) -> tuple[Interval, dict[str, Any]]:
        """arm - than, averaged over conditions and matched points, crossed over seeds and prompts.

        win_rate is head to head: 100 P(arm's answer scores higher, ties half) - 50. Metrics of the training curve have
        one value per seed.
        """
        self._check_arms(row)
        by_seed = self._over_seeds(lambda seed: self._mean_of_pairs(row, seed, self._difference))
        if row["metric"] in CURVE_METRICS:
            return seed_interval(np.array(list(by_seed.values()))), {}
        interval = crossed_interval(np.stack([draws.mean(axis=0) for draws in by_seed.values()]))
        if self.measures.grid.spec["draws"] == 1:
            return interval, {}
        return interval, {"welch": self._welch(row, list(by_seed))}

    def frontier(self, row: Row) -> tuple[Interval, dict[str, Any]]:
        """arm - than at equal sequence KL, mean of 20 values of KL that both curves of a seed cover."""
        self._check_arms(row)
        by_seed = self._over_seeds(lambda seed: self._mean_of_pairs(row, seed, self._between_curves))
        prompts = len(next(iter(self.measures.grid.runs.values())).last(row["set"]).prompt_id)
        return seed_interval(np.array(list(by_seed.values())), prompts), {}

    def trend(self, row: Row) -> tuple[Interval, dict[str, Any]]:
        """Least-squares slope of a quantity over the conditions' values, per seed."""
        self._check_arms(row)
        grid = self.measures.grid
        places = {c: grid.spec["conditions"][c]["value"] for c in self._conditions(row)}
        places = {c: value for c, value in places.items() if value is not None}
        if len(set(places.values())) < 2:
            raise Missing("fewer than two conditions with a value ran")
        if row["quantity"].startswith("selected.") and all(len(grid.points_of(c, row["arm"])) == 1 for c in places):
            raise Missing(f"{row['arm']} ran at one setting: there is nothing to select")
        x = np.array(list(places.values()), dtype=float)
        slopes = self._over_seeds(lambda seed: slope(x, np.array([self._quantity(row, c, seed) for c in places])))
        return seed_interval(np.array(list(slopes.values()))), {}

    def _check_arms(self, row: Row) -> None:
        """Missing where an arm is not part of this tier of the grid."""
        for arm in self._arms(row):
            if arm not in self.measures.grid.spec["arms"]:
                raise Missing(f"not run: {arm}")

    @staticmethod
    def _arms(row: Row) -> list[str]:
        return [arm for arm in (row["arm"], row.get("than")) if isinstance(arm, str) and arm != REFERENCE]

    def _conditions(self, row: Row) -> list[str]:
        """The claim's conditions, or all, in which its arms have points; Missing where there is none.

        The quick tier has part of the conditions: a claim is then about these.
        """
        grid = self.measures.grid
        named = [c for c in grid.spec["conditions"] if c in (row.get("conditions") or grid.spec["conditions"])]
        shared = [c for c in named if all(grid.points_of(c, arm) for arm in self._arms(row))]
        if not shared:
            raise Missing(f"not run: {' and '.join(self._arms(row))} in one condition")
        return shared

    def _over_seeds(self, measure: Callable[[int], Any]) -> dict[int, Any]:
        """``measure`` for every seed whose runs are all here; Missing, with the first reason, where none is whole."""
        found, reasons = {}, []
        for seed in self.measures.grid.spec["seeds"]:
            try:
                found[seed] = measure(seed)
            except Missing as missing:
                reasons.append(missing)
        if not found:
            raise reasons[0]
        return found

    def _pairs(self, row: Row) -> Iterator[tuple[int, int | None]]:
        """Points of arm and than to compare, over the claim's conditions; None where than is no arm.

        Where both sides mean several points, those with the same values of the settings that both have belong together.
        """
        for condition in self._conditions(row):
            mine = self.measures.points_at(condition, row["arm"], row.get("arm_at", "selected"))
            if len(self._arms(row)) == 1:
                yield from ((a, None) for a in mine)
                continue
            others = self.measures.points_at(condition, row["than"], row.get("than_at", "selected"))
            several = len(mine) > 1 and len(others) > 1
            pairs = [(a, b) for a in mine for b in (self.measures.grid.partners(a, others) if several else others)]
            if not pairs:
                raise Missing(f"{row['arm']} and {row['than']} have no points of equal settings in {condition}")
            yield from pairs

    def _mean_of_pairs(self, row: Row, seed: int, between: Callable[[Row, int, int | None, int], Any]) -> Any:
        """Mean over conditions of the mean over a condition's pairs of points."""
        grid = self.measures.grid
        by_condition: dict[str, list[Any]] = {}
        for a, b in self._pairs(row):
            by_condition.setdefault(grid.points[a]["condition"], []).append(between(row, a, b, seed))
        return np.mean([np.mean(values, axis=0) for values in by_condition.values()], axis=0)

    def _difference(self, row: Row, a: int, b: int | None, seed: int) -> Any:
        """arm - than of one pair and seed: [draws, prompts], or a number for metrics of the training curve."""
        metric, name, than = row["metric"], row["set"], row["than"]
        grid, measures = self.measures.grid, self.measures
        if metric in CURVE_METRICS:
            fixed = 0.0 if than == REFERENCE else than
            return grid.run(a, seed).at_end(metric) - (fixed if b is None else grid.run(b, seed).at_end(metric))
        if metric == "win_rate":
            if not isinstance(than, str):
                return measures.rate(a, seed, name) - than
            rival = grid.reference_run(seed) if b is None else grid.run(b, seed)
            return 100 * outcome(grid.run(a, seed).last(name).score, rival.last(name).score) - 50
        mine = measures.of(grid.run(a, seed).last(name), metric)
        if b is not None:
            return mine - measures.of(grid.run(b, seed).last(name), metric)
        return mine - (measures.reference_values(seed, name, metric) if than == REFERENCE else than)

    def _welch(self, row: Row, seeds: list[int]) -> dict[str, float] | None:
        """Welch's test over the draws' means of both sides; win rates are each against the arms' common opponent."""
        grid, metric = self.measures.grid, row["metric"]
        arms = self._arms(row)
        if len(arms) == 1 or (metric == "win_rate" and len({grid.spec["arms"][a]["against"] for a in arms}) > 1):
            return None
        try:
            mine, other = (
                np.mean([self._mean_of_pairs(row, seed, partial(self._draw_means, side)) for seed in seeds], axis=0)
                for side in (0, 1)
            )
        except Missing:  # an opponent that did not run
            return None
        return welch(mine, other)

    def _draw_means(self, side: int, row: Row, a: int, b: int | None, seed: int) -> Values:
        return self.measures.draw_means(_two(a, b)[side], seed, row["set"], row["metric"])

    def _between_curves(self, row: Row, a: int, b: int | None, seed: int) -> float:
        first, second = (self.curve(point, seed, row["set"], row["metric"]) for point in _two(a, b))
        return between_curves(first, second, row.get("part") or "all")

    def curve(self, point: int, seed: int, name: str, metric: str) -> tuple[Values, Values]:
        """Mean KL and mean metric after each fraction of a run: two arrays [fractions]."""
        run = self.measures.grid.run(point, seed)
        run.last(name)
        found = [[self.measures.of(answers, m).mean() for answers in run.sets[name].values()] for m in ("kl", metric)]
        return np.array(found[0]), np.array(found[1])

    def _quantity(self, row: Row, condition: str, seed: int) -> float:
        """A trend's quantity in one condition and seed, at the points that this seed's validation selects."""
        measures, grid = self.measures, self.measures.grid
        (point,) = measures.points_at(condition, row["arm"], "selected", seed)
        if row["quantity"].startswith("selected."):
            return float(np.log(grid.points[point]["settings"][row["quantity"].removeprefix("selected.")]))
        run = grid.run(point, seed)
        if row["quantity"] == "member_bias":
            return member_bias(run.curve, grid.spec["arms"][row["arm"]]["member_bias"])
        mine = measures.of(run.last(row["set"]), "reward").mean()
        if row["than"] == REFERENCE:
            return float(mine - measures.reference_values(seed, row["set"], "reward").mean())
        (other,) = measures.points_at(condition, row["than"], "selected", seed)
        return float(mine - measures.of(grid.run(other, seed).last(row["set"]), "reward").mean())


def slope(x: Values, y: Values) -> float:
    """Least-squares slope of ``y`` over ``x``; exactly 0 where ``y`` is constant."""
    centred = x - x.mean()
    return float(centred @ (y - y[0]) / (centred @ centred))


def between_curves(first: tuple[Values, Values], second: tuple[Values, Values], part: str) -> float:
    """Mean of first - second over 20 even places of the KL that both cover; each curve is (kl, metric), linear between.

    ``part``: the lower half of that range (low), its upper half (high), or all. Missing where they share no KL.
    """
    curves = [(kl[order], metric[order]) for kl, metric in (first, second) for order in [np.argsort(kl, kind="stable")]]
    low, high = max(kl[0] for kl, _ in curves), min(kl[-1] for kl, _ in curves)
    if low >= high:
        raise Missing("the two curves share no range of KL")
    middle = (low + high) / 2
    limits = {"low": (low, middle), "high": (middle, high), "all": (low, high)}[part]
    places = np.linspace(*limits, FRONTIER_PLACES)
    values = [np.interp(places, kl, metric) for kl, metric in curves]
    return float(np.mean(values[0] - values[1]))


def member_bias(curve: Mapping[str, Values], biases: list[float] | None) -> float:
    """Mean bias of the members that pairs matched in the first tenth of training, weighted by their shares."""
    if biases is None or any(f"member_{k}" not in curve for k in range(len(biases))):
        raise Missing("the members that pairs matched were not recorded")
    steps = max(1, len(curve["member_0"]) // 10)
    shares = np.array([curve[f"member_{k}"][:steps].mean() for k in range(len(biases))])
    return float(shares @ np.array(biases) / shares.sum())
