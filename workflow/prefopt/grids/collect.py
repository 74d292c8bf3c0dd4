"""From the trials of a grid item, or its dispersion weights, to the content of item.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from prefopt.evaluation.items import NO_CLAIM, WEAKEST_FIRST
from prefopt.grids.claims import RunClaims, judge
from prefopt.grids.estimates import METHOD, Interval, Values, crossed_interval, seed_interval
from prefopt.grids.lengths import length_controlled
from prefopt.grids.measures import Measures, outcome
from prefopt.grids.runs import CURVES, Answers, Grid, Missing, Trial
from prefopt.grids.weights import Sample, describe, weights_claim

CURVE_BINS = 25
_DIGITS = 5


def collect_runs(
    spec: Mapping[str, Any], runs: Mapping[tuple[int, int], Trial], reference: Mapping[int, Trial]
) -> dict[str, Any]:
    """The content of ``item.json`` of a grid over trained runs.

    ``spec`` is the item node's (item, grid, expect); ``runs`` holds the trials that are here by (point, seed),
    ``reference`` those of the reference by seed. Raises FailedCheck where trials answered different prompts.
    """
    measures = Measures(Grid(spec["grid"], runs, reference))
    grid, sets = measures.grid, spec["grid"]["sets"]
    return _item(spec, RunClaims(measures).measured) | {
        "points": [_point(measures, i) for i in range(len(grid.points))],
        "frontier": _frontier(measures) if len(spec["grid"]["at"]) > 1 else [],
        "reference": {name: found for name in sets if (found := _reference(measures, name))},
    }


def collect_weights(spec: Mapping[str, Any], samples: Mapping[str, Sample]) -> dict[str, Any]:
    """The content of ``item.json`` of the layout histogram: ``samples`` by condition, those that are here."""
    item = _item(spec, lambda row: weights_claim(row, samples))
    return item | {"points": [], "frontier": [], "weights": describe(samples), "reference": {}}


def _item(spec: Mapping[str, Any], measured: Callable[..., Any]) -> dict[str, Any]:
    """What every grid item holds: head, declaration, and the claims with their verdicts."""
    grid, head = spec["grid"], spec["item"]
    rows = [{**row, **judge(row, head["scale"], measured)} for row in spec["expect"]]
    verdicts = {row["verdict"] for row in rows}
    return {
        **head,
        "kind": "grid",
        "tier": grid["tier"],
        "layout": grid["layout"],
        "method": METHOD,
        "conditions": grid["conditions"],
        **{key: grid.get(key, empty) for key, empty in (("arms", {}), ("sets", []), ("seeds", []))},
        "draws": grid.get("draws", 1),
        "select": grid.get("select"),
        "expect": rows,
        "verdict": next((v for v in WEAKEST_FIRST if v in verdicts), NO_CLAIM),
    }


def _or_none(measure: Callable[..., Any], *arguments: Any) -> Any:
    """What ``measure`` returns; None where the runs for it are not here."""
    try:
        return measure(*arguments)
    except Missing:
        return None


def _summary(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.summary()


def _point(measures: Measures, number: int) -> dict[str, Any]:
    """One point: its runs by seed, its metrics on every set, its training curve."""
    grid = measures.grid
    point, seeds = grid.points[number], grid.seeds_of(number)
    return {
        **point,
        "selected": number == _or_none(measures.selected, point["condition"], point["arm"]),
        "runs": {str(seed): grid.run(number, seed).ref for seed in seeds},
        "sets": {
            name: found for name in grid.spec["sets"] if seeds and (found := _or_none(_set, measures, number, name))
        },
        "curve": _curves([grid.run(number, seed) for seed in seeds]),
    }


def _set(measures: Measures, number: int, name: str) -> dict[str, Any]:
    """Metrics of one point on one set, seeds and prompts crossed."""
    grid = measures.grid
    seeds = grid.seeds_of(number)
    answers = [grid.run(number, seed).last(name) for seed in seeds]
    found = {metric: _over_runs(measures, answers, metric) for metric in ("reward", "kl", "tokens", "score_positive")}
    rewards = np.stack([a.score.mean(axis=0) for a in answers])
    levels = _or_none(lambda: np.stack([measures.reference_values(seed, name, "reward") for seed in seeds]))
    found["advantage"] = None if levels is None else crossed_interval(rewards - levels).summary()
    rivals = _or_none(lambda: np.stack([measures.opponent(number, s, name).score.mean(axis=0) for s in seeds]))
    found["difference"] = None if rivals is None else crossed_interval(rewards - rivals).summary()
    rates, found["win_rate"], found["lc_win_rate"] = _win_rates(measures, number, name)
    if answers[0].score.shape[0] > 1:
        of_draws = {"reward": np.stack([a.score for a in answers]), "win_rate": rates}
        found["sd_over_draws"] = {
            metric: None if values is None else float(np.std(values.mean(axis=(0, 2)), ddof=1))
            for metric, values in of_draws.items()
        }
    return found


def _over_runs(measures: Measures, answers: list[Answers], metric: str) -> dict[str, Any] | None:
    """A metric over seeds and prompts, each prompt's draws averaged first."""
    values = _or_none(lambda: np.stack([measures.of(a, metric).mean(axis=0) for a in answers]))
    return None if values is None else crossed_interval(values).summary()


