"""Readers of public data sets with several annotators per item; each takes all rows of all its files at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.annotators.rows import (
    Placed,
    Row,
    choice_of,
    name_of,
    need,
    read_each,
    rows_with,
    text_of,
    votes_of_rankings,
)
from prefopt.annotators.votes import Ballot, Collector, RankedPrompt, VotedPair, Votes
from prefopt.readers import BadRow


def read_ukp(rows: Sequence[Placed]) -> Votes:
    """UKPConvArg1: pairs of arguments on one side of a debate; their texts stand in the other file."""
    texts: dict[tuple[str, str], Row] = {}
    collector = Collector()

    def text(placed: Placed) -> None:
        texts[text_of(placed.row, "topic_side"), text_of(placed.row, "arg_id")] = placed.row

    def pair(placed: Placed) -> None:
        row = placed.row
        sides = []
        for key in ("arg1", "arg2"):
            topic, name = text_of(row, "topic_side"), text_of(row, key)
            if (topic, name) not in texts:
                raise BadRow(f"'{key}' is {name!r}, whose text is in no file; give the file of arguments too")
            sides.append(texts[topic, name])
        names = {"a1": "a", "a2": "b", "equal": "tie"}
        ballots = [Ballot(name_of(v, "worker"), choice_of(v.get("vote"), "'vote'", names)) for v in need(row, "votes")]
        first, second = sides
        prompt = f"{text_of(first, 'debate_title')}: {text_of(first, 'stance')}"
        meta = {"gold": names[row["gold"]] if row.get("gold") else None}
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
        prompt = "\n\n".join(part for part in (need(row, "instruction"), row.get("input")) if part and part.strip())
        names = {0: "tie", 1: "a", 2: "b"}
        ballots = tuple(Ballot(str(k), choice_of(row[f"annotator{k}"], f"'annotator{k}'", names)) for k in (1, 2, 3))
        systems = text_of(row, "cmp_key").split("_")
        # The published table lost its quotes in six places: an answer "True" became a truth value.
        both = (str(need(row, key)) for key in ("response1", "response2"))
        pairs.append(VotedPair(prompt, *both, ballots, *systems, placed.number))

    read_each(one, rows)
    return Votes(pairs)


_GRADED = {"a-is-better": "a", "a-is-slightly-better": "a", "tie": "tie"}
_GRADED |= {"b-is-better": "b", "b-is-slightly-better": "b"}


def read_tulu(rows: Sequence[Placed]) -> Votes:
    """Tulu 1: five grades become three; which model was shown as a differs between annotators."""
    collector = Collector()

    def one(placed: Placed) -> None:
        completions = need(placed.row, "completions")
        latest = {name_of(given, "annotator"): given for given in need(placed.row, "annotations")}
        for who, given in latest.items():
            a, b = text_of(given, "model_a"), text_of(given, "model_b")
            vote = Ballot(who, choice_of(given.get("preference"), "'preference'", _GRADED))
            pair = VotedPair(
                text_of(placed.row, "prompt"), str(completions[a]), str(completions[b]), (vote,), a, b, placed.number
            )
            collector.add(pair, placed.place)

    read_each(one, rows)
    return Votes(collector.pairs())


def read_squality(rows: Sequence[Placed]) -> Votes:
    """SQuALITY: each reviewer's overall ranking of three answers. The prompt is the question without its story."""
    rankings = []

    def one(placed: Placed) -> None:
        row = placed.row
        responses = need(row, "responses")
        names = tuple(sorted(responses))
        ranks = {
            name_of(given, "worker"): tuple(float(given["systems"][name]["overall_rank"]) for name in names)
            for given in need(row, "reviewers")
        }
        # The same question is asked about every story, so the passage is part of the prompt.
        prompt = f"{text_of(row, 'question')} (story {text_of(row, 'passage_id')})"
        rankings.append(RankedPrompt(prompt, names, tuple(responses[n] for n in names), ranks, placed.number))

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
        try:
            mean = sum(float(need(row, key)) for key in _CRITERIA) / len(_CRITERIA)
            prompt, slot, system = int(row["prompt_id"]), f"slot {int(row['rater_slot'])}", text_of(row, "system")
        except (ValueError, KeyError) as error:
            raise BadRow(f"not a row of HANNA's ratings ({error})") from None
        ratings.setdefault(prompt, {}).setdefault(slot, {})[system] = -mean

    read_each(one, rows_with(rows, "rater_slot"))
    rankings = []
    for number, (prompt, slots) in enumerate(ratings.items()):
        names = tuple(sorted(set.intersection(*(set(found) for found in slots.values()))))
        ranks = {slot: tuple(found[name] for name in names) for slot, found in slots.items()}
        rankings.append(RankedPrompt(f"prompt {prompt}", names, ("",) * len(names), ranks, number))
    return votes_of_rankings(rankings)


def read_llmbar(rows: Sequence[Placed]) -> Votes:
    """LLMBar: every judge and strategy is an annotator; a verdict that changes with the order is a tie."""
    texts = {placed.row["id"]: placed for placed in rows_with(rows, "output_1")}
    ballots: dict[str, list[Ballot]] = {}

    def one(placed: Placed) -> None:
        row = placed.row
        item = text_of(row, "id")
        if item not in texts:
            raise BadRow(f"'id' is {item!r}, whose outputs are in no file; give the file of items too")
        verdicts = [str(row.get(key) or "") for key in ("winner_order_ab", "winner_order_ba")]
        if all(verdict in ("1", "2") for verdict in verdicts):
            vote = "tie" if verdicts[0] != verdicts[1] else "a" if verdicts[0] == "1" else "b"
            ballots.setdefault(item, []).append(Ballot(f"{text_of(row, 'judge')} {text_of(row, 'strategy')}", vote))

    read_each(one, rows_with(rows, "winner_order_ab"))
    return Votes([_llmbar_pair(texts[item], tuple(found)) for item, found in ballots.items()])


def _llmbar_pair(placed: Placed, ballots: tuple[Ballot, ...]) -> VotedPair:
    row = placed.row
    meta = {"subset": row.get("subset"), "label": row.get("label")}
    return VotedPair(row["input"], row["output_1"], row["output_2"], ballots, "1", "2", placed.number, meta)


def read_qlora(rows: Sequence[Placed]) -> Votes:
    """QLoRA's round robins by GPT-4: the two orders of showing a pair are two annotators."""
    texts = {(str(p.row["question_id"]), p.row["system"]): str(p.row["response"]) for p in rows_with(rows, "response")}
    asked = {str(p.row["question_id"]): str(p.row["text"]) for p in rows_with(rows, "text")}
    collector = Collector()
    names = {"1": "a", "2": "b", "3": "tie"}

    def one(placed: Placed) -> None:
        row = placed.row
        if str(row.get("score")) == "-1":
            return
        question, a, b = name_of(row, "question_id"), text_of(row, "system_first"), text_of(row, "system_second")
        vote = Ballot(f"gpt-4, {'first' if a < b else 'second'} order", choice_of(str(row["score"]), "'score'", names))
        both = (texts.get((question, name), "") for name in (a, b))
        pair = VotedPair(asked.get(question, f"question {question}"), *both, (vote,), a, b, placed.number)
        collector.add(pair, placed.place)

    read_each(one, rows_with(rows, "system_first"))
    return Votes(collector.pairs())
