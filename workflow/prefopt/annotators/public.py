"""Readers of public data sets with several annotators per item; each takes all rows of all its files at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefopt.annotators.rows import (
    Placed,
    Row,
    choice_of,
    name_of,
    need,
    object_of,
    objects_of,
    rank_of,
    read_each,
    rows_with,
    shown_text,
    text_of,
    votes_of_rankings,
)
from prefopt.annotators.votes import Ballot, Collector, RankedPrompt, VotedPair, Votes
from prefopt.readers.raw import BadRow


def read_ukp(rows: Sequence[Placed]) -> Votes:
    """UKPConvArg1: pairs of arguments on one side of a debate; their texts stand in the other file."""
    texts: dict[tuple[str, str], Row] = {}
    collector = Collector()

    def text(placed: Placed) -> None:
        key = text_of(placed.row, "topic_side"), text_of(placed.row, "arg_id")
        if key in texts:
            raise BadRow(f"'arg_id' is {key[1]!r:.60}, of which there is a text before; one text each")
        texts[key] = placed.row

    def pair(placed: Placed) -> None:
        row = placed.row
        sides = []
        for key in ("arg1", "arg2"):
            topic, name = text_of(row, "topic_side"), text_of(row, key)
            if (topic, name) not in texts:
                raise BadRow(f"'{key}' is {name!r}, whose text is in no file; give the file of arguments too")
            sides.append(texts[topic, name])
        names = {"a1": "a", "a2": "b", "equal": "tie"}
        ballots = [
            Ballot(name_of(v, "worker"), choice_of(v.get("vote"), "'vote'", names)) for v in objects_of(row, "votes")
        ]
        first, second = sides
        prompt = f"{text_of(first, 'debate_title')}: {text_of(first, 'stance')}"
        meta = {"gold": choice_of(row["gold"], "'gold'", names) if row.get("gold") else None}
        both = text_of(first, "text"), text_of(second, "text")
        collector.add(
            VotedPair(prompt, *both, tuple(ballots), row["arg1"], row["arg2"], placed.number, meta), placed.place
        )

    read_each(text, rows_with(rows, "arg_id"))
    read_each(pair, rows_with(rows, "arg1"))
    return Votes(collector.pairs())


def read_pandalm(rows: Sequence[Placed]) -> Votes:
    """PandaLM's test set; the columns annotator1..3 are taken for three people."""
    pairs = []

    def one(placed: Placed) -> None:
        row = placed.row
        asked = [shown_text(row, key) for key in ("instruction", "input") if row.get(key) is not None]
        prompt = "\n\n".join(part for part in asked if part.strip())
        names = {0: "tie", 1: "a", 2: "b"}
        votes = ((k, need(row, f"annotator{k}")) for k in (1, 2, 3))
        ballots = tuple(Ballot(str(k), choice_of(vote, f"'annotator{k}'", names)) for k, vote in votes)
        systems = text_of(row, "cmp_key").split("_")
        if len(systems) != 2:
            raise BadRow(f"'cmp_key' is {row['cmp_key']!r:.60}, expected two systems with _ between them")
        # The published table lost its quotes in six places: an answer "True" became a truth value.
        a, b = (shown_text(row, key) for key in ("response1", "response2"))
        pairs.append(VotedPair(prompt, a, b, ballots, systems[0], systems[1], placed.number))

    read_each(one, rows)
    return Votes(pairs)


_GRADED = {"a-is-better": "a", "a-is-slightly-better": "a", "tie": "tie"}
_GRADED |= {"b-is-better": "b", "b-is-slightly-better": "b"}


def read_tulu(rows: Sequence[Placed]) -> Votes:
    """Tulu 1: five grades become three; which model was shown as a differs between annotators."""
    collector = Collector()

    def one(placed: Placed) -> None:
        completions = object_of(placed.row, "completions")
        latest = {name_of(given, "annotator"): given for given in objects_of(placed.row, "annotations")}
        for who, given in latest.items():
            a, b = text_of(given, "model_a"), text_of(given, "model_b")
            vote = Ballot(who, choice_of(given.get("preference"), "'preference'", _GRADED))
            both = shown_text(completions, a), shown_text(completions, b)
            pair = VotedPair(text_of(placed.row, "prompt"), *both, (vote,), a, b, placed.number)
            collector.add(pair, placed.place)

    read_each(one, rows)
    return Votes(collector.pairs())


def read_squality(rows: Sequence[Placed]) -> Votes:
    """SQuALITY: each reviewer's overall ranking of three answers. The prompt is the question without its story."""
    rankings = []

    def one(placed: Placed) -> None:
        row = placed.row
        responses = object_of(row, "responses")
        names = tuple(sorted(responses))
        ranks: dict[str, tuple[float, ...]] = {}
        for given in objects_of(row, "reviewers"):
            systems, who = object_of(given, "systems"), name_of(given, "worker")
            if who in ranks:
                raise BadRow(f"'worker' is {who!r:.60}, who ranked these responses before; one ranking each")
            given_ranks = (object_of(systems, name).get("overall_rank") for name in names)
            ranks[who] = tuple(rank_of(rank, "'overall_rank'") for rank in given_ranks)
        # The same question is asked about every story, so the passage is part of the prompt.
        prompt = f"{text_of(row, 'question')} (story {text_of(row, 'passage_id')})"
        rankings.append(RankedPrompt(prompt, names, tuple(text_of(responses, n) for n in names), ranks, placed.number))

    read_each(one, rows)
    return votes_of_rankings(rankings)


