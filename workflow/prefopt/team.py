"""Processes of one job that share its rows: forked by one that only watches them, each with a model of its own.

Rows do not need each other, so nothing is summed and nothing meets in memory; what processes have to agree on goes
through ``barrier``. The watcher does no work: whichever worker the system kills, it is there to say so.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from prefopt.errors import AlreadyMade, BadInput, FailedCheck, PrefoptError, TryAgain
from prefopt.storage import told

Pair = tuple[socket.socket, socket.socket]
"""The watcher's end and the worker's."""

_PATIENCE = 60.0  # seconds that the others get to write what they have, after one has failed
_KINDS = {kind.__name__: kind for kind in (AlreadyMade, BadInput, FailedCheck, TryAgain)}


@dataclass
class _Seat:
    """Who this process is."""

    rank: int = 0
    size: int = 1
    link: socket.socket | None = None
    watcher: int | None = None
    terminated: bool = False


_seat = _Seat()


def rank() -> int:
    """Number of this process, from 0."""
    return _seat.rank


def size() -> int:
    """Processes of this job."""
    return _seat.size


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _seat.rank == 0


def check() -> None:
    """Between pieces of work: TryAgain after SIGTERM. A worker whose watcher is gone ends here without a word."""
    _end_if_left_alone()
    if _seat.terminated:
        raise TryAgain("terminated; what is finished is kept, run again to go on")


def barrier() -> None:
    """Wait for all processes of the job; TryAgain where one of them has failed."""
    if _seat.link is None:
        return
    try:
        _seat.link.sendall(b"\n")
        if _seat.link.recv(1):
            return
    except OSError:
        pass
    _end_if_left_alone()
    raise TryAgain("stopped, because another process of the job has failed")


def _end_if_left_alone() -> None:
    """End without writing: another run may already be at work on the same rows."""
    if _seat.watcher is not None and os.getppid() != _seat.watcher:
        os._exit(TryAgain.exit_code)


def run(processes: int, work: Callable[[], None]) -> None:
    """Do work in ``processes`` forked processes, or here as one; in all of them SIGTERM is heeded by ``check``.

    Raises what the first that failed raised; TryAgain where it was killed, FailedCheck for an error of no known kind.
    """
    if processes == 1:
        with _heeding(_note_termination):
            work()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pairs = [socket.socketpair() for _ in range(processes)]
    workers: list[_Worker] = []
    watcher = os.getpid()
    with _blocked(), _heeding(partial(_end, workers)):
        for number in range(processes):
            pid = os.fork()
            if pid == 0:
                _become(number, watcher, pairs, work)
            workers.append(_Worker(number, pid, pairs[number][0]))
    for _, theirs in pairs:
        theirs.close()
    with _heeding(partial(_end, workers)):
        try:
            _watch(workers)
        finally:
            _dismiss(workers)


# --- the worker's side ----------------------------------------------------------------------------------------------


def _become(number: int, watcher: int, pairs: Sequence[Pair], work: Callable[[], None]) -> NoReturn:
    """Be a worker, and end with the process."""
    code = 1
    try:
        for ours, theirs in pairs:
            ours.close()
            if theirs is not pairs[number][1]:
                theirs.close()
        _seat.rank, _seat.size, _seat.link, _seat.watcher = number, len(pairs), pairs[number][1], watcher
        signal.signal(signal.SIGTERM, _note_termination)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the watcher hears it too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if not is_first():
            logging.getLogger().setLevel(logging.WARNING)
        code = _told(work)
    finally:
        with suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _told(work: Callable[[], None]) -> int:
    """Do the work; a failure is told to the watcher, which has the last word."""
    try:
        work()
    except PrefoptError as error:
        said = {"kind": type(error).__name__, "text": str(error)}
    except BaseException as error:
        if (known := told(error, f"process {rank()} of {size()}")) is not None:
            said = {"kind": type(known).__name__, "text": str(known)}
        else:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error} (process {rank()}, traceback above)"
            said = {"kind": "FailedCheck", "text": text}
    else:
        return 0
    if _seat.link is not None:
        with suppress(OSError):
            _seat.link.sendall(json.dumps(said).encode() + b"\n")
    return 1


def _note_termination(*_: Any) -> None:
    _seat.terminated = True


# --- the watcher's side ---------------------------------------------------------------------------------------------


def _end(workers: Sequence[_Worker], *_: Any) -> None:
    for worker in workers:
        worker.end()


@dataclass
class _Worker:
    number: int
    pid: int
    link: socket.socket
    waits: bool = False  # at a barrier
    status: int | None = None  # once it has ended
    unread: bytes = b""
    said: dict[str, str] = field(default_factory=dict)

    def end(self) -> None:
        """SIGTERM, if it is still there."""
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)

    def hear(self) -> None:
        """Take in what it says: an empty line is a barrier, the end of all lines its own."""
        try:
            data = self.link.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.status = os.waitpid(self.pid, 0)[1]
            return
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self.waits |= not line
            if line:
                self.said = json.loads(line)

    def failure(self, processes: int) -> PrefoptError | None:
        """What went wrong with it, if anything."""
        if self.said:
            return _KINDS.get(self.said["kind"], FailedCheck)(self.said["text"])
        if not self.status:
            return None
        code = os.waitstatus_to_exitcode(self.status)
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return TryAgain(
            f"process {self.number} of {processes} ended by {how}{memory}; what all had finished is kept, run again to "
            "make the rest"
        )


def _watch(workers: list[_Worker]) -> None:
    """Until all workers have ended: let them pass barriers together; raise for the first that fails."""
    while living := [worker for worker in workers if worker.status is None]:
        heard = select.select([worker.link for worker in living], [], [])[0]
        for worker in living:
            if worker.link in heard:
                worker.hear()
        for worker in workers:
            if (failure := worker.failure(len(workers))) is not None:
                raise failure
        if any(worker.waits for worker in workers) and all(w.waits or w.status is not None for w in workers):
            if any(worker.status is not None for worker in workers):
                raise FailedCheck("processes of the job waited for others that had finished")
            for worker in workers:
                worker.waits = False
                with suppress(OSError):  # it has just died, which the next round hears
                    worker.link.sendall(b"\n")


def _dismiss(workers: list[_Worker]) -> None:
    """End what is left: SIGTERM, time to write, SIGKILL."""
    for worker in workers:
        worker.end()
        with suppress(OSError):
            worker.link.shutdown(socket.SHUT_WR)  # wakes those that wait at a barrier
    deadline = time.monotonic() + _PATIENCE
    for worker in workers:
        while worker.status is None:
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                worker.status = status
            elif time.monotonic() > deadline:
                os.kill(worker.pid, signal.SIGKILL)
                worker.status = os.waitpid(worker.pid, 0)[1]
            else:
                time.sleep(0.02)
        worker.link.close()


@contextmanager
def _heeding(handler: Callable[..., Any]) -> Iterator[None]:
    """SIGTERM goes to ``handler`` for the duration of the block."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _seat.terminated = False


@contextmanager
def _blocked() -> Iterator[None]:
    """SIGTERM waits until the end of the block."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
