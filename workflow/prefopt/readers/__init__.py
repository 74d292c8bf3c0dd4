"""Readers: one row of a known preference format becomes a prompt and two answers, or is refused."""

from __future__ import annotations

from collections.abc import Mapping

from prefopt.errors import BadInput, nearest
from prefopt.readers.comparisons import IMDB_PREFIX, SHP, STACK_EXCHANGE, TLDR
from prefopt.readers.conversations import HH, TRL, ULTRAFEEDBACK
from prefopt.readers.fields import keys_of
from prefopt.readers.raw import BadRow, RawPair, Reader, Row, checked_pair

READERS: Mapping[str, Reader] = {
    "hh": HH,
    "trl": TRL,
    "ultrafeedback": ULTRAFEEDBACK,
    "shp": SHP,
    "stack_exchange": STACK_EXCHANGE,
    "tldr": TLDR,
    "imdb_prefix": IMDB_PREFIX,
}
_TEXT_KEYS = frozenset({"prompt", "chosen", "rejected", "history", "human_ref_A", "human_ref_B", "question"})


def read_row(reader: Reader, row: Row) -> RawPair:
    """Read one row with ``reader``. Raises Refused for an unusable pair, BadRow for another form."""
    prompt, chosen, rejected = reader.read(row)
    return checked_pair(prompt, chosen, rejected, {k: v for k, v in row.items() if k not in _TEXT_KEYS})


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
        raise BadRow(f"fits the readers {' and '.join(fitting)} ({keys_of(row)}); name one of them as `reader`")
    forms = "; ".join(f"{known}: {reader.form}" for known, reader in READERS.items())
    raise BadRow(f"fits no reader ({keys_of(row)}); readers and the keys they need are {forms}")
