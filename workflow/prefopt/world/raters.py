"""Named annotators of the demo world: types of people who like different lengths, and what each votes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.errors import BadInput
from prefopt.world.oracle import oracle_reward
from prefopt.world.prompts import DOMAINS


@dataclass(frozen=True)
class Raters:
    """Who votes. Type k judges by the true reward with its own length preference; who is of which type stays unseen."""

    length_preferences: Sequence[float]  # one for each type
    annotators: int = 40
    votes: int = 3  # of every pair
    noise: float = 0.5  # temperature of a vote: P(first) = sigmoid((reward - reward) / noise)

    def __post_init__(self) -> None:
        if not len(self.length_preferences) <= self.annotators or self.votes > self.annotators or self.noise <= 0:
            raise BadInput(
                f"world: {len(self.length_preferences)} types and {self.votes} votes a pair of {self.annotators} "
                f"annotators with noise {self.noise}; each type and vote needs an annotator, noise is above 0"
            )

    def type_of(self, annotator: int) -> int:
        """Types take turns: as many annotators of each as their number allows."""
        return annotator % len(self.length_preferences)


Vote = tuple[str, str]  # annotator, "a" for the first response or "b" for the second


def cast_votes(pairs: Sequence[tuple[str, str, str]], raters: Raters, *, seed: int, domain: str) -> list[list[Vote]]:
    """Votes on (prompt, first, second), a list for every pair; annotators are called rater-00, rater-01, ...

    Every pair is voted on by different annotators, each drawn with equal chances. Equal arguments give equal votes.
    """
    rng = np.random.default_rng([seed, DOMAINS.index(domain), 7])
    found = []
    for prompt, first, second in pairs:
        asked = rng.choice(raters.annotators, raters.votes, replace=False)
        coins = rng.random(raters.votes)
        gaps = [
            oracle_reward(prompt, first, taste) - oracle_reward(prompt, second, taste)
            for taste in raters.length_preferences
        ]
        votes = []
        for annotator, coin in zip(asked.tolist(), coins.tolist(), strict=True):
            likely = 1 / (1 + math.exp(-gaps[raters.type_of(annotator)] / raters.noise))
            votes.append((f"rater-{annotator:02d}", "a" if coin < likely else "b"))
        found.append(votes)
    return found
