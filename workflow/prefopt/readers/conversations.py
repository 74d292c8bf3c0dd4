"""Formats whose two sides are conversations that differ in their last turn: hh, trl, ultrafeedback."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from prefopt.readers.fields import messages_of, need, need_text, refuse_tie
from prefopt.readers.raw import Answers, BadRow, Message, Reader, Refused, Row

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_START = "\n\nHuman:"


def _read_hh(row: Row) -> Answers:
    """Whole transcripts in ``chosen`` and ``rejected`` (Anthropic HH-RLHF)."""
    return _answers(*(_transcript(need_text(row, side), side) for side in ("chosen", "rejected")))


def _is_hh(row: Row) -> bool:
    return all(isinstance(row.get(side), str) and row[side].startswith(_HH_START) for side in ("chosen", "rejected"))


def _transcript(text: str, side: str) -> list[Message]:
    before, *turns = _HH_TURN.split(text)
    if before.strip() or (turns and turns[0] != "Human"):
        raise Refused("no user turn at the start", side)
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": content.strip()} for speaker, content in pairs]


def _read_trl(row: Row) -> Answers:
    """``prompt``, ``chosen``, ``rejected`` as text or messages; without ``prompt`` the shared messages are it.

    A prompt given as text is one user message.
    """
    prompt = _prompt_messages(row["prompt"]) if "prompt" in row else None
    return _answers(*(_conversation(prompt, need(row, side), side) for side in ("chosen", "rejected")))


def _is_trl(row: Row) -> bool:
    if not {"chosen", "rejected"} <= row.keys() or _is_scored(row):
        return False
    return "prompt" in row or all(isinstance(row[side], list) for side in ("chosen", "rejected"))


def _prompt_messages(value: Any) -> list[Message]:
    if isinstance(value, list):
        return messages_of(value, "'prompt'")
    if not isinstance(value, str):
        raise BadRow(f"'prompt' is {type(value).__name__}, expected text or a list of messages")
    return [{"role": "user", "content": value}]


def _conversation(prompt: list[Message] | None, value: Any, side: str) -> list[Message]:
    if isinstance(value, str):
        if prompt is None:
            raise BadRow(f"'{side}' is text and there is no 'prompt'; give the prompt, or use the reader hh")
        return [*prompt, {"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise BadRow(f"'{side}' is {type(value).__name__}, expected text or a list of messages")
    messages = messages_of(value, f"'{side}'")
    if not prompt or not messages:
        return messages
    if messages[0]["role"] == "assistant" and messages[: len(prompt)] != prompt:
        return [*prompt, *messages]
    if prompt[-1] not in messages[:-1]:
        raise Refused("differs before the last turn", f"'prompt' is no part of '{side}'")
    return messages


def _read_ultrafeedback(row: Row) -> Answers:
    """The trl form with ``score_chosen`` and ``score_rejected``; equal scores are a tie."""
    answers = _read_trl(row)
    refuse_tie(row, "score_chosen", "score_rejected")
    return answers


def _is_scored(row: Row) -> bool:
    return {"score_chosen", "score_rejected"} <= row.keys()


def _answers(chosen: list[Message], rejected: list[Message]) -> Answers:
    """Split two whole conversations at their last turn."""
    for side, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1]["role"] != "assistant":
            raise Refused("no assistant turn at the end", side)
    if chosen[:-1] != rejected[:-1]:
        same = sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False)))
        raise Refused("differs before the last turn", f"turn {same + 1} of {len(chosen)} and {len(rejected)}")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


HH = Reader(_read_hh, _is_hh, f"chosen, rejected (transcripts that start with {_HH_START!r})")
TRL = Reader(_read_trl, _is_trl, "prompt, chosen, rejected (or chosen, rejected as message lists)")
ULTRAFEEDBACK = Reader(
    _read_ultrafeedback,
    lambda row: {"prompt", "chosen", "rejected"} <= row.keys() and _is_scored(row),
    "prompt, chosen, rejected, score_chosen, score_rejected",
)