def read_mt_bench(rows: Sequence[Placed]) -> Votes:
    """MT-bench votes without the answers' texts: good for agreement and strengths, not for training."""
    collector = Collector()
    seen: set[tuple[Any, ...]] = set()

    def one(placed: Placed) -> None:
        row = placed.row
        a, b = text_of(row, "model_a"), text_of(row, "model_b")
        vote = Ballot(text_of(row, "judge"), choice_of(row.get("winner"), "'winner'", _WINNERS))
        prompt = f"question {name_of(row, 'question_id')}, turn {name_of(row, 'turn')}"
        key = (vote.annotator, prompt, *sorted([a, b]))
        if key not in seen:  # a few judges were asked again; their first vote counts
            seen.add(key)
            collector.add(VotedPair(prompt, "", "", (vote,), a, b, placed.number), placed.place)

    read_each(one, rows_with(rows, "winner"))
    return Votes(collector.pairs())


_WINNERS = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (inconsistent)": "tie"}
_CRITERIA = ("RE", "CH", "EM", "SU", "EG", "CX")


def read_hanna(rows: Sequence[Placed]) -> Votes:
    """HANNA: per prompt, three slots of raters rank eleven stories by their mean rating. Slots are no persons."""
    ratings: dict[int, dict[str, dict[str, float]]] = {}

    def one(placed: Placed) -> None:
        row = placed.row
        mean = sum(rank_of(need(row, key), f"'{key}'") for key in _CRITERIA) / len(_CRITERIA)
        numbers = (int(rank_of(need(row, key), f"'{key}'")) for key in ("prompt_id", "rater_slot"))
        (prompt, slot), system = numbers, text_of(row, "system")
        rated = ratings.setdefault(prompt, {}).setdefault(f"slot {slot}", {})
        if system in rated:
            raise BadRow(f"'system' is {system!r:.60}, which this slot rated before; one rating each")
        rated[system] = -mean

    read_each(one, rows_with(rows, "rater_slot"))
    rankings = []
    for number, (prompt, slots) in enumerate(ratings.items()):
        names = tuple(sorted(set.intersection(*(set(found) for found in slots.values()))))
        ranks = {slot: tuple(found[name] for name in names) for slot, found in slots.items()}
        rankings.append(RankedPrompt(f"prompt {prompt}", names, ("",) * len(names), ranks, number))
    return votes_of_rankings(rankings)


def read_llmbar(rows: Sequence[Placed]) -> Votes:
    """LLMBar: every judge and strategy is an annotator; a verdict that changes with the order is a tie."""
    texts: dict[str, VotedPair] = {}
    ballots: dict[str, dict[str, Ballot]] = {}

    def text(placed: Placed) -> None:
        row, item = placed.row, text_of(placed.row, "id")
        if item in texts:
            raise BadRow(f"'id' is {item!r:.60}, which stands before; every item once")
        meta = {"subset": row.get("subset"), "label": row.get("label")}
        a, b = (text_of(row, key) for key in ("output_1", "output_2"))
        texts[item] = VotedPair(text_of(row, "input"), a, b, (), "1", "2", placed.number, meta)

    def one(placed: Placed) -> None:
        row = placed.row
        item = text_of(row, "id")
        if item not in texts:
            raise BadRow(f"'id' is {item!r}, whose outputs are in no file; give the file of items too")
        verdicts = [str(row.get(key) or "") for key in ("winner_order_ab", "winner_order_ba")]
        if all(verdict in ("1", "2") for verdict in verdicts):
            vote = "tie" if verdicts[0] != verdicts[1] else "a" if verdicts[0] == "1" else "b"
            who = f"{text_of(row, 'judge')} {text_of(row, 'strategy')}"
            if who in ballots.setdefault(item, {}):
                raise BadRow(f"'judge' and 'strategy' are {who!r:.60}, who judged this item before; one verdict each")
            ballots[item][who] = Ballot(who, vote)

    read_each(text, rows_with(rows, "output_1"))
    read_each(one, rows_with(rows, "winner_order_ab"))
    return Votes([replace(texts[item], ballots=tuple(found.values())) for item, found in ballots.items()])


def read_qlora(rows: Sequence[Placed]) -> Votes:
    """QLoRA's round robins by GPT-4: the two orders of showing a pair are two annotators."""
    texts: dict[tuple[str, str], str] = {}
    asked: dict[str, str] = {}
    collector = Collector()

    def answer(placed: Placed) -> None:
        key = name_of(placed.row, "question_id"), text_of(placed.row, "system")
        if texts.setdefault(key, said := shown_text(placed.row, "response")) != said:
            raise BadRow(f"'response' of {key[1]!r:.60} to question {key[0]} differs from the one before")

    def question(placed: Placed) -> None:
        number, said = name_of(placed.row, "question_id"), text_of(placed.row, "text")
        if asked.setdefault(number, said) != said:
            raise BadRow(f"'text' of question {number} differs from the one before")

    names = {"1": "a", "2": "b", "3": "tie"}

    def one(placed: Placed) -> None:
        row = placed.row
        if str(row.get("score")) == "-1":
            return
        number, a, b = name_of(row, "question_id"), text_of(row, "system_first"), text_of(row, "system_second")
        order = "first" if a < b else "second"
        vote = Ballot(f"gpt-4, {order} order", choice_of(str(need(row, "score")), "'score'", names))
        said_a, said_b = (texts.get((number, name), "") for name in (a, b))
        pair = VotedPair(asked.get(number, f"question {number}"), said_a, said_b, (vote,), a, b, placed.number)
        collector.add(pair, placed.place)

    read_each(answer, rows_with(rows, "response"))
    read_each(question, rows_with(rows, "text"))
    read_each(one, rows_with(rows, "system_first"))
    return Votes(collector.pairs())
