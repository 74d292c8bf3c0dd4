"""Jobs in processes that have already imported torch and transformers.

A model job pays 5-8 seconds of imports before any work, and the demo tier has dozens of small ones. ``prefopt launch
-- COMMAND`` runs COMMAND (Snakemake) beside a server that imports once; every ``python -m prefopt <stage>`` below it
then asks the server (``warm_server``) for a process. The job has its own arguments, folder, environment, streams,
signals and exit code. Where no server answers, or it runs with another thread count, the job imports for itself:
results are the same bytes either way. Nothing heavy is imported here: every job starts with this module.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

SOCKET_VARIABLE = "PREFOPT_WARM"
STREAMS = (0, 1, 2)
_ALLOCATION = "PREFOPT_WARM_ALLOCATION"  # the Slurm job that the server runs in, if any
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}  # of glibc: what a step gives back and takes again stays, which saves a tenth of a small job
_FORWARDED = (signal.SIGTERM, signal.SIGINT)


def supported() -> bool:
    """Whether this system can watch a process and a socket at once (Linux)."""
    return hasattr(os, "pidfd_open")


def run_beside_server(command: Sequence[str], inherited: Sequence[int] = ()) -> int:
    """Run ``command`` with a server beside it and return its exit code; the server stops with it.

    SIGTERM is handed on to the command; Ctrl-C reaches it from the terminal by itself. ``inherited`` are file
    descriptors that the command keeps open.
    """
    import subprocess

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
        [sys.executable, "-m", "prefopt.processes.warm_server", *map(str, ends)], env=environment, pass_fds=ends
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


def run_in_server(argv: Sequence[str]) -> int | None:
    """Run one command line in a process of the server's; None where no server fits, so run it here.

    A job that Slurm started has limits of its own, which a fork of a server outside would escape.
    """
    address = os.environ.get(SOCKET_VARIABLE)
    elsewhere = os.environ.get(_ALLOCATION, "") != os.environ.get("SLURM_JOB_ID", "")
    elsewhere |= os.environ.get("WORLD_SIZE", "1") != "1"  # torchrun watches its processes itself
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
            send(connection, request, STREAMS)
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
        for number in _FORWARDED:  # after this the process may do another's job
            signal.signal(number, signal.SIG_IGN)
    if not answer:
        raise RuntimeError("the process that forks warm jobs is gone; run again")
    return int(answer)


def send(connection: socket.socket, content: bytes, streams: Sequence[int]) -> None:
    """Send a message and file descriptors beside it."""
    socket.send_fds(connection, [len(content).to_bytes(8, "big")], streams)
    connection.sendall(content)
