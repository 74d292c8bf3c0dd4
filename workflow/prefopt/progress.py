"""Progress with a time estimate: a bar in a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from prefopt import team

_LINE_SECONDS = 10.0
_LINE_SHARE = 0.1


class Pace:
    """When a log says how far something is, and how long the rest will take if it goes on like that.

    Every tenth of the way, but not within 10 s of the last time, and at least once a minute; under 10 s never.
    """

    def __init__(self, total: int, start: int = 0) -> None:
        self._total, self._start, self._told = total, start, start
        self._began = self._told_at = time.monotonic()

    def left(self, done: int) -> str | None:
        """Time that is left, such as 01:30, where it is time to tell it."""
        now = time.monotonic()
        far, waited = done - self._told >= _LINE_SHARE * self._total, now - self._told_at
        if done == self._told or waited < _LINE_SECONDS or not (far or waited >= 6 * _LINE_SECONDS):
            return None
        self._told, self._told_at = done, now
        return str(tqdm.format_interval((now - self._began) / (done - self._start) * (self._total - done)))


class Progress:
    """Counts up to ``total``; silent where ``shown`` is false. Without a terminal it writes lines at a ``Pace``."""

    def __init__(self, total: int, label: str, *, start: int = 0, shown: bool = True) -> None:
        terminal, shown = sys.stderr.isatty(), shown and team.is_first()  # of several processes one speaks
        self._bar = tqdm(total=total, initial=start, desc=label, disable=not (shown and terminal), leave=False)
        self._pace = Pace(total, start) if shown and not terminal else None
        self._label, self._total, self._done = label, total, start

    def advance(self, note: str = "") -> None:
        """One more is done; ``note`` is shown behind the count."""
        self._done += 1
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()
        if self._pace is not None and (left := self._pace.left(self._done)):
            text = f"{self._label}: {self._done}/{self._total}, about {left} left"
            print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
