"""What a judge said, kept as it was said, and the preference that is read from it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from prefopt.json_text import parsed_json

Reading = Literal["logprobs", "text", "none"]

IDENTICAL = "not asked: the two answers are the same"


@dataclass(frozen=True)
class RawAnswer:
    """A judge's reply: its text, the log-probabilities of its first token's candidates (nats), tokens paid for.

    ``final``: nothing is to be gained by asking again; without it the answer is not kept.
    """

    text: str
    top_logprobs: Mapping[str, float] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    final: bool = True

    def to_json(self) -> str:
        """One line with all of it, also kept in judgements.parquet."""
        return json.dumps(vars(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> RawAnswer:
        """Inverse of ``to_json``; raises ValueError for a line that is no answer."""
        content = parsed_json(line)
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not {"text"} <= content.keys() <= names:
            raise ValueError(f"{line[:60]!r} has not the keys of an answer")
        answer = cls(**content)
        top = answer.top_logprobs
        sound = isinstance(answer.text, str) and isinstance(answer.final, bool)
        sound &= all(type(count) is int and count >= 0 for count in (answer.tokens_in, answer.tokens_out))
        sound &= top is None or (isinstance(top, dict) and all(isinstance(logp, float | int) for logp in top.values()))
        if not sound:
            raise ValueError(f"{line[:60]!r} has values of another kind than an answer's")
        return answer


def preference_of(answer: RawAnswer, labels: Sequence[str]) -> tuple[float, Reading]:
    """Preference for the answer shown second, and what it was read from; (NaN, "none") for no usable answer.

    From log-probabilities: 1 + P(label 2) / (P(label 1) + P(label 2)), where a label that is no candidate, or has no
    finite log-probability, has probability 0 and tokens that differ in white space count together. From the text: 1 or
    2, where it is one label with nothing but punctuation around it.

    Source: the weighted single-token answer of AlpacaEval 2 (arXiv 2404.04475, section 2).
    """
    if answer.top_logprobs:
        first, second = (_label_logp(answer.top_logprobs, label) for label in labels)
        if first == second == -math.inf:
            return math.nan, "none"
        return 1.0 + _sigmoid(second - first), "logprobs"
    said = re.fullmatch(rf"\W*({'|'.join(map(re.escape, labels))})\W*", answer.text)
    return (1.0 + labels.index(said[1]), "text") if said else (math.nan, "none")


def _label_logp(candidates: Mapping[str, float], label: str) -> float:
    found = [logp for token, logp in candidates.items() if token.strip() == label and math.isfinite(logp)]
    top = max(found, default=-math.inf)
    return top + math.log(sum(math.exp(logp - top) for logp in found)) if found else top


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else 1.0 - 1.0 / (1.0 + math.exp(value))
