"""Readers: one row of a known preference format becomes a prompt and two answers, or is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.errors import BadInput, nearest
from prefopt.markup import plain_text

Message = dict[str, str]
Row = Mapping[str, Any]
Answers = tuple[list[Message], str, str]  # prompt messages, chosen, rejected

ROLES = ("system", "user", "assistant")
RAW_ROLE = "text"  # a single message of this role is a raw prefix to be continued

REASONS = (
    "identical pair",
    "empty chosen",
    "empty rejected",
    "empty prompt",
    "differs before the last turn",
    "no assistant turn at the end",
    "no user turn at the start",
    "tie",
    "broken unicode",
    "duplicate pair",
)

_TEXT_KEYS = frozenset({"prompt", "chosen", "rejected", "history", "human_ref_A", "human_ref_B", "question"})
_LONGEST_META_TEXT = 200
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_START = "\n\nHuman:"


class Refused(Exception):
    """A well-formed row that is no usable pair; ``reason`` is one of a short vocabulary."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BadRow(Exception):
    """A row that does not have the reader's form; the caller adds the file and the line."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One preference as read: prompt messages, the two answers, and what else the row said (scalars only)."""

    prompt: list[Message]
    chosen: str
    rejected: str
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reader:
    """How rows of one format are recognised and read."""

    read: Callable[[Row], Answers]
    fits: Callable[[Row], bool]
    form: str


def read_row(reader: Reader, row: Row) -> RawPair:
    """Read one row with ``reader``. Raises Refused for an unusable pair, BadRow for another form."""
    prompt, chosen, rejected = reader.read(row)
    return checked_pair(prompt, chosen, rejected, {k: v for k, v in row.items() if k not in _TEXT_KEYS})


def checked_pair(prompt: list[Message], chosen: str, rejected: str, extra: Row) -> RawPair:
    """The pair, if both answers and the prompt say something and the answers differ; raises Refused otherwise."""
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise Refused(f"empty {side}")
    if chosen.strip() == rejected.strip():
        raise Refused("identical pair")
    if not any(message["content"].strip() for message in prompt):
        raise Refused("empty prompt")
    for text in (chosen, rejected, *(message["content"] for message in prompt)):
        require_unicode(text)
    return RawPair(prompt, chosen, rejected, {k: v for k, v in extra.items() if _is_small_scalar(v)})


def require_unicode(text: str) -> None:
    """Raises Refused for a text that no file can hold."""
    if (at := broken_at(text)) is not None:
        raise Refused("broken unicode", f"lone surrogate at character {at}")


