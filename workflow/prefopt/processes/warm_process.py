"""A process of the warm server's: it does a job, then those of the same kind that the server sends it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from prefopt.processes.warm import STREAMS

DONE = b"d"
_LIMIT = 1 << 20
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_KEPT_BYTES = 1 << 30  # of memory that a process may hold without a job


def work(channel: socket.socket, request: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Do this job and those that come through the channel; ends this process, whatever happens."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # without the server nobody would hear of the job
        code = _work(channel, request, streams)
    finally:
        os._exit(code)


def _work(channel: socket.socket, request: dict[str, Any], streams: Sequence[int]) -> int:
    """The exit code of the last job, which failed or was one that nothing can follow; 0 where none came any more."""
    torch = sys.modules["torch"]
    random_numbers = torch.get_rng_state()
    while True:
        code = _outcome(partial(_job, request, streams))
        if code or not _can_stay():
            return code
        _let_go()
        channel.sendall(DONE)
        gc.collect()
        try:
            content, streams = received(channel)
        except OSError:
            return 0
        request = json.loads(content)
        torch.set_rng_state(random_numbers)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most memory so far is of other jobs


def _outcome(work: Callable[[], int]) -> int:
    """Run work: whatever happens becomes an exit code."""
    try:
        return work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        with suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()


def _job(request: dict[str, Any], streams: Sequence[int]) -> int:
    for target, source in zip(STREAMS, streams, strict=True):
        os.dup2(source, target)
        os.close(source)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    from prefopt.cli import main

    return main(request["argv"])


def _can_stay() -> bool:
    """Whether nothing but memory and code that was made is left of the job, and not too much of that."""
    had_processes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
    took_gpu = sys.modules["torch"].cuda.is_initialized()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return not had_processes and not took_gpu and pages * resource.getpagesize() <= _KEPT_BYTES


def _let_go() -> None:
    """Of the job's streams, whose readers wait for their end, and of what it did at a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in STREAMS:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def received(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message of ``warm.send`` and its file descriptors; ConnectionError where it does not come whole."""
    size, streams, *_ = socket.recv_fds(connection, 8, len(STREAMS))
    try:
        return _exactly(connection, int.from_bytes(size, "big") if len(size) == 8 else -1), streams
    except OSError:
        for stream in streams:
            os.close(stream)
        raise


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) != size:
        part = connection.recv(min(_LIMIT, max(0, size - len(data))))
        if not part:
            raise ConnectionError("the other end left before it had sent its message")
        data += part
    return data
