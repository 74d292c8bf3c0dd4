"""What is measured of answers: metrics per draw and prompt, opponents, win rates, and the selected points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefopt.grids.check import REFERENCE
from prefopt.grids.estimates import Values
from prefopt.grids.runs import Answers, Grid, Missing


def outcome(mine: Values, other: Values) -> Values:
    """1 where ``mine`` is above ``other``, 0.5 where equal, 0 below."""
    return 0.5 + 0.5 * np.sign(mine - other)


@dataclass(frozen=True)
class Measures:
    """Metrics over the trials of a grid; every array is [draws, prompts] of one run."""

    grid: Grid
    _chosen: dict[tuple[str, str, int | None], int | None] = field(default_factory=dict)

    def of(self, answers: Answers, metric: str) -> Values:
        """reward (score), tokens, kl (log policy - log reference of the answer, nats) or score_positive (0 or 1).

        A score is positive above 0.5 for a classifier's probability, above 0 for any other judge. Missing where the
        answers were not scored under both models.
        """
        if metric == "kl":
            if not np.isfinite(answers.log_ratio).all():
                raise Missing("the answers were not scored under policy and reference")
            return answers.log_ratio
        if metric == "score_positive":
            return (answers.score > (0.5 if self.grid.spec.get("judge") == "classifier" else 0.0)).astype(float)
        return {"reward": answers.score, "tokens": answers.tokens}[metric]

    def reference_values(self, seed: int, name: str, metric: str) -> Values:
        """A metric per prompt of the reference's answers of that seed, mean over its draws [P]; kl is 0 by definition.

        The reference draws with the same seeds as the policies: where they agree, so do their answers, and the noise
        of sampling cancels from a difference.
        """
        return self.of(self.grid.reference_run(seed).last(name), metric).mean(axis=0)

    def opponent(self, point: int, seed: int, name: str) -> Answers:
        """Answers that a point's win rate is against: of its arm's ``against``, same condition, seed and settings.

        Where several points agree in the settings, the selected one of them. Missing where there is none.
        """
        declared = self.grid.points[point]
        against = self.grid.spec["arms"][declared["arm"]]["against"]
        if against == REFERENCE:
            return self.grid.reference_run(seed).last(name)
        found = self.grid.partners(point, self.grid.points_of(declared["condition"], against))
        if len(found) > 1:
            found = [i for i in found if i == self.selected(declared["condition"], against)]
        if not found:
            raise Missing(f"{against} has no point with the settings of {declared['arm']} in {declared['condition']}")
        return self.grid.run(found[0], seed).last(name)

    def rate(self, point: int, seed: int, name: str) -> Values:
        """Win rate in percent per draw and prompt against the point's opponent."""
        return 100 * outcome(self.grid.run(point, seed).last(name).score, self.opponent(point, seed, name).score)

    def selected(self, condition: str, arm: str, seed: int | None = None) -> int | None:
        """The point with the highest mean of ``select``'s metric on its set, over all seeds or of one; first on ties.

        The only point of an arm counts as selected; None where nothing can be selected.
        """
        key = (condition, arm, seed)
        if key not in self._chosen:
            self._chosen[key] = self._select(self.grid.points_of(condition, arm), seed)
        return self._chosen[key]

    def _select(self, points: Sequence[int], seed: int | None) -> int | None:
        select = self.grid.spec.get("select")
        if len(points) == 1 or select is None:
            return points[0] if len(points) == 1 else None
        best, highest = None, -np.inf
        for point in points:
            seeds = [s for s in self.grid.seeds_of(point) if seed in (None, s)]
            if not seeds:
                continue
            answers = [self.grid.run(point, s).last(select["set"]) for s in seeds]
            mean = float(np.mean([self.of(a, select["metric"]).mean() for a in answers]))
            if mean > highest:
                best, highest = point, mean
        return best

    def points_at(self, condition: str, arm: str, at: str | dict[str, Any], seed: int | None = None) -> list[int]:
        """Points that ``at`` means: ``selected``, ``all``, or those with the given settings; Missing if none."""
        points = self.grid.points_of(condition, arm)
        if not points:
            raise Missing(f"not run: {arm} in {condition}")
        if at == "all":
            return points
        if isinstance(at, str):  # "selected"
            chosen = self.selected(condition, arm, seed)
            if chosen is None:
                raise Missing(f"not run, or nothing selects one of {len(points)} points: {arm} in {condition}")
            return [chosen]
        found = [i for i in points if at.items() <= self.grid.points[i]["settings"].items()]
        if not found:
            raise Missing(f"not run: {arm} in {condition} at {', '.join(f'{k} {v}' for k, v in at.items())}")
        return found

    def draw_means(self, point: int, seed: int, name: str, metric: str) -> Values:
        """Mean over prompts per draw [draws] of an answer metric or of win_rate."""
        if metric == "win_rate":
            return self.rate(point, seed, name).mean(axis=1)
        return self.of(self.grid.run(point, seed).last(name), metric).mean(axis=1)
