"""Comparing two sets of responses: every judge is asked in both orders, and the answers are un-swapped here.

A preference is coded as AlpacaEval does: 1 = the first shown wins, 2 = the second shown wins, 1.5 = a draw, fractions
between them are probabilities, NaN = no answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.errors import FailedCheck

Judge = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], np.ndarray]
"""(prompts, first responses, second responses) -> preference for the second shown, [N] in [1, 2]."""


@dataclass(frozen=True)
class ScalarJudge:
    """A judge that scores each response alone, such as an oracle or a reward model.

    ``score(prompts, responses) -> [N]``. With ``soft`` the preference is 1 + sigma(score difference), the Bradley-Terry
    probability; without it 1, 2, or 1.5 for equal scores.
    """

    score: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    soft: bool

    def __call__(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """Preferences for the second shown response."""
        difference = self.score(prompts, second) - self.score(prompts, first)
        if self.soft:
            return 1.0 + np.exp(-np.logaddexp(0.0, -difference))
        return 1.5 + 0.5 * np.sign(difference)


def judge_both_orders(
    judge: Judge, prompts: Sequence[Any], model: Sequence[Any], baseline: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Ask in both orders; both answers are given as the preference for the *model*.

    ``baseline_first``: as answered with (baseline, model). ``model_first``: 3 - the answer to (model, baseline).
    Raises FailedCheck where a prompt has no answer: a missing judgement is never dropped in silence.
    """
    answers = {
        "baseline_first": judge(prompts, baseline, model),
        "model_first": 3.0 - judge(prompts, model, baseline),
    }
    for order, preference in answers.items():
        missing = [i for i, p in enumerate(preference) if math.isnan(p)]
        if missing:
            raise FailedCheck(
                f"{len(missing)} of {len(preference)} judgements missing ({order}), first at {missing[0]}"
            )
    return answers
