"""What may be shown of addresses, errors and log lines: no user, password or key that stands in them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

HIDDEN = "***"

_CREDENTIALS = re.compile(r"(?<=://)[^\s'\"<>]*@")  # up to the last @: passwords may hold one unescaped
_QUERY = re.compile(r"(?<=\?)[^\s'\"<>]+")
_ADDRESS = re.compile(r"\w[\w+.-]*://[^\s'\"<>]+")
_SECRET_NAME = re.compile(r"(KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS)$")
_SHORTEST = 8  # a shorter value may well be a common word, which would vanish from every message


def redacted(text: str) -> str:
    """``text`` without credentials and queries of addresses, and without values of secret environment variables.

    Secret are variables whose names end in KEY, TOKEN, PASSWORD, SECRET or CREDENTIALS, and the credentials and queries
    of addresses in any variable; from 8 characters on.
    """
    text = _ADDRESS.sub(lambda found: _QUERY.sub(HIDDEN, _CREDENTIALS.sub(f"{HIDDEN}@", found[0])), text)
    for value in sorted(_secrets(), key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()):
            yield value
        for address in _ADDRESS.findall(value):
            yield from (found[:-1].partition(":")[2] or found[:-1] for found in _CREDENTIALS.findall(address))
            yield from (part.partition("=")[2] or part for q in _QUERY.findall(address) for part in q.split("&"))


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks included, as ``redacted`` leaves them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redacted(super().format(record))