def broken_at(text: str) -> int | None:
    """Where a text has a lone surrogate, so that it is no Unicode and cannot be written; None where it has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def meta_json(meta: Row) -> str:
    """Meta data as one JSON text, pure ASCII so that any table format stores it."""
    return json.dumps(dict(meta), sort_keys=True)


def find_reader(name: str, row: Row) -> Reader:
    """The reader of that name; ``auto`` looks at a file's first row.

    Raises BadInput for an unknown name, BadRow where the row fits no reader or more than one.
    """
    if name != "auto":
        if name not in READERS:
            raise BadInput(f"unknown reader '{name}'; {nearest(name, ['auto', *READERS])}")
        return READERS[name]
    fitting = [known for known, reader in READERS.items() if reader.fits(row)]
    if len(fitting) == 1:
        return READERS[fitting[0]]
    if fitting:
        raise BadRow(f"fits the readers {' and '.join(fitting)} ({_keys_of(row)}); name one of them as `reader`")
    forms = "; ".join(f"{known}: {reader.form}" for known, reader in READERS.items())
    raise BadRow(f"fits no reader ({_keys_of(row)}); readers and the keys they need are {forms}")


def _is_small_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_META_TEXT
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _keys_of(row: Row) -> str:
    return f"the row has the keys: {', '.join(map(str, row)) or 'none'}"


def _need(row: Row, key: str) -> Any:
    if key not in row:
        raise BadRow(f"no key '{key}' ({_keys_of(row)})")
    return row[key]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {type(value).__name__}, expected text")
    return value


def _need_text(row: Row, key: str) -> str:
    return _text(_need(row, key), f"'{key}'")


def _number(value: Any, what: str) -> float:
    # CSV has no numbers: every field arrives as text.
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise BadRow(f"{what} is {value!r:.60}, expected a number") from None
    if not math.isfinite(number):
        raise BadRow(f"{what} is {number}, expected a finite number")
    return number


def _choice(row: Row, key: str) -> int:
    number = _number(_need(row, key), f"'{key}'")
    if number not in (0, 1):
        raise BadRow(f"'{key}' is {number:g}, expected 0 or 1")
    return int(number)


def _refuse_tie(row: Row, first: str, second: str) -> None:
    scores = [_number(_need(row, key), f"'{key}'") for key in (first, second)]
    if scores[0] == scores[1]:
        raise Refused("tie", f"{first} = {second} = {scores[0]:g}")


def _messages(value: list[Any], what: str) -> list[Message]:
    messages = []
    for place, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise BadRow(f"message {place} of {what} is {type(item).__name__}, expected an object with role, content")
        role = _need_text(item, "role")
        if role not in ROLES:
            raise BadRow(f"message {place} of {what} has the role '{role:.40}'; {nearest(role, ROLES)}")
        messages.append(
            {"role": role, "content": _text(_need(item, "content"), f"content of message {place} of {what}")}
        )
    return messages


def _answers(chosen: list[Message], rejected: list[Message]) -> Answers:
    """Split two whole conversations at their last turn."""
    for side, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1]["role"] != "assistant":
            raise Refused("no assistant turn at the end", side)
    if chosen[:-1] != rejected[:-1]:
        same = sum(1 for _ in _common_prefix(chosen, rejected))
        raise Refused("differs before the last turn", f"turn {same + 1} of {len(chosen)} and {len(rejected)}")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _common_prefix(left: list[Message], right: list[Message]) -> Any:
    for one, other in zip(left, right, strict=False):
        if one != other:
            return
        yield one


# --- the formats ----------------------------------------------------------------------------------------------------


def _read_hh(row: Row) -> Answers:
    """Whole transcripts in ``chosen`` and ``rejected`` (Anthropic HH-RLHF)."""
    return _answers(*(_transcript(_need_text(row, side), side) for side in ("chosen", "rejected")))


def _transcript(text: str, side: str) -> list[Message]:
    before, *turns = _HH_TURN.split(text)
    if before.strip() or (turns and turns[0] != "Human"):
        raise Refused("no user turn at the start", side)
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": content.strip()} for speaker, content in pairs]


def _is_hh(row: Row) -> bool:
    return all(isinstance(row.get(side), str) and row[side].startswith(_HH_START) for side in ("chosen", "rejected"))


def _read_trl(row: Row) -> Answers:
    """``prompt``, ``chosen``, ``rejected`` as text or messages; without ``prompt`` the shared messages are it.

    A prompt given as text is one user message.
    """
    prompt = _prompt_messages(row["prompt"]) if "prompt" in row else None
    return _answers(*(_conversation(prompt, _need(row, side), side) for side in ("chosen", "rejected")))


def _prompt_messages(value: Any) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, "'prompt'")
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
    messages = _messages(value, f"'{side}'")
    if not prompt or not messages:
        return messages
    if messages[0]["role"] == "assistant" and messages[: len(prompt)] != prompt:
        return [*prompt, *messages]
    if prompt[-1] not in messages[:-1]:
        raise Refused("differs before the last turn", f"'prompt' is no part of '{side}'")
    return messages


def _is_scored(row: Row) -> bool:
    return {"score_chosen", "score_rejected"} <= row.keys()


def _is_trl(row: Row) -> bool:
    if not {"chosen", "rejected"} <= row.keys() or _is_scored(row):
        return False
    return "prompt" in row or all(isinstance(row[side], list) for side in ("chosen", "rejected"))


def _read_ultrafeedback(row: Row) -> Answers:
    """The trl form with ``score_chosen`` and ``score_rejected``; equal scores are a tie."""
    answers = _read_trl(row)
    _refuse_tie(row, "score_chosen", "score_rejected")
    return answers


def _read_shp(row: Row) -> Answers:
    """Stanford Human Preferences: ``labels`` is 1 where A is preferred, 0 where B is."""
    prompt = [{"role": "user", "content": _need_text(row, "history")}]
    a, b = _need_text(row, "human_ref_A"), _need_text(row, "human_ref_B")
    if {"score_A", "score_B"} <= row.keys():
        _refuse_tie(row, "score_A", "score_B")
    return (prompt, a, b) if _choice(row, "labels") == 1 else (prompt, b, a)


def _read_stack_exchange(row: Row) -> Answers:
    """H4 Stack Exchange: the best against the worst answer by ``pm_score``; mark-up is taken off."""
    answers = _need(row, "answers")
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise BadRow("'answers' must be a list of objects with text and pm_score")
    scores = [_number(_need(answer, "pm_score"), "'pm_score'") for answer in answers]
    if not scores or min(scores) == max(scores):
        raise Refused("tie", f"{len(scores)} answers, all of one score")
    best, worst = (answers[scores.index(end(scores))] for end in (max, min))
    prompt = [{"role": "user", "content": plain_text(_need_text(row, "question"))}]
    return prompt, plain_text(_need_text(best, "text")), plain_text(_need_text(worst, "text"))


def _read_tldr(row: Row) -> Answers:
    """OpenAI summarize_from_feedback comparisons; the prompt is a raw prefix that ends in ``TL;DR:``."""
    info, summaries = _need(row, "info"), _need(row, "summaries")
    if not isinstance(info, Mapping):
        raise BadRow(f"'info' is {type(info).__name__}, expected an object")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise BadRow("'summaries' must be a list of two objects with text")
    texts = [" " + _need_text(summary, "text").strip() for summary in summaries]
    if info.get("post") is None:
        raise Refused("empty prompt", "'info' has no post")
    head, title, post = (_need_text(info, key).strip() for key in ("subreddit", "title", "post"))
    prefix = f"SUBREDDIT: r/{head}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    preferred = _choice(row, "choice")
    return [{"role": RAW_ROLE, "content": prefix if post else ""}], texts[preferred], texts[1 - preferred]


def _read_imdb_prefix(row: Row) -> Answers:
    """``prompt`` or ``text`` is the beginning of a text, the answers are two ways to go on, white space kept as it is.

    With ``text``, answers that repeat it are cut to what follows: public IMDB pairs hold whole reviews.
    """
    if "prompt" in row or "text" not in row:
        beginning, repeated = _need_text(row, "prompt"), ""
    else:
        beginning = repeated = _need_text(row, "text")
    sides = (_need_text(row, side).removeprefix(repeated) for side in ("chosen", "rejected"))
    chosen, rejected = sides
    return [{"role": RAW_ROLE, "content": beginning}], chosen, rejected


READERS: Mapping[str, Reader] = {
    "hh": Reader(_read_hh, _is_hh, f"chosen, rejected (transcripts that start with {_HH_START!r})"),
    "trl": Reader(_read_trl, _is_trl, "prompt, chosen, rejected (or chosen, rejected as message lists)"),
    "ultrafeedback": Reader(
        _read_ultrafeedback,
        lambda row: {"prompt", "chosen", "rejected"} <= row.keys() and _is_scored(row),
        "prompt, chosen, rejected, score_chosen, score_rejected",
    ),
    "shp": Reader(
        _read_shp,
        lambda row: {"history", "human_ref_A", "human_ref_B", "labels"} <= row.keys(),
        "history, human_ref_A, human_ref_B, labels",
    ),
    "stack_exchange": Reader(
        _read_stack_exchange,
        lambda row: {"question", "answers"} <= row.keys(),
        "question, answers (objects with text, pm_score)",
    ),
    "tldr": Reader(_read_tldr, lambda row: {"info", "summaries", "choice"} <= row.keys(), "info, summaries, choice"),
    # Its keys are those of trl, with another meaning: only the user can know, so auto never picks it.
    "imdb_prefix": Reader(_read_imdb_prefix, lambda _: False, "prompt, chosen, rejected (never detected, name it)"),
}
