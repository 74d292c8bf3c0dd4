"""The finished trials of a grid item as arrays, and which of them belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.errors import FailedCheck
from prefopt.grids.estimates import Values

ANSWER_COLUMNS = ("set", "fraction", "step", "draw", "prompt_id", "score", "log_ratio", "tokens")
CURVE_METRICS = ("chosen_log_ratio", "rejected_log_ratio", "margin")
CURVES = (*CURVE_METRICS, "loss", "accuracy")


class Missing(Exception):
    """A number that the runs that are here do not give; the message says why."""


@dataclass(frozen=True)
class Answers:
    """One set answered at one step: [draws, prompts] each, prompts in rising order of ``prompt_id`` [P]."""

    step: int
    prompt_id: Values
    score: Values
    log_ratio: Values
    tokens: Values


@dataclass(frozen=True)
class Trial:
    """One run: its answers by set and fraction (rising), and its training curve [steps] by key."""

    ref: str
    sets: Mapping[str, Mapping[float, Answers]]
    curve: Mapping[str, Values]

    def last(self, name: str) -> Answers:
        """The answers at the end of the run; Missing where the set was not answered."""
        if name not in self.sets:
            raise Missing(f"{self.ref} has no answers to the set '{name}'")
        return list(self.sets[name].values())[-1]

    def at_end(self, key: str) -> float:
        """Mean of a curve over the last tenth of the steps; Missing where the run did not record it."""
        if key not in self.curve:
            raise Missing(f"{self.ref} has no {key} in its training curve")
        values = self.curve[key]
        return float(values[-max(1, len(values) // 10) :].mean())


def trial_of(ref: str, answers: Any, records: Sequence[Mapping[str, Any]]) -> Trial:
    """A trial from its answers (data frame with ANSWER_COLUMNS) and the records of its training curve.

    Raises FailedCheck where a prompt is missing from a draw or stands twice, or a score is not finite.
    """
    names, codes = np.unique(answers["set"].to_numpy(dtype=str), return_inverse=True)
    column = {key: answers[key].to_numpy() for key in ANSWER_COLUMNS if key != "set"}
    if not np.isfinite(column["score"]).all():
        raise FailedCheck(f"{ref}: answer {int(np.argmin(np.isfinite(column['score'])))} has no finite score")
    order = np.lexsort((column["prompt_id"], column["draw"], column["fraction"], codes))
    column, codes = {key: values[order] for key, values in column.items()}, codes[order]
    starts = np.flatnonzero((np.diff(codes) != 0) | (np.diff(column["fraction"]) != 0)) + 1
    sets: dict[str, dict[float, Answers]] = {}
    for rows in np.split(np.arange(len(codes)), starts) if len(codes) else []:
        name = str(names[codes[rows[0]]])
        found = _block(f"{ref}: set '{name}'", {key: values[rows] for key, values in column.items()})
        sets.setdefault(name, {})[float(column["fraction"][rows[0]])] = found
    keys = [key for key in (records[0] if records else ()) if key in CURVES or key.startswith("member_")]
    return Trial(ref, sets, {key: np.array([record[key] for record in records], dtype=float) for key in keys})


def _block(where: str, column: Mapping[str, Values]) -> Answers:
    draws = len(np.unique(column["draw"]))
    if len(column["draw"]) % draws:
        raise FailedCheck(f"{where}: the {draws} draws have different numbers of prompts")
    table = {key: values.reshape(draws, -1) for key, values in column.items()}
    prompts = table["prompt_id"]
    if (np.diff(prompts[0]) <= 0).any() or (prompts != prompts[0]).any():
        raise FailedCheck(f"{where}: a prompt stands twice in a draw or is missing from one")
    score, log_ratio, tokens = (table[key].astype(float) for key in ("score", "log_ratio", "tokens"))
    return Answers(int(column["step"][0]), prompts[0], score, log_ratio, tokens)


@dataclass(frozen=True)
class Grid:
    """A grid item's declaration with the trials that are here: ``runs`` by (point, seed), ``reference`` by seed."""

    spec: Mapping[str, Any]
    runs: Mapping[tuple[int, int], Trial]
    reference: Mapping[int, Trial]

    def __post_init__(self) -> None:
        check_same_prompts([*self.reference.values(), *self.runs.values()])

    @property
    def points(self) -> list[dict[str, Any]]:
        """The declared points."""
        return self.spec["points"]

    @property
    def main_set(self) -> str:
        """The set that figures over one set show: ``test``, or the first."""
        return "test" if "test" in self.spec["sets"] else self.spec["sets"][0]

    def points_of(self, condition: str, arm: str) -> list[int]:
        """Numbers of an arm's points in a condition, in declared order."""
        return [i for i, p in enumerate(self.points) if (p["condition"], p["arm"]) == (condition, arm)]

    def conditions_of(self, arm: str) -> list[str]:
        """Conditions in which an arm has points, in declared order."""
        return [c for c in self.spec["conditions"] if self.points_of(c, arm)]

    def seeds_of(self, point: int) -> list[int]:
        """Seeds of a point that ran."""
        return [seed for seed in self.spec["seeds"] if (point, seed) in self.runs]

    def run(self, point: int, seed: int) -> Trial:
        """The trial of a point and seed; Missing where it is not here."""
        if (point, seed) not in self.runs:
            raise Missing(f"not run: {self.points[point]['arm']} in {self.points[point]['condition']}, seed {seed}")
        return self.runs[point, seed]

    def reference_run(self, seed: int) -> Trial:
        """The reference's own trial of a seed; Missing where it is not here."""
        if seed not in self.reference:
            raise Missing(f"not run: the reference, seed {seed}")
        return self.reference[seed]

    def partners(self, point: int, others: Iterable[int]) -> list[int]:
        """Those of ``others`` that agree with a point in every setting that both have."""
        mine = self.points[point]["settings"]
        return [i for i in others if agree(mine, self.points[i]["settings"])]


def agree(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two points have the same value in every setting that both have."""
    return all(other[key] == value for key, value in mine.items() if key in other)


def check_same_prompts(trials: Iterable[Trial]) -> None:
    """Raise FailedCheck where two trials answered different prompts of a set."""
    first: dict[str, tuple[str, Values]] = {}
    for trial in trials:
        for name, fractions in trial.sets.items():
            for answers in fractions.values():
                ref, prompts = first.setdefault(name, (trial.ref, answers.prompt_id))
                if not np.array_equal(prompts, answers.prompt_id):
                    raise FailedCheck(f"{trial.ref} and {ref} answered different prompts of the set '{name}'")
