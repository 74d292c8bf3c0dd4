"""Formats that compare answers or continuations to one prompt: shp, stack_exchange, tldr, imdb_prefix."""

from __future__ import annotations

from collections.abc import Mapping

from prefopt.readers.fields import choice, need, need_text, number_of, refuse_tie
from prefopt.readers.markup import plain_text
from prefopt.readers.raw import RAW_ROLE, Answers, BadRow, Reader, Refused, Row


def _read_shp(row: Row) -> Answers:
    """Stanford Human Preferences: ``labels`` is 1 where A is preferred, 0 where B is."""
    prompt = [{"role": "user", "content": need_text(row, "history")}]
    a, b = need_text(row, "human_ref_A"), need_text(row, "human_ref_B")
    if {"score_A", "score_B"} <= row.keys():
        refuse_tie(row, "score_A", "score_B")
    return (prompt, a, b) if choice(row, "labels") == 1 else (prompt, b, a)


def _read_stack_exchange(row: Row) -> Answers:
    """H4 Stack Exchange: the best against the worst answer by ``pm_score``; mark-up is taken off."""
    answers = need(row, "answers")
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise BadRow("'answers' must be a list of objects with text and pm_score")
    scores = [number_of(need(answer, "pm_score"), "'pm_score'") for answer in answers]
    if not scores or min(scores) == max(scores):
        raise Refused("tie", f"{len(scores)} answers, all of one score")
    best, worst = (answers[scores.index(end(scores))] for end in (max, min))
    prompt = [{"role": "user", "content": plain_text(need_text(row, "question"))}]
    return prompt, plain_text(need_text(best, "text")), plain_text(need_text(worst, "text"))


def _read_tldr(row: Row) -> Answers:
    """OpenAI summarize_from_feedback comparisons; the prompt is a raw prefix that ends in ``TL;DR:``."""
    info, summaries = need(row, "info"), need(row, "summaries")
    if not isinstance(info, Mapping):
        raise BadRow(f"'info' is {type(info).__name__}, expected an object")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise BadRow("'summaries' must be a list of two objects with text")
    texts = [" " + need_text(summary, "text").strip() for summary in summaries]
    if info.get("post") is None:
        raise Refused("empty prompt", "'info' has no post")
    head, title, post = (need_text(info, key).strip() for key in ("subreddit", "title", "post"))
    prefix = f"SUBREDDIT: r/{head}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    preferred = choice(row, "choice")
    return [{"role": RAW_ROLE, "content": prefix if post else ""}], texts[preferred], texts[1 - preferred]


def _read_imdb_prefix(row: Row) -> Answers:
    """``prompt`` or ``text`` is the beginning of a text, the answers are two ways to go on, white space kept as it is.

    With ``text``, answers that repeat it are cut to what follows: public IMDB pairs hold whole reviews.
    """
    if "prompt" in row or "text" not in row:
        beginning, repeated = need_text(row, "prompt"), ""
    else:
        beginning = repeated = need_text(row, "text")
    sides = (need_text(row, side).removeprefix(repeated) for side in ("chosen", "rejected"))
    chosen, rejected = sides
    return [{"role": RAW_ROLE, "content": beginning}], chosen, rejected


SHP = Reader(
    _read_shp,
    lambda row: {"history", "human_ref_A", "human_ref_B", "labels"} <= row.keys(),
    "history, human_ref_A, human_ref_B, labels",
)
STACK_EXCHANGE = Reader(
    _read_stack_exchange,
    lambda row: {"question", "answers"} <= row.keys(),
    "question, answers (objects with text, pm_score)",
)
TLDR = Reader(_read_tldr, lambda row: {"info", "summaries", "choice"} <= row.keys(), "info, summaries, choice")
# Its keys are those of trl, with another meaning: only the user can know, so auto never picks it.
IMDB_PREFIX = Reader(_read_imdb_prefix, lambda _: False, "prompt, chosen, rejected (never detected, name it)")
