"""Comparing two sets of responses: every judge is asked in both orders, and the answers are un-swapped here.

A preference is coded as AlpacaEval does: 1 = the first shown wins, 2 = the second shown wins, 1.5 = a draw, fractions
between them are probabilities, NaN = no usable answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.errors import FailedCheck
from prefopt.judges.answers import IDENTICAL

_SHOWN_RAW = 3


@dataclass(frozen=True)
class Verdicts:
    """Preferences for the second shown response, [N] in [1, 2] or NaN; ``raw``: what a judge that speaks said."""

    preference: np.ndarray
    raw: Sequence[str] | None = None


Judge = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Verdicts]
"""(prompts, first responses, second responses) -> verdicts on the second shown."""


@dataclass(frozen=True)
class ScalarJudge:
    """A judge that scores each response alone, such as an oracle or a reward model.

    ``score(prompts, responses) -> [N]``. With ``soft`` the preference is 1 + sigma(score difference), the Bradley-Terry
    probability; without it 1, 2, or 1.5 for equal scores.
    """

    score: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    soft: bool

    def __call__(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Verdicts:
        """Preferences for the second shown response."""
        difference = self.score(prompts, second) - self.score(prompts, first)
        if self.soft:
            return Verdicts(1.0 + np.exp(-np.logaddexp(0.0, -difference)))
        return Verdicts(1.5 + 0.5 * np.sign(difference))


@dataclass(frozen=True)
class BothOrders:
    """The judgements of N prompts, both as the preference for the *model*.

    ``baseline_first``: as answered with (baseline, model). ``model_first``: 3 - the answer to (model, baseline).
    ``raw``: what the judge said, by the same names; none of a judge that only scores.
    """

    baseline_first: np.ndarray
    model_first: np.ndarray
    raw: dict[str, Sequence[str]]

    @property
    def missing(self) -> int:
        """Judgements, of 2 N, without a usable answer."""
        return int(np.isnan(self.baseline_first).sum() + np.isnan(self.model_first).sum())

    def order_effects(self) -> dict[str, float | None]:
        """What the order changes, over the prompts whose two judgements are usable; None where there are none.

        ``position_consistency``: share of prompts for which both orders prefer the same side, or neither;
        ``second_shown``: mean preference, 0 to 1, for whichever answer stood second, 1/2 without a position bias.
        Equal answers were never asked about and do not count.
        """
        asked = ~np.isnan(self.baseline_first + self.model_first)
        for said in self.raw.values():
            asked &= np.array([each != IDENTICAL for each in said], dtype=bool)
        straight, swapped = self.baseline_first[asked], self.model_first[asked]
        if straight.size == 0:
            return {"position_consistency": None, "second_shown": None}
        return {
            "position_consistency": float((np.sign(straight - 1.5) == np.sign(swapped - 1.5)).mean()),
            "second_shown": float(0.5 + (straight - swapped).mean() / 2),
        }


def judge_both_orders(
    judge: Judge,
    prompts: Sequence[Any],
    model: Sequence[Any],
    baseline: Sequence[Any],
    *,
    max_unparsable: float = 0.0,
) -> BothOrders:
    """Ask in both orders.

    Raises FailedCheck, with some of the answers as they were given, where more than the share ``max_unparsable`` of
    the 2 N judgements has no usable answer: a missing judgement is never dropped in silence.
    """
    straight, swapped = judge(prompts, baseline, model), judge(prompts, model, baseline)
    by_order = {"baseline_first": straight, "model_first": swapped}
    raw = {order: verdicts.raw for order, verdicts in by_order.items() if verdicts.raw is not None}
    judged = BothOrders(straight.preference, 3.0 - swapped.preference, raw)
    asked = 2 * len(prompts)
    if judged.missing > max_unparsable * asked:
        raise FailedCheck(
            f"{judged.missing} of {asked} judgements have no usable answer, over the declared share max_unparsable "
            f"{max_unparsable:g}; first: {'; '.join(_examples(by_order))}"
        )
    return judged


def _examples(by_order: dict[str, Verdicts]) -> list[str]:
    found = []
    for order, verdicts in by_order.items():
        for row in np.flatnonzero(np.isnan(verdicts.preference)):
            said = verdicts.raw[int(row)] if verdicts.raw is not None else "nothing"
            found.append(f"prompt {row} ({order}): {said[:200]}")
    return found[:_SHOWN_RAW]
