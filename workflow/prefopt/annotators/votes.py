"""Votes of several annotators on the same pair, and rankings of several responses: what all readers return."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from prefopt.digests import canonical_json
from prefopt.readers.raw import BadRow

if TYPE_CHECKING:
    import pandas as pd

CHOICES = ("a", "b", "tie")
SIDES = {"a": "chosen", "b": "rejected", "tie": "tie"}
_FLIPPED = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Ballot:
    """One annotator's vote on a pair: ``a``, ``b`` or ``tie``."""

    annotator: str
    vote: str

    def flipped(self) -> Ballot:
        """The same vote where a and b are exchanged."""
        return Ballot(self.annotator, _FLIPPED[self.vote])


@dataclass(frozen=True, slots=True)
class VotedPair:
    """Two responses to a prompt with everyone's votes; ``system_*`` say whose responses they are, where known.

    ``place`` is the number of the row that it was read from.
    """

    prompt: str
    response_a: str
    response_b: str
    ballots: tuple[Ballot, ...]
    system_a: str = ""
    system_b: str = ""
    place: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> tuple[int, int, int]:
        """Votes for a, for b, and ties."""
        votes = [ballot.vote for ballot in self.ballots]
        return votes.count("a"), votes.count("b"), votes.count("tie")

    def flipped(self) -> VotedPair:
        """The same pair with a and b exchanged."""
        return replace(
            self,
            response_a=self.response_b,
            response_b=self.response_a,
            system_a=self.system_b,
            system_b=self.system_a,
            ballots=tuple(ballot.flipped() for ballot in self.ballots),
        )

    def digest(self) -> int:
        """A number that depends on prompt and responses alone, not on their order: draws samples and tosses coins."""
        content = [self.prompt, *sorted([self.response_a, self.response_b])]
        return _number(content)

    def without(self, count: int) -> tuple[VotedPair, tuple[Ballot, ...]]:
        """The pair without ``count`` of its votes, and these: whose they are depends on texts and annotators alone."""
        drawn = sorted(self.ballots, key=lambda ballot: _number([self.digest(), ballot.annotator]))
        return replace(self, ballots=tuple(drawn[count:])) if count else self, tuple(drawn[:count]) if count else ()

    def majority_first(self) -> VotedPair:
        """The pair with the response of more votes as a; equal numbers are decided by a coin that its texts toss."""
        a, b, _ = self.counts()
        if a != b:
            return self if a > b else self.flipped()
        first = self.response_a == min(self.response_a, self.response_b)
        return self if first == (self.digest() % 2 == 0) else self.flipped()


@dataclass(frozen=True, slots=True)
class RankedPrompt:
    """Responses to a prompt with everyone's ranking of them: a rank per response, 1 is best, equal ranks are ties."""

    prompt: str
    systems: tuple[str, ...]
    responses: tuple[str, ...]
    ranks: dict[str, tuple[float, ...]]  # by annotator
    place: int = 0

    def pairs(self) -> list[VotedPair]:
        """Every pair of responses, with the votes that the rankings imply."""
        return [
            VotedPair(
                self.prompt,
                self.responses[i],
                self.responses[j],
                tuple(Ballot(who, _order(ranks[i], ranks[j])) for who, ranks in self.ranks.items()),
                self.systems[i],
                self.systems[j],
                self.place,
            )
            for i, j in combinations(range(len(self.responses)), 2)
        ]


def _number(content: Any) -> int:
    # a text with a lone surrogate is refused later, with its reason
    return int.from_bytes(hashlib.sha256(canonical_json(content).encode(errors="surrogatepass")).digest()[:8])


def _order(first: float, second: float) -> str:
    return "tie" if first == second else "a" if first < second else "b"


@dataclass(frozen=True, slots=True)
class Votes:
    """Everything that was read: pairs, those of rankings among them, and the rankings themselves."""

    pairs: list[VotedPair]
    rankings: list[RankedPrompt] = field(default_factory=list)

    def ballots(self) -> pd.DataFrame:
        """One row per vote: ``pair`` (number), ``annotator``, ``vote``."""
        import pandas as pd

        rows = [(n, ballot.annotator, ballot.vote) for n, pair in enumerate(self.pairs) for ballot in pair.ballots]
        return pd.DataFrame(rows, columns=["pair", "annotator", "vote"])


