"""The server of warm jobs: it imports once, and hands every job to a process that was forked from it.

A process that has done its job is kept for the next one of the same command but for the spec, folder and environment:
memory that the system has given it and code that was made for its sizes are then there, a tenth of a small job. Random
numbers start over with every job. A process that failed, had processes of its own, took a GPU or much memory is not
kept.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefopt.processes.warm import send
from prefopt.processes.warm_process import DONE, received, work

_PRELOADED = (
    "numpy",
    "pandas",
    "pandas.core.arrays.arrow.extension_types",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
    "scipy.special",
    "torch",
    "transformers",
    "transformers.conversion_mapping",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "prefopt.cli",
    "prefopt.engine.bulk",
    "prefopt.engine.decoding",
    "prefopt.engine.drawing",
    "prefopt.engine.lean_body",
    "prefopt.generation",
    "prefopt.models",
    "prefopt.trainer",
    "prefopt.world",
)
_FIGURES = ("matplotlib.figure", "scipy.stats")  # for jobs that draw or test, .4 s that a sweep alone need not wait for
_DRAWING = ("compare-disagreement", "compare-vote-trials", "paper-item", "run-study", "win-rate")
_SPEC = ".json"  # what a job is told to make; in all else its command is that of its kind
_IDLE_SECONDS = 30.0  # without any event after which no process is kept waiting
_PATIENCE = 10.0  # seconds for a client's request to come, which it sends at once

_Kind = Hashable


@dataclass
class _Process:
    """One that does jobs, or waits for another of its kind."""

    pid: int
    kind: _Kind
    ended: int  # file descriptor that can be read when it has ended
    channel: socket.socket  # jobs to it, a byte back for each that it has done
    client: socket.socket | None  # who asked for the job that it does
    done: bool = False


class Server:
    """Takes jobs until the lifeline ends, and waits for all processes: their time is counted as its children's."""

    def __init__(self, listener: socket.socket, lifeline: int) -> None:
        self._listener, self._lifeline = listener, lifeline
        self._events = selectors.DefaultSelector()
        self._idle: deque[_Process] = deque()
        self._most_idle = os.cpu_count() or 1
        self._loaded = self._closing = False

    def serve(self) -> None:
        """Handle one event after the other, since what one does can make the next one void."""
        self._watch(self._listener, self._accept)
        self._watch(self._lifeline, self._close)
        while self._events.get_map():
            events = self._events.select(_IDLE_SECONDS if self._idle else None)
            if events:
                events[0][0].data()
            else:
                self._dismiss_all()

    def _watch(self, source: socket.socket | int, handle: Callable[[], None]) -> None:
        self._events.register(source, selectors.EVENT_READ, handle)

    def _close(self) -> None:
        self._closing = True
        for source in (self._listener, self._lifeline):
            self._events.unregister(source)
        self._listener.close()
        self._dismiss_all()

    def _accept(self) -> None:
        if not self._loaded:  # jobs that come meanwhile wait, which costs less than importing themselves
            load()
            self._loaded = True
        client, _ = self._listener.accept()
        client.settimeout(_PATIENCE)
        try:
            if not _is_own(client):
                raise PermissionError
            content, streams = received(client)
        except OSError:
            client.close()
            return
        request = json.loads(content)
        command = tuple(word for word in request["argv"] if not word.endswith(_SPEC))
        kind = (command, request["cwd"], frozenset(request["environment"].items()))
        self._watch(client, lambda: None)  # a process that is forked now closes it with all others
        process = self._free(kind, content, streams) or self._forked(kind, request, streams)
        for stream in streams:
            os.close(stream)
        process.client, process.done = client, False
        self._events.modify(client, selectors.EVENT_READ, partial(self._left, process))
        with suppress(OSError):
            client.sendall(f"{process.pid}\n".encode())

    def _free(self, kind: _Kind, content: bytes, streams: Sequence[int]) -> _Process | None:
        """A process of this kind that waited, with the job; None where there is none."""
        for process in [one for one in self._idle if one.kind == kind]:
            self._idle.remove(process)
            try:
                send(process.channel, content, streams)
            except OSError:  # it has ended, which its own event will tell
                continue
            return process
        return None

    def _forked(self, kind: _Kind, request: dict[str, Any], streams: Sequence[int]) -> _Process:
        """A new process, at work on the job."""
        if request["argv"] and request["argv"][0] in _DRAWING:
            _import(_FIGURES)
        mine, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for key in self._events.get_map().values():
                key.fileobj.close() if isinstance(key.fileobj, socket.socket) else os.close(key.fd)
            self._events.close()
            mine.close()
            work(theirs, request, streams)
        theirs.close()
        process = _Process(pid, kind, os.pidfd_open(pid), mine, None)
        self._watch(process.ended, partial(self._ended, process))
        self._watch(process.channel, partial(self._did, process))
        return process

    def _did(self, process: _Process) -> None:
        """It has done its job and waits, or is about to end."""
        said = b""
        with suppress(ConnectionError):
            said = process.channel.recv(1)
        if said != DONE:
            self._events.unregister(process.channel)
        elif process.client is not None:
            process.done = True
            _answer(process.client, 0)

    def _left(self, process: _Process) -> None:
        """The client is gone: having its answer it goes, and a signal of its own can no longer meet another's job."""
        self._forget_client(process)
        if not process.done:
            os.kill(process.pid, signal.SIGKILL)
        elif self._closing:
            self._dismiss(process)
        else:
            self._idle.append(process)
            if len(self._idle) > self._most_idle:
                self._dismiss(self._idle.popleft())

    def _ended(self, process: _Process) -> None:
        _, status = os.waitpid(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._events.unregister(process.ended)
        os.close(process.ended)
        if process in self._idle:
            self._idle.remove(process)
        if process.client is not None and not process.done:
            _answer(process.client, code if code >= 0 else 128 - code)
        self._forget_client(process)
        with suppress(KeyError):
            self._events.unregister(process.channel)
        process.channel.close()

    def _forget_client(self, process: _Process) -> None:
        if process.client is not None:
            self._events.unregister(process.client)
            process.client.close()
            process.client = None

    def _dismiss_all(self) -> None:
        while self._idle:
            self._dismiss(self._idle.popleft())

    @staticmethod
    def _dismiss(process: _Process) -> None:
        """Let a process end that waits; its own event tells when it has."""
        with suppress(OSError):
            process.channel.shutdown(socket.SHUT_WR)


def _answer(client: socket.socket, code: int) -> None:
    with suppress(OSError):
        client.sendall(f"{code}\n".encode())


def _is_own(connection: socket.socket) -> bool:
    """Whether this user is at the other end, by the kernel's word: an abstract address is open to everyone."""
    form = "3i"  # process, user, group
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    _, user, _ = struct.unpack(form, peer)
    return user == os.getuid()


def load() -> None:
    """Import what jobs need, find what is the same for all, and keep it from their garbage collections: .3 s a job."""
    from prefopt.store.provenance import code_state

    _import(_PRELOADED)
    cli = sys.modules["prefopt.cli"]
    _import([f"prefopt.stages.{stage.module}" for stage in cli.STAGES.values()])
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")  # built at its first use
    cli.parser()
    code_state()  # of what was imported here, whatever is committed while jobs run
    gc.freeze()


def _import(names: Sequence[str]) -> None:
    """Import modules, if they are not there, and keep them from garbage collections."""
    if sys.modules.keys() >= set(names):
        return
    gc.disable()  # what is imported stays, and looking through it again and again takes a sixth of the time
    for name in names:
        importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Server(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).serve()
