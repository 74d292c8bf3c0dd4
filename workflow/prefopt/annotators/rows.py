"""Rows of multi-annotator files and what readers need of them: checked values, and messages that name the place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prefopt.annotators.votes import RankedPrompt, Votes
from prefopt.errors import BadInput, nearest
from prefopt.readers.raw import BadRow, broken_at

Row = Mapping[str, Any]


class Placed(NamedTuple):
    """A row with the file and the place that messages name."""

    file: str
    number: int
    place: str
    row: Any


def bad_row(placed: Placed, why: str) -> BadInput:
    """The failure of one row, with its file and place."""
    return BadInput(f"{placed.file}: {placed.place}: {why}")


def need(row: Row, key: str) -> Any:
    """A value that must be there. Raises BadRow where it is not."""
    if key not in row or row[key] is None:
        raise BadRow(f"no '{key}' (the row has the keys: {', '.join(map(str, row)) or 'none'})")
    return row[key]


def text_of(row: Row, key: str) -> str:
    """A text that says something. Raises BadRow for anything else."""
    value = need(row, key)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"'{key}' is {value!r:.60}, expected a text that is not empty")
    return value


def name_of(row: Row, key: str) -> str:
    """An annotator or a system: a text or a whole number."""
    value = need(row, key)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise BadRow(f"'{key}' is {value!r:.60}, expected a name")
    if broken_at(str(value)) is not None:
        raise BadRow(f"'{key}' is {value!r:.60}, which has a lone surrogate and is no Unicode")
    return str(value)


def rank_of(value: Any, what: str) -> float:
    """A rank or a rating: a finite number, also as the text that CSV has. Raises BadRow for anything else."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{what} is {value!r:.60}, expected a number")
    return number


def objects_of(row: Row, key: str) -> list[Row]:
    """A list of objects with keys. Raises BadRow for anything else."""
    found = need(row, key)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise BadRow(f"'{key}' is {found!r:.60}, expected a list of objects")
    return found


def object_of(row: Row, key: str) -> Row:
    """An object with keys. Raises BadRow for anything else."""
    found = need(row, key)
    if not isinstance(found, Mapping):
        raise BadRow(f"'{key}' is {found!r:.60}, expected an object")
    return found


def shown_text(row: Row, key: str) -> str:
    """A text that may be empty, or a truth value or number that a lost pair of quotes made of one."""
    value = need(row, key)
    if not isinstance(value, str | bool | int | float):
        raise BadRow(f"'{key}' is {value!r:.60}, expected a text")
    return str(value)


def choice_of(value: Any, what: str, names: Mapping[Any, str]) -> str:
    """What one of the known values stands for. Raises BadRow, with the nearest, for another one."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in names:
        raise BadRow(f"{what} is {value!r:.60}; {nearest(str(value), map(str, names))}")
    return names[value]


def rows_with(rows: Iterable[Placed], key: str) -> Iterator[Placed]:
    """The rows that have a key: those of one of several files."""
    return (placed for placed in rows if key in placed.row)


def read_each(read: Callable[[Placed], None], rows: Iterable[Placed]) -> None:
    """Read every row; what is wrong with one is told with its file and place."""
    for placed in rows:
        try:
            read(placed)
        except BadRow as error:
            raise bad_row(placed, str(error)) from None


def votes_of_rankings(rankings: list[RankedPrompt]) -> Votes:
    """The rankings, and the votes on every pair that they imply."""
    return Votes([pair for one in rankings for pair in one.pairs()], rankings)
