"""Progress with a time estimate: a bar in a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from prefopt import team

_LINE_SECONDS = 10.0
_LINE_SHARE = 0.1


class Progress:
    """Counts up to ``total``; silent where ``shown`` is false.

    Without a terminal a line is written every tenth of the way, but none within 10 s of the last one and at least one
    a minute; runs of under 10 s write nothing.
    """

    def __init__(self, total: int, label: str, *, start: int = 0, shown: bool = True) -> None:
        terminal, shown = sys.stderr.isatty(), shown and team.is_first()  # of several processes one speaks
        self._bar = tqdm(total=total, initial=start, desc=label, disable=not (shown and terminal), leave=False)
        self._lines = shown and not terminal
        self._label, self._total, self._start, self._done = label, total, start, start
        self._began = self._told_at = time.monotonic()
        self._told = start

    def advance(self, note: str = "") -> None:
        """One more is done; ``note`` is shown behind the count."""
        self._done += 1
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()
        now = time.monotonic()
        far = self._done - self._told >= _LINE_SHARE * self._total
        if self._lines and now - self._told_at >= _LINE_SECONDS and (far or now - self._told_at >= 6 * _LINE_SECONDS):
            self._tell(now, note)

    def _tell(self, now: float, note: str) -> None:
        self._told, self._told_at = self._done, now
        left = (now - self._began) / (self._done - self._start) * (self._total - self._done)
        text = f"{self._label}: {self._done}/{self._total}, about {tqdm.format_interval(left)} left"
        print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