def _win_rates(measures: Measures, number: int, name: str) -> tuple[Values | None, Any, Any]:
    """Outcomes in percent [S, D, P], win rate and length-controlled win rate over the seeds that have an opponent."""
    grid = measures.grid
    point = grid.points[number]
    if grid.spec["arms"][point["arm"]]["against"] == point["arm"]:
        even = Interval(50.0, None, None, None, len(grid.seeds_of(number)), 0).summary()
        return None, even, even
    found = [(seed, _or_none(measures.opponent, number, seed, name)) for seed in grid.seeds_of(number)]
    pairs = [(grid.run(number, seed).last(name), other) for seed, other in found if other is not None]
    if not pairs:
        return None, None, None
    outcomes = np.stack([outcome(a.score, b.score) for a, b in pairs])
    longer = np.stack([b.tokens - a.tokens for a, b in pairs])
    rate = crossed_interval(100 * outcomes.mean(axis=1))
    return 100 * outcomes, rate.summary(), _summary(length_controlled(outcomes, longer))


def _reference(measures: Measures, name: str) -> dict[str, Any] | None:
    """The reference's own reward and tokens over its seeds."""
    answers = _or_none(lambda: [run.last(name) for run in measures.grid.reference.values()])
    return {m: _over_runs(measures, answers, m) for m in ("reward", "tokens")} if answers else None


def _frontier(measures: Measures) -> list[dict[str, Any]]:
    """KL, reward and positive share of the main set after every fraction of every point's runs."""
    grid = measures.grid
    rows = []
    for number, point in enumerate(grid.points):
        runs = [grid.run(number, seed) for seed in grid.seeds_of(number)]
        fractions = {fraction for run in runs for fraction in run.sets.get(grid.main_set, {})}
        for fraction in sorted(fractions):  # of an arm in rounds, one per round
            answers = [a for run in runs if (a := run.sets.get(grid.main_set, {}).get(fraction)) is not None]
            if answers:
                metrics = {m: _over_runs(measures, answers, m) for m in ("kl", "reward", "score_positive")}
                rows.append({**point, "fraction": fraction, "step": answers[0].step, **metrics})
    return rows


def _curves(runs: list[Trial]) -> dict[str, list[list[float | None]]]:
    """Training curves over fractions of the run, [fraction, mean, low, high] with the t interval over seeds."""
    found: dict[str, list[list[float | None]]] = {}
    for key in CURVES:
        if binned := _binned(runs, key):
            places, values = binned
            limits = [seed_interval(column) for column in values.T]
            found[key] = [
                [_short(x), _short(i.mean), _short(i.low), _short(i.high)] for x, i in zip(places, limits, strict=True)
            ]
    members: list[Any] = []
    while binned := _binned(runs, f"member_{len(members)}"):
        places = binned[0]
        members.append(binned[1].mean(axis=0))
    if members:
        found["members"] = [
            [_short(x), *map(_short, row)] for x, row in zip(places, np.transpose(members), strict=True)
        ]
    return found


def _binned(runs: list[Trial], key: str) -> tuple[Values, Values] | None:
    """Middle of each bin of steps as a fraction of the run [B], and the curve's mean in it per seed [S, B]."""
    if not runs or any(not len(run.curve.get(key, ())) for run in runs):
        return None
    steps = min(len(run.curve[key]) for run in runs)
    edges = np.linspace(0, steps, min(steps, CURVE_BINS) + 1).astype(int)
    counts = np.diff(edges)
    values = np.stack([np.add.reduceat(run.curve[key][:steps], edges[:-1]) / counts for run in runs])
    return (edges[:-1] + edges[1:]) / (2 * steps), values


def _short(value: float | None) -> float | None:
    """Five significant digits: what a picture can show, at a third of the size."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")
