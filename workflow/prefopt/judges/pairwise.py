"""The pairwise judge: questions to a language model, each asked once and kept, read as preferences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from prefopt import team
from prefopt.errors import FailedCheck
from prefopt.judges.answers import IDENTICAL, RawAnswer, preference_of
from prefopt.judges.cache import AnswerCache
from prefopt.judges.templates import Question
from prefopt.judging import Verdicts
from prefopt.progress import Progress

Keep = Callable[[int, RawAnswer], None]


class Asker(Protocol):
    """Whoever is asked: calls ``keep(number, answer)`` for every question, as soon as its answer is there."""

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Ask all questions, in any order."""


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in the currency that the server charges in."""

    input: float
    output: float


@dataclass
class Tally:
    """What judging took: answers by how they were read, those asked for now, and the tokens of all of them."""

    readings: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    kept: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def cost(self, prices: Prices | None) -> float | None:
        """Price of all answers, also of those that an earlier run paid for; None without prices."""
        if prices is None:
            return None
        return (self.tokens_in * prices.input + self.tokens_out * prices.output) / 1e6


@dataclass(frozen=True)
class PairwiseJudge:
    """A judge in the sense of ``judging.Judge`` over records with ``text``; identical answers are a draw, unasked."""

    asker: Asker
    labels: Sequence[str]
    cache: AnswerCache
    prices: Prices | None = None
    tally: Tally = field(default_factory=Tally)

    def __call__(
        self,
        prompts: Sequence[Mapping[str, Any]],
        first: Sequence[Mapping[str, Any]],
        second: Sequence[Mapping[str, Any]],
    ) -> Verdicts:
        """Preference for the second shown [N], NaN where the answer cannot be read; raw answers as JSON lines."""
        rows = zip(prompts, first, second, strict=True)
        questions = [Question(p["text"], a["text"], b["text"]) for p, a, b in rows]
        keys = [None if q.first == q.second else self.cache.key(q) for q in questions]
        answers = self._answers({key: q for key, q in zip(keys, questions, strict=True) if key is not None})
        preference, raw = np.full(len(questions), 1.5), [IDENTICAL] * len(questions)
        for row, key in enumerate(keys):
            reading = "identical"
            if key is not None:
                preference[row], reading = preference_of(answers[key], self.labels)
                raw[row] = answers[key].to_json()
            self.tally.readings[reading] += 1
        return Verdicts(preference, raw)

    def _answers(self, questions: Mapping[str, Question]) -> dict[str, RawAnswer]:
        answers = self.cache.kept(questions)
        for answer in answers.values():
            self._count(answer)
        self.tally.kept += len(answers)
        missing = [key for key in questions if key not in answers]
        team.barrier()  # all processes of the job have looked before one of them keeps an answer
        with Progress(len(questions), "judge", start=len(answers)) as bar:

            def keep(number: int, answer: RawAnswer) -> None:
                if answer.final:
                    self.cache.keep(missing[number], answer)
                answers[missing[number]] = answer
                self.tally.asked += 1
                self._count(answer)
                bar.advance(self._note())

            if missing:
                self.asker.ask([questions[key] for key in missing], keep)
        team.barrier()
        return answers | self._of_others([key for key in missing if key not in answers])

    def _of_others(self, keys: Sequence[str]) -> dict[str, RawAnswer]:
        """Answers that other processes of this job got meanwhile, counted as asked."""
        found = self.cache.kept(keys)
        if len(found) < len(keys):
            raise FailedCheck(f"{len(keys) - len(found)} of {len(keys)} answers of other processes are not there")
        for answer in found.values():
            self.tally.asked += 1
            self._count(answer)
        return found

    def _count(self, answer: RawAnswer) -> None:
        self.tally.tokens_in += answer.tokens_in
        self.tally.tokens_out += answer.tokens_out

    def _note(self) -> str:
        cost = self.tally.cost(self.prices)
        tokens = f"{self.tally.tokens_in + self.tally.tokens_out} tokens"
        return tokens if cost is None else f"{tokens}, cost {cost:.4f}"
