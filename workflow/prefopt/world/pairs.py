"""Preference pairs of the demo world: candidates, raters, and control over which response is longer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import cast

import numpy as np

from prefopt.errors import BadInput, nearest
from prefopt.mallows import sample_mallows_phi
from prefopt.world.oracle import LENGTH_PREFERENCE, oracle_reward, polarity
from prefopt.world.prompts import DOMAINS, asked, draw_prompts
from prefopt.world.responses import candidates

LABELS = ("mallows", "oracle", "polarity")
LENGTH_GAP = 0.1
MAX_CANDIDATES = 12


@dataclass(frozen=True)
class WorldParams:
    """What to generate. Equal parameters give equal pairs; without `rho`, labels and phis only swap their responses."""

    seed: int = 0
    domain: str = "home"  # "home" or "away": other phrasings and pairs of topics, no prompt in common
    prompts: int = 2000  # distinct prompts
    pairs: int = 2000  # beyond `prompts`, prompts are used again with new candidates
    candidates: int = 6  # responses ranked per pair
    closed_fraction: float = 0.5  # share of prompts with one right answer
    labels: str = "mallows"  # "mallows": a rater's noisy ranking; "oracle", "polarity": the higher of these is chosen
    phi_closed: float = 0.2  # rater dispersion in (0, 1]; small = agreement
    phi_open: float = 0.8
    length_preference: float = LENGTH_PREFERENCE  # of the oracle
    rho: float | None = None  # share of pairs whose chosen response is the longer; then all differ by >= 10 %

    def __post_init__(self) -> None:
        for name, known in (("domain", DOMAINS), ("labels", LABELS)):
            value = getattr(self, name)
            if value not in known:
                raise BadInput(f"world: {name} '{value}' is unknown: {nearest(str(value), known)}")
        bounds = {
            "prompts": (1, float("inf")),
            "pairs": (1, float("inf")),
            "candidates": (2, MAX_CANDIDATES),
            "closed_fraction": (0.0, 1.0),
            "rho": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BadInput(f"world: {name} = {value} is outside [{low}, {high}]")
        for name in ("phi_closed", "phi_open"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise BadInput(f"world: {name} = {getattr(self, name)} is outside (0, 1]")
        if self.labels == "polarity" and self.closed_fraction > 0:
            raise BadInput(
                f"world: labels 'polarity' with closed_fraction = {self.closed_fraction}: answers to closed prompts "
                "have no polarity; set closed_fraction to 0"
            )


@dataclass(frozen=True)
class _Ballot:
    """One prompt's candidates in the order of their worth, and a rater's ranking of them."""

    prompt: str
    kind: str
    phi: float
    texts: tuple[str, ...]
    worths: tuple[float, ...]  # true rewards, or polarities where these are what labels go by
    ranking: tuple[int, ...]  # places in `texts`, best first


Pair = tuple[str, str]


def generate_pairs(params: WorldParams) -> list[dict[str, str | float]]:
    """Preference pairs with the keys prompt, chosen, rejected, domain, kind ("closed", "open"), phi.

    Per pair: draw candidates, order them by the oracle, let a rater rank them by Mallows-phi around that order
    (or take the order itself), and pick two of unequal true reward; their order in the ranking says which is chosen.
    With the labels "polarity" the order is that of polarity, and the two picked are of unequal polarity.
    With `rho`, exactly round(rho * pairs) pairs are picked so that chosen is the longer by >= 10 %, and in all the
    others rejected is; every prompt keeps its place, so data sets that differ in rho alone share their prompts.
    Raises BadInput where the domain has too few prompts, or too few pairs of one length order.
    """
    drawn = draw_prompts(params.domain, min(params.prompts, params.pairs), params.closed_fraction, params.seed)
    ballots = _ballots([drawn[index % len(drawn)] for index in range(params.pairs)], params)
    picker = random.Random(f"{params.seed}/{params.domain}/picks")
    picked = _any_pairs(ballots, picker) if params.rho is None else _pairs_by_length(ballots, params.rho, picker)
    return [
        {
            "prompt": ballot.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "domain": params.domain,
            "kind": ballot.kind,
            "phi": ballot.phi,
        }
        for ballot, (chosen, rejected) in zip(ballots, picked, strict=True)
    ]


def _kind(prompt: str) -> str:
    known = asked(prompt)
    if known is None:
        raise ValueError(f"{prompt!r:.60} is no prompt of the demo world")
    return known.kind


def _ballots(prompts: Sequence[str], params: WorldParams) -> list[_Ballot]:
    kinds = [_kind(prompt) for prompt in prompts]
    phis = [params.phi_closed if kind == "closed" else params.phi_open for kind in kinds]
    rankings = _rankings(phis, params)
    writer = random.Random(f"{params.seed}/{params.domain}/candidates")
    ballots = []
    for prompt, kind, phi, ranking in zip(prompts, kinds, phis, rankings, strict=True):
        texts = _varied_candidates(prompt, params, writer)
        worths, ordered = zip(*sorted(texts, key=lambda scored: -scored[0]), strict=True)
        ballots.append(_Ballot(prompt, kind, phi, ordered, worths, ranking))
    return ballots


def _varied_candidates(prompt: str, params: WorldParams, rng: random.Random) -> list[tuple[float, str]]:
    """Candidates with their worths, drawn again until two of unequal worth differ in length by >= 10 %."""
    while True:
        texts = candidates(prompt, params.candidates, rng)
        scored = [(_worth(prompt, text, params), text) for text in texts]
        if any(
            one[0] != other[0] and (_clearly_longer(one[1], other[1]) or _clearly_longer(other[1], one[1]))
            for one, other in combinations(scored, 2)
        ):
            return scored


def _worth(prompt: str, text: str, params: WorldParams) -> float:
    if params.labels == "polarity":
        return polarity(text)
    return oracle_reward(prompt, text, params.length_preference)


def _rankings(phis: Sequence[float], params: WorldParams) -> list[tuple[int, ...]]:
    if params.labels != "mallows":
        return [tuple(range(params.candidates))] * len(phis)
    rng = np.random.default_rng([params.seed, DOMAINS.index(params.domain)])
    return [tuple(row) for row in sample_mallows_phi(rng, params.candidates, phis, len(phis)).tolist()]


def _ordered_pairs(ballot: _Ballot, rng: random.Random) -> Iterator[Pair]:
    """All pairs of unequal worth as (chosen, rejected), in an order that does not depend on the labels."""
    place = {item: rank for rank, item in enumerate(ballot.ranking)}
    pairs = list(combinations(range(len(ballot.texts)), 2))
    rng.shuffle(pairs)
    for better, worse in pairs:
        if ballot.worths[better] > ballot.worths[worse]:
            first, second = (better, worse) if place[better] < place[worse] else (worse, better)
            yield ballot.texts[first], ballot.texts[second]


def _any_pairs(ballots: Sequence[_Ballot], rng: random.Random) -> list[Pair]:
    return [next(_ordered_pairs(ballot, rng)) for ballot in ballots]


def _pairs_by_length(ballots: Sequence[_Ballot], rho: float, rng: random.Random) -> list[Pair]:
    longer: list[Pair | None] = []
    shorter: list[Pair | None] = []
    for ballot in ballots:
        pairs = list(_ordered_pairs(ballot, rng))
        longer.append(next((pair for pair in pairs if _clearly_longer(*pair)), None))
        shorter.append(next((pair for pair in pairs if _clearly_longer(*reversed(pair))), None))
    wanted = round(rho * len(ballots))
    forced = [index for index, pair in enumerate(shorter) if pair is None]
    free = [index for index, pair in enumerate(longer) if pair is not None and shorter[index] is not None]
    if not len(forced) <= wanted <= len(forced) + len(free):
        raise BadInput(
            f"world: rho = {rho} needs {wanted} of {len(ballots)} pairs with the longer response chosen; these "
            f"candidates allow {len(forced)} to {len(forced) + len(free)}: raise `candidates` (now "
            f"{len(ballots[0].texts)})"
        )
    takes_longer = {*forced, *rng.sample(free, wanted - len(forced))}
    picked = [longer[index] if index in takes_longer else shorter[index] for index in range(len(ballots))]
    return cast("list[tuple[str, str]]", picked)  # None is nowhere: only who has both kinds of pairs is drawn from


def _clearly_longer(first: str, second: str) -> bool:
    """Whether `first` has >= 10 % more tokens, with or without an end token: the stricter of the two counts."""
    return len(first.split()) + 1 >= (1 + LENGTH_GAP) * (len(second.split()) + 1)
