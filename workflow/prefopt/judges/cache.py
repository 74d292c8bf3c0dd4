"""Answers that were paid for, on disk the moment they arrive: a killed run asks only for what is not there."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.artifacts import canonical_json
from prefopt.errors import TryAgain
from prefopt.judges.answers import RawAnswer
from prefopt.judges.templates import Question

_WAIT_SECONDS = 60.0


class AnswerCache:
    """One judge's answers by the content of the question, in an SQLite file that several jobs may share.

    An answer is committed as it is kept and never changed, so that no kill can lose or tear one.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = canonical_json(identity)
        self._path = folder / f"{hashlib.sha256(self._identity.encode()).hexdigest()[:16]}.sqlite"
        self._connection = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
        self._execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def key(self, question: Question) -> str:
        """sha256 over the judge's identity, the request, and the answers in the order shown."""
        return hashlib.sha256(f"{self._identity}\n{canonical_json(question)}".encode()).hexdigest()

    def kept(self, keys: Iterable[str]) -> dict[str, RawAnswer]:
        """The answers that are there, by key."""
        query = "SELECT answer FROM answers WHERE question = ?"
        rows = ((key, self._execute(query, (key,))) for key in dict.fromkeys(keys))
        return {key: RawAnswer.from_json(found[0][0]) for key, found in rows if found}

    def keep(self, key: str, answer: RawAnswer) -> None:
        """Put an answer on disk; where another job was first, its answer stays."""
        self._execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, answer.to_json()))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _execute(self, statement: str, values: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            raise TryAgain(f"{self._path}: the judge's answers cannot be kept there ({error})") from error
