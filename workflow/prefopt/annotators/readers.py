"""Readers of multi-annotator files: a user's own votes or rankings, and the forms of public data sets.

A reader takes all rows of all files at once, since votes on one pair may stand in many rows and texts in another file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.annotators import public
from prefopt.annotators.rows import (
    Placed,
    Row,
    bad_row,
    choice_of,
    name_of,
    need,
    read_each,
    text_of,
    votes_of_rankings,
)
from prefopt.annotators.votes import CHOICES, Ballot, Collector, RankedPrompt, VotedPair, Votes
from prefopt.errors import BadInput, nearest
from prefopt.json_text import parsed_json
from prefopt.readers.raw import BadRow, broken_at


@dataclass(frozen=True, slots=True)
class VoteReader:
    """How a form is recognised by a row's keys, and read."""

    read: Callable[[Sequence[Placed]], Votes]
    keys: frozenset[str]
    form: str


def read_votes(paths: Sequence[Path], reader: str = "auto") -> Votes:
    """All votes of the files; ``auto`` recognises the reader by the keys of some row.

    Raises BadInput naming file, row and value for what cannot be read, and where there is no vote at all.
    """
    from prefopt.inputs.containers import open_path

    rows = [
        Placed(str(file), number, place, row)
        for path in paths
        for _, file, found in open_path(path.name, path)
        for number, place, row in found
    ]
    if not rows:
        raise BadInput(f"{paths[0]}: it has no rows; every vote is a row")
    for placed in rows:
        if not isinstance(placed.row, Mapping):
            raise bad_row(placed, f"{type(placed.row).__name__} where an object with keys is expected")
    votes = _reader(reader, rows).read(rows)
    for pair in votes.pairs:
        for name in (pair.system_a, pair.system_b, *(ballot.annotator for ballot in pair.ballots)):
            if broken_at(name) is not None:
                raise BadInput(
                    f"{paths[0]}: row {pair.place + 1}: the name {name!r:.60} has a lone surrogate, no Unicode"
                )
    if not any(pair.ballots for pair in votes.pairs):
        raise BadInput(f"{paths[0]}: no votes in it")
    return votes


def _reader(name: str, rows: Sequence[Placed]) -> VoteReader:
    if name != "auto":
        if name not in VOTE_READERS:
            raise BadInput(f"unknown reader '{name}'; {nearest(name, ['auto', *VOTE_READERS])}")
        return VOTE_READERS[name]
    firsts = {placed.file: placed for placed in reversed(rows)}
    fitting = [one for one in VOTE_READERS.values() if any(one.keys <= p.row.keys() for p in firsts.values())]
    if len(fitting) == 1:
        return fitting[0]
    forms = "; ".join(f"{known}: {one.form}" for known, one in VOTE_READERS.items() if known in ("votes", "rankings"))
    why = "fits several readers" if fitting else "fits no reader"
    raise bad_row(
        rows[0], f"{why} (its keys: {', '.join(map(str, rows[0].row)) or 'none'}); your own votes need {forms}"
    )


# --- a user's own files ---------------------------------------------------------------------------------------------

_OWN = {choice: choice for choice in CHOICES}
_SYSTEMS = ("system_a", "system_b")
_EXAMPLE = '{"ann": "a", "bob": "tie"}'


def _read_own(rows: Sequence[Placed]) -> Votes:
    """One row per vote (``annotator``, ``vote``), or one per pair with ``votes``; both may stand in one file."""
    collector = Collector()

    def one(placed: Placed) -> None:
        row = placed.row
        ballots = _own_ballots(row["votes"]) if "votes" in row else [_own_ballot(row)]
        systems = [name_of(row, key) if row.get(key) not in (None, "") else "" for key in _SYSTEMS]
        prompt, a, b = (text_of(row, key) for key in ("prompt", "response_a", "response_b"))
        pair = VotedPair(prompt, a, b, tuple(ballots), systems[0], systems[1], place=placed.number)
        collector.add(pair, placed.place)

    read_each(one, rows)
    return Votes(collector.pairs())


def _own_ballot(row: Row) -> Ballot:
    return Ballot(name_of(row, "annotator"), choice_of(need(row, "vote"), "'vote'", _OWN))