class Collector:
    """Puts single votes on the same two responses together, whichever of them was shown first."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, ...], VotedPair] = {}
        self._seen: dict[tuple[str, ...], dict[str, str]] = {}

    def add(self, pair: VotedPair, where: str) -> None:
        """Add the votes of ``pair``, read at ``where``.

        Raises BadRow where an annotator votes a second time on the same two responses.
        """
        sides = sorted([(pair.system_a, pair.response_a), (pair.system_b, pair.response_b)])
        key = (pair.prompt, *sides[0], *sides[1])
        known = self._pairs.get(key)
        seen = self._seen.setdefault(key, {})
        for ballot in pair.ballots:
            if ballot.annotator in seen:
                raise BadRow(
                    f"'annotator' is {ballot.annotator!r}, who voted on these two responses before "
                    f"({seen[ballot.annotator]}); one vote each"
                )
            seen[ballot.annotator] = where
        if known is None:
            self._pairs[key] = pair
            return
        same = (pair.system_a, pair.response_a) == (known.system_a, known.response_a)
        new = pair if same else pair.flipped()
        self._pairs[key] = replace(known, ballots=known.ballots + new.ballots)

    def pairs(self) -> list[VotedPair]:
        """The pairs in the order they were first seen."""
        return list(self._pairs.values())


def sampled_per_prompt(pairs: Iterable[VotedPair], count: int | None) -> list[VotedPair]:
    """At most ``count`` pairs of every prompt, those of the lowest digests, in their order; all of them for None."""
    pairs = list(pairs)
    if count is None:
        return pairs
    by_prompt: dict[str, list[tuple[int, int]]] = {}
    for number, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt, []).append((pair.digest(), number))
    kept = {number for found in by_prompt.values() for _, number in sorted(found)[:count]}
    return [pair for number, pair in enumerate(pairs) if number in kept]


def rankings_in_pairs(pairs: Sequence[VotedPair]) -> list[RankedPrompt]:
    """Complete rankings that pairwise votes hold: annotators who compared all responses to a prompt, in one order.

    An annotator whose votes on a prompt are not transitive ranks nothing there. Prompts of two responses, and those
    without a complete ranking, are left out.
    """
    by_prompt: dict[str, list[VotedPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    found = []
    for prompt, group in by_prompt.items():
        names = list(dict.fromkeys(n for p in group for n in ((p.system_a, p.response_a), (p.system_b, p.response_b))))
        if len(names) < 3 or len(group) != len(names) * (len(names) - 1) // 2:
            continue
        ranks = _consistent_ranks(group, {name: number for number, name in enumerate(names)})
        if ranks:
            systems, responses = zip(*names, strict=True)
            found.append(RankedPrompt(prompt, systems, responses, ranks, group[0].place))
    return found


def _consistent_ranks(group: Sequence[VotedPair], number: dict[tuple[str, str], int]) -> dict[str, tuple[float, ...]]:
    points: dict[str, list[float]] = {}
    votes: dict[str, list[tuple[int, int, str]]] = {}
    for pair in group:
        i, j = number[pair.system_a, pair.response_a], number[pair.system_b, pair.response_b]
        for ballot in pair.ballots:
            mine = points.setdefault(ballot.annotator, [0.0] * len(number))
            mine[i] -= {"a": 1.0, "tie": 0.5, "b": 0.0}[ballot.vote]
            mine[j] -= {"b": 1.0, "tie": 0.5, "a": 0.0}[ballot.vote]
            votes.setdefault(ballot.annotator, []).append((i, j, ballot.vote))
    return {
        who: tuple(points[who])
        for who, given in votes.items()
        if len(given) == len(group) and all(_order(points[who][i], points[who][j]) == vote for i, j, vote in given)
    }
