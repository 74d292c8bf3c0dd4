"""Files that appear whole and stay after a power cut; what a full disk, a closed one or full memory is told as."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prefopt.contexts import locked
from prefopt.errors import BadInput, PrefoptError, TryAgain

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_SUCH = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
_NUMBERS = (r"\(os error (\d+)\)", r"\[[Ee]rrno (\d+)\]")  # as Rust and Arrow put it into their texts
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")


def write_whole(path: Path, text: str, *, flush: bool) -> None:
    """Write a file so that it appears whole or not at all; ``flush``: and stays after a power cut.

    What a killed process leaves beside it is used up by the next one that writes the file.
    """
    part = path.with_name(f".{path.name}.part")
    with locked(part) as handle:
        try:
            os.ftruncate(handle, 0)
            with os.fdopen(handle, "w", encoding="utf-8", closefd=False) as stream:
                stream.write(text)
            os.fchmod(handle, 0o644)
            if flush:
                os.fsync(handle)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    if flush:
        _flush(path.parent)


def flush_tree(folder: Path) -> None:
    """Have everything below a folder on disk before this returns, so that a rename after it cannot overtake it."""
    for path in (folder, *folder.rglob("*")):
        _flush(path)


def swap_in(made: Path, place: Path, aside: Path) -> None:
    """Give ``made`` the name ``place`` in one rename, on disk when this returns; what was there goes ``aside`` first.

    Cut off in between, nothing stands under the name: it never stands for a folder that is not whole.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        os.rename(place, aside)
    os.rename(made, place)
    _flush(place.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def told(error: BaseException, where: object) -> PrefoptError | None:
    """The failure in a user's words: the machine ran out of something, or a path cannot be written or read; else None.

    ``where`` is named when the error itself names no file.
    """
    for cause in _chain(error):
        if isinstance(cause, MemoryError) or _is_no_memory(cause):
            return TryAgain(f"{where}: out of memory; run again with a smaller --micro-batch or more memory")
        number = _number(cause)
        place = getattr(cause, "filename", None) or where
        if number in _FULL:
            return TryAgain(
                f"{place}: {os.strerror(number)}; free some space (python -m prefopt gc lists what nothing needs), or "
                "raise the limit, and run again: finished artifacts and checkpoints are kept"
            )
        if number in _CLOSED:
            return BadInput(
                f"{place}: {os.strerror(number)}; give this user access to it, or name another folder as results in "
                "config.yaml"
            )
    if isinstance(error, OSError) and error.errno in _NO_SUCH and error.filename:
        return BadInput(f"{error.filename}: {os.strerror(error.errno)}; correct the path")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_no_memory(error: BaseException) -> bool:
    if type(error).__name__ == "OutOfMemoryError":  # a GPU's; torch is not imported to ask
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _number(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library only tells it as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
        return errno.ENOSPC
    with suppress(StopIteration):
        return int(next(found[1] for form in _NUMBERS if (found := re.search(form, str(error)))))
    return None