def _own_ballots(votes: Any) -> list[Ballot]:
    """``{annotator: vote}``, or a list of ``{"annotator": ..., "vote": ...}``; in a CSV file the same as JSON text."""
    if isinstance(votes, str):
        try:
            votes = parsed_json(votes)
        except ValueError as error:
            raise BadRow(f"'votes' is {votes!r:.60}, expected JSON such as {_EXAMPLE} ({error})") from None
    if isinstance(votes, Mapping):
        given = [(name_of({"annotator": who}, "annotator"), vote) for who, vote in votes.items()]
        return [Ballot(who, choice_of(vote, f"the vote of '{who}'", _OWN)) for who, vote in given]
    if not isinstance(votes, list) or not all(isinstance(vote, Mapping) for vote in votes):
        raise BadRow(f"'votes' is {votes!r:.60}, expected {{annotator: vote}} or a list of objects with both keys")
    return [_own_ballot(vote) for vote in votes]


def _read_own_rankings(rows: Sequence[Placed]) -> Votes:
    """One row per annotator and prompt: ``responses`` {name: text}, ``ranking``: names, best first, ties as lists."""
    found: dict[tuple[Any, ...], RankedPrompt] = {}

    def one(placed: Placed) -> None:
        row = placed.row
        prompt, who = text_of(row, "prompt"), name_of(row, "annotator")
        responses = need(row, "responses")
        if not isinstance(responses, Mapping) or len(responses) < 2:
            raise BadRow(f"'responses' is {responses!r:.60}, expected {{name: text}} of two or more")
        names = tuple(sorted(responses))
        texts = tuple(text_of(responses, name) for name in names)
        ranks = _ranks(need(row, "ranking"), names)
        kept = found.setdefault((prompt, names, texts), RankedPrompt(prompt, names, texts, {}, placed.number))
        if who in kept.ranks:
            raise BadRow(f"'annotator' is {who!r}, who ranked these responses before; one ranking each")
        kept.ranks[who] = ranks

    read_each(one, rows)
    return votes_of_rankings(list(found.values()))


def _ranks(ranking: Any, names: tuple[str, ...]) -> tuple[float, ...]:
    if not isinstance(ranking, list):
        raise BadRow(f"'ranking' is {ranking!r:.60}, expected a list of names from best to worst, ties as lists")
    rank, place = {}, 1
    for step in ranking:
        tied = step if isinstance(step, list) else [step]
        for name in tied:
            if not isinstance(name, str) or name not in names or name in rank:
                why = "stands twice" if isinstance(name, str) and name in rank else nearest(str(name), names)
                raise BadRow(f"'ranking': {name!r:.40} {why}")
            rank[name] = place
        place += len(tied)
    if missing := [name for name in names if name not in rank]:
        raise BadRow(f"'ranking' lacks {missing[0]!r}; every response has a place")
    return tuple(float(rank[name]) for name in names)


def _form(read: Callable[[Sequence[Placed]], Votes], *keys: str, form: str = "") -> VoteReader:
    return VoteReader(read, frozenset(keys), form or ", ".join(keys))


_PAIR_KEYS = ("prompt", "response_a", "response_b")

VOTE_READERS: Mapping[str, VoteReader] = {
    "votes": _form(_read_own, *_PAIR_KEYS, form=f"{', '.join(_PAIR_KEYS)} with annotator and vote, or with votes"),
    "rankings": _form(_read_own_rankings, "prompt", "responses", "annotator", "ranking"),
    "ukp_convarg1": _form(public.read_ukp, "topic_side", "arg1", "arg2", "votes"),
    "pandalm": _form(public.read_pandalm, "instruction", "response1", "response2", "annotator1"),
    "tulu_human_eval": _form(public.read_tulu, "completions", "annotations"),
    "squality_human_eval": _form(public.read_squality, "responses", "reviewers"),
    "mt_bench_human": _form(public.read_mt_bench, "question_id", "model_a", "model_b", "winner", "judge"),
    "hanna": _form(public.read_hanna, "prompt_id", "rater_slot", "system"),
    "llmbar": _form(public.read_llmbar, "judge", "strategy", "winner_order_ab"),
    "qlora": _form(public.read_qlora, "question_id", "system_first", "system_second", "score"),
}
