"""Values of a row, checked for their kind: BadRow names the key, what stands there and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefopt.errors import nearest
from prefopt.readers.raw import ROLES, BadRow, Message, Refused, Row


def need(row: Row, key: str) -> Any:
    """The value of a key; BadRow where the row lacks it."""
    if key not in row:
        raise BadRow(f"no key '{key}' ({keys_of(row)})")
    return row[key]


def need_text(row: Row, key: str) -> str:
    """The text of a key; BadRow where the row lacks it, or has something else there."""
    return text_of(need(row, key), f"'{key}'")


def text_of(value: Any, what: str) -> str:
    """``value``, which must be text; ``what`` names it in BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{what} is {type(value).__name__}, expected text")
    return value


def number_of(value: Any, what: str) -> float:
    """A finite number, also as text, since CSV has no numbers; ``what`` names it in BadRow."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise BadRow(f"{what} is {value!r:.60}, expected a number") from None
    if not math.isfinite(number):
        raise BadRow(f"{what} is {number}, expected a finite number")
    return number


def choice(row: Row, key: str) -> int:
    """0 or 1 under a key; BadRow for anything else."""
    number = number_of(need(row, key), f"'{key}'")
    if number not in (0, 1):
        raise BadRow(f"'{key}' is {number:g}, expected 0 or 1")
    return int(number)


def messages_of(value: list[Any], what: str) -> list[Message]:
    """Chat messages with role and content; BadRow names the first that is none, ``what`` the list."""
    messages = []
    for place, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise BadRow(f"message {place} of {what} is {type(item).__name__}, expected an object with role, content")
        role = need_text(item, "role")
        if role not in ROLES:
            raise BadRow(f"message {place} of {what} has the role '{role:.40}'; {nearest(role, ROLES)}")
        messages.append(
            {"role": role, "content": text_of(need(item, "content"), f"content of message {place} of {what}")}
        )
    return messages


def keys_of(row: Row) -> str:
    """The keys that a row has, for messages about those it lacks."""
    return f"the row has the keys: {', '.join(map(str, row)) or 'none'}"


def refuse_tie(row: Row, first: str, second: str) -> None:
    """Raises Refused where two scores of the row are equal, so that neither answer is the better one."""
    scores = [number_of(need(row, key), f"'{key}'") for key in (first, second)]
    if scores[0] == scores[1]:
        raise Refused("tie", f"{first} = {second} = {scores[0]:g}")
