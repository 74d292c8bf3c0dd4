"""Jobs forked from a process that has already imported torch and transformers.

A model job pays 5-8 seconds of imports before any work, and the demo tier has dozens of small ones. ``prefopt launch
-- COMMAND`` runs COMMAND (Snakemake) beside a server that imports once; every ``python -m prefopt <stage>`` below it
then asks the server to fork. The job is still a process of its own, with its own arguments, folder, environment,
streams, signals and exit code. Where no server answers, or it runs with another thread count, the job imports for
itself: results are the same bytes either way.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

SOCKET_VARIABLE = "PREFOPT_WARM"
_ALLOCATION = "PREFOPT_WARM_ALLOCATION"  # the Slurm job that the server runs in, if any
_PRELOADED = (
    "numpy",
    "pandas",
    "pandas.core.arrays.arrow.extension_types",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
    "scipy.stats",
    "torch",
    "transformers",
    "transformers.conversion_mapping",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "matplotlib.figure",
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
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}  # of glibc: what a step gives back and takes again stays, which saves a tenth of a small job
_STREAMS = (0, 1, 2)
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_LIMIT = 1 << 20


def supported() -> bool:
    """Whether this system can watch a process and a socket at once (Linux)."""
    return hasattr(os, "pidfd_open")


def run_beside_server(command: Sequence[str], inherited: Sequence[int] = ()) -> int:
    """Run ``command`` with a server beside it and return its exit code; the server stops with it.

    SIGTERM is handed on to the command; Ctrl-C reaches it from the terminal by itself. ``inherited`` are file
    descriptors that the command keeps open.
    """
    if not supported():
        return outlive(subprocess.Popen(command, pass_fds=inherited))
    address = f"prefopt-{os.urandom(16).hex()}"
    environment = {**_KEEP_PAGES, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(_abstract(address))
    listener.listen(64)  # jobs that come while the server imports wait, which costs less than importing themselves
    lifeline, held = os.pipe()  # its end of file tells the server that this process is gone, however it went
    ends = (listener.fileno(), lifeline)
    server = subprocess.Popen(
        [sys.executable, "-m", "prefopt.processes.warm", *map(str, ends)], env=environment, pass_fds=ends
    )
    listener.close()
    os.close(lifeline)
    try:
        allocation = {_ALLOCATION: os.environ.get("SLURM_JOB_ID", "")}
        known = {**os.environ, SOCKET_VARIABLE: address, **allocation}
        return outlive(subprocess.Popen(command, env=known, pass_fds=inherited))
    finally:
        os.close(held)
        server.wait()


def _abstract(name: str) -> str:
    """Address of a Unix socket that no file stands for: it goes with the server, however that ends."""
    return f"\0{name}"


def outlive(command: subprocess.Popen[bytes]) -> int:
    """Exit code of a command that gets our SIGTERM, and whose end we outlive on Ctrl-C."""
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: command.send_signal(number)),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    try:
        return command.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the job's side -------------------------------------------------------------------------------------------------


def run_in_server(argv: Sequence[str]) -> int | None:
    """Run one command line in a process forked from the server; None where no server fits, so run it here.

    A job that Slurm started has limits of its own, which a fork of a server outside would escape.
    """
    address = os.environ.get(SOCKET_VARIABLE)
    elsewhere = os.environ.get(_ALLOCATION, "") != os.environ.get("SLURM_JOB_ID", "")
    if not address or elsewhere or os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(_abstract(address))
    except OSError:
        return None
    environment = {key: value for key, value in os.environ.items() if key != SOCKET_VARIABLE}
    request = json.dumps({"argv": list(argv), "cwd": os.getcwd(), "environment": environment}).encode()
    with connection:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            socket.send_fds(connection, [len(request).to_bytes(8, "big")], _STREAMS)
            connection.sendall(request)
            answers = connection.makefile("r")
            started = answers.readline()
        except OSError:
            started = ""
        if not started:  # the server ended before it had forked: it could not import
            return None
        pid = int(started)
        for number in _FORWARDED:
            signal.signal(number, lambda signum, _: os.kill(pid, signum))
        answer = answers.readline()
    if not answer:
        raise RuntimeError("the process that forks warm jobs is gone; run again")
    return int(answer)


# --- the server's side ----------------------------------------------------------------------------------------------


def serve(listener: socket.socket, lifeline: int) -> None:
    """Import when the first job asks, then fork one handler per connection until the lifeline ends.

    Handlers are waited for, so that the time of all jobs is counted as this process's children's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loaded = False
    while lifeline not in _ready(listener, lifeline):
        if not loaded:
            _load()
            loaded = True
        connection, _ = listener.accept()
        if not _is_own(connection):
            connection.close()
            continue
        if os.fork() == 0:
            listener.close()
            os._exit(_in_fork(partial(_handle, connection)))
        connection.close()
        while _ended(os.WNOHANG):
            pass
    listener.close()
    while _ended():
        pass


def _is_own(connection: socket.socket) -> bool:
    """Whether this user is at the other end, by the kernel's word: an abstract address is open to everyone."""
    form = "3i"  # process, user, group
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    _, user, _ = struct.unpack(form, peer)
    return user == os.getuid()


def _ready(*watched: socket.socket | int) -> list[Any]:
    """Those of the sockets and file descriptors that have something to read; waits for the first."""
    every: list[Any] = list(watched)
    return select.select(every, [], [])[0]


def _load() -> None:
    """Import what jobs need, find what is the same for all, and keep it from their garbage collections: .3 s a job."""
    from prefopt.store.provenance import code_state

    for name in _PRELOADED:
        importlib.import_module(name)
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")  # built at its first use
    cli = sys.modules["prefopt.cli"]
    for stage in cli.STAGES.values():
        stage.load()
    cli.parser()
    code_state()  # of what was imported here, whatever is committed while jobs run
    gc.collect()
    gc.freeze()


def _ended(options: int = 0) -> bool:
    """Whether a handler has ended that was not waited for yet; without options, the next one to end."""
    with suppress(ChildProcessError):
        return os.waitpid(-1, options)[0] > 0
    return False


def _in_fork(work: Callable[[], int]) -> int:
    """Run work in a forked process: whatever happens becomes an exit code, never a second server loop."""
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


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(min(_LIMIT, size - len(data)))
        if not part:
            raise ConnectionError("the client left before it had sent its request")
        data += part
    return data


def _handle(connection: socket.socket) -> int:
    """Fork the job, report its pid and exit code; kill it where the client that asked for it dies."""
    size, streams, *_ = socket.recv_fds(connection, 8, len(_STREAMS))
    request = json.loads(_read_exactly(connection, int.from_bytes(size, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(_in_fork(partial(_job, request, streams)))
    connection.sendall(f"{pid}\n".encode())
    watched = os.pidfd_open(pid)
    if watched not in _ready(connection, watched):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    with suppress(OSError):
        connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    return 0


def _job(request: dict[str, Any], streams: Sequence[int]) -> int:
    for target, source in zip(_STREAMS, streams, strict=True):
        os.dup2(source, target)
        os.close(source)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    from prefopt.cli import main

    return main(request["argv"])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
