"""Temporary states: environment variables, quiet loggers, and a lock that only one process holds."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_HOLDER = 200  # bytes of a lock file that say who holds it
_LOOK_SECONDS = 0.1


@contextmanager
def environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that the user has not set, for the duration of the block."""
    added = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Only errors from these loggers, for the duration of the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def locked(path: Path, *, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[int]:
    """Hold a lock of the operating system and give its file descriptor; waits where another process has it.

    The lock ends with the last process that has it open, however that one ended. ``on_wait`` is called now and again
    while waiting, with what the holder wrote about itself. The file may be removed by whoever holds it: a lock on a
    removed file counts for nothing, so it is taken anew.
    """
    while True:
        handle = _opened(path)
        try:
            while not _taken(handle):
                on_wait(os.pread(handle, _HOLDER, 0).decode(errors="replace") or "another process")
                time.sleep(_LOOK_SECONDS)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} of {platform.node()}".encode(), 0)
                yield handle
                return
        finally:
            os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder went between these two lines
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a living process holds ``locked(path)``."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _taken(handle)
    finally:
        os.close(handle)
