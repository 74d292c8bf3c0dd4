"""A pair as it is read: prompt, two answers, what else the row said; and why a row gives none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
_LONGEST_META_TEXT = 200


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


def _is_small_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_META_TEXT
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def meta_json(meta: Row) -> str:
    """Meta data as one JSON text, pure ASCII so that any table format stores it."""
    return json.dumps(dict(meta), sort_keys=True)


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


@dataclass(frozen=True, slots=True)
class Reader:
    """How rows of one format are recognised and read; ``form`` tells users which keys it takes."""

    read: Callable[[Row], Answers]
    fits: Callable[[Row], bool]
    form: str
