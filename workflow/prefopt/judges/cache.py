"""Answers that were paid for, on disk the moment they arrive: a killed run asks only for what is not there."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.digests import canonical_json
from prefopt.errors import BadInput, PrefoptError, TryAgain
from prefopt.judges.answers import RawAnswer
from prefopt.judges.templates import Question

_WAIT_SECONDS = 60.0
_MOVE_AWAY = "move it away, and what it held is asked again"
_MAY_PASS = {  # locks, a full disk, a folder that cannot be written
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
}


class AnswerCache:
    """One judge's answers by the content of the question, in an SQLite file that several jobs may share.

    An answer is committed as it is kept and never changed, so that no kill can lose or tear one.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = canonical_json(identity)
        self._path = folder / f"{hashlib.sha256(self._identity.encode()).hexdigest()[:16]}.sqlite"
        try:
            self._connection = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
        except sqlite3.Error as error:
            raise self._failure(error) from error
        self._execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def key(self, question: Question) -> str:
        """sha256 over the judge's identity, the request, and the answers in the order shown."""
        return hashlib.sha256(f"{self._identity}\n{canonical_json(question)}".encode()).hexdigest()

    def kept(self, keys: Iterable[str]) -> dict[str, RawAnswer]:
        """The answers that are there, by key."""
        query = "SELECT answer FROM answers WHERE question = ?"
        rows = ((key, self._execute(query, (key,))) for key in dict.fromkeys(keys))
        try:
            return {key: RawAnswer.from_json(found[0][0]) for key, found in rows if found}
        except (TypeError, ValueError) as error:
            raise BadInput(f"{self._path}: a damaged answer, {error}; {_MOVE_AWAY}") from None

    def keep(self, key: str, answer: RawAnswer) -> None:
        """Put an answer on disk; where another job was first, its answer stays."""
        self._execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, answer.to_json()))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _execute(self, statement: str, values: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second for a damaged schema
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> PrefoptError:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _MAY_PASS:
            return TryAgain(f"{self._path}: the judge's answers cannot be kept there ({error})")
        return BadInput(f"{self._path}: not a file of a judge's answers ({error}); {_MOVE_AWAY}")
