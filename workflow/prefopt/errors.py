"""The failures a user can act on, and the exit code each one ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_FAILED_CHECK = 3
EXIT_TRY_AGAIN = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_LONGEST_LINE, _KEPT_END = 1500, 400


class PrefoptError(Exception):
    """A failure told to the user as one line, without a traceback."""

    exit_code = 1


class BadInput(PrefoptError):
    """Input that cannot be used. The message names the file, the place, the value and the way out."""

    exit_code = EXIT_BAD_INPUT


class FailedCheck(PrefoptError):
    """A verification that ran and did not hold."""

    exit_code = EXIT_FAILED_CHECK


class TryAgain(PrefoptError):
    """Stopped before the end (termination, memory), with a checkpoint to go on from."""

    exit_code = EXIT_TRY_AGAIN


class AlreadyMade(PrefoptError):
    """Nothing left to do: another process has made the artifact that this one waited for."""

    exit_code = EXIT_DONE


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the closest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """A failure as one line of printable characters: values from outside can hold anything, and megabytes of it."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE - _KEPT_END]} [...] {text[-_KEPT_END:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
