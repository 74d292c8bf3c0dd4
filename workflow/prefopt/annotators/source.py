"""From votes to canonical pairs: chosen is whom more annotators voted for, and every vote is kept beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.annotators.readers import read_votes
from prefopt.annotators.votes import SIDES, Ballot, VotedPair, sampled_per_prompt
from prefopt.readers.raw import RawPair, Refused, checked_pair
from prefopt.specs import VotesSource

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class RawVotedPair(RawPair):
    """A pair as read, with its votes in terms of chosen and rejected: (annotator, chosen | rejected | tie)."""

    votes: tuple[tuple[str, str], ...]
    held_out: tuple[str, ...] | None = None

    def vote_columns(self) -> dict[str, Any]:
        """What the pair table says of the votes."""
        given = [vote for _, vote in self.votes]
        listed = [{"annotator": who, "vote": vote} for who, vote in self.votes]
        sides = ("chosen", "rejected", "tie")
        columns = {"votes": json.dumps(listed)} | {f"votes_{side}": given.count(side) for side in sides}
        if self.held_out is not None:
            columns |= {f"held_out_{side}": self.held_out.count(side) for side in sides}
        return columns


def voted_outcomes(paths: Sequence[Path], source: VotesSource) -> Iterator[tuple[int, RawPair | Refused]]:
    """Every pair of the files, or why it is refused, with the number of the row that it was first read from.

    A level vote (as many for either side) is refused with ``ties: refuse``; else its texts toss a coin for which
    response is chosen. Raises BadInput naming file, row and value for what cannot be read.
    """
    votes = read_votes(paths, source.reader)
    for pair in sampled_per_prompt(votes.pairs, source.per_prompt):
        try:
            yield pair.place, voted_pair(pair, source.ties, source.hold_out)
        except Refused as refusal:
            yield pair.place, refusal


def voted_pair(pair: VotedPair, ties: str = "keep", hold_out: int | None = None) -> RawVotedPair:
    """The pair as it stands in the table, the response of more votes chosen; raises Refused for what cannot be used."""
    pair, apart = pair.without(hold_out or 0)
    a, b, level = pair.counts()
    if a == b and ties == "refuse":
        raise Refused("tie", f"{a} votes for either side, {level} ties")
    if not pair.ballots:
        raise Refused("few votes", f"{len(apart)} votes, all of them held out")
    ordered = pair.majority_first()
    meta = ordered.meta | {"system_chosen": ordered.system_a, "system_rejected": ordered.system_b}
    prompt = [{"role": "user", "content": ordered.prompt}]
    raw = checked_pair(prompt, ordered.response_a, ordered.response_b, meta)
    ballots = tuple((ballot.annotator, SIDES[ballot.vote]) for ballot in ordered.ballots)
    turned = ordered.response_a != pair.response_a
    unseen = tuple(SIDES[(ballot.flipped() if turned else ballot).vote] for ballot in apart)
    held_out = unseen if hold_out is not None else None
    return RawVotedPair(raw.prompt, raw.chosen, raw.rejected, raw.meta, ballots, held_out)


def votes_of_table(pairs: pd.DataFrame) -> list[VotedPair]:
    """Rows of a pair table with votes as pairs again, chosen as a; their ``prompt`` is the prompt_id as text."""
    flags = {side: vote for vote, side in SIDES.items()}
    return [
        VotedPair(
            str(row.prompt_id),
            row.chosen,
            row.rejected,
            tuple(Ballot(given["annotator"], flags[given["vote"]]) for given in json.loads(row.votes)),
            place=row.source_row,
        )
        for row in pairs.itertuples()
    ]
