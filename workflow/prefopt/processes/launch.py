"""One run at a time in a checkout and a results folder: Snakemake beside a warm server, under locks that end."""

from __future__ import annotations

import fcntl
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefopt.contexts import locked
from prefopt.errors import BadInput
from prefopt.processes.warm import run_beside_server
from prefopt.progress import Pace

STATE = Path(".snakemake")
_SECONDS = 2.0
_COUNT = re.compile(r"^(\d+) of (\d+) steps \(", re.MULTILINE)
RUN_LOCK = ".run.lock"


@contextmanager
def only_run() -> Iterator[int]:
    """Hold the checkout for one run and give the lock's file descriptor; BadInput where another run holds it.

    Snakemake's own lock survives a kill or a power cut and then stops the next run. Ours is a lock of the operating
    system, which ends with the last process that has it open: whoever gets it knows that a lock of Snakemake is a
    leftover.
    """
    STATE.mkdir(exist_ok=True)
    with (STATE / "prefopt.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BadInput(
                f"another run works in {Path.cwd()} (process {lock.read().strip() or '?'}); wait for it or stop it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for leftover in (STATE / "locks").glob("*.lock"):
            leftover.unlink()
        yield lock.fileno()


@contextmanager
def only_run_of(results: Path) -> Iterator[int]:
    """Hold a results folder for one run and give the lock's file descriptor; waits for the run of another checkout.

    Snakemake plans once and removes the outputs of every job that it starts, so what another run has made since then
    would go, with that run's jobs reading it.
    """

    said: list[str] = []

    def tell(holder: str) -> None:
        if not said:
            said.append(f"prefopt launch: a run of {holder} works in {results}; waiting for its end")
            print(said[0], file=sys.stderr, flush=True)

    with locked(results / RUN_LOCK, on_wait=tell) as lock:
        yield lock
        (results / RUN_LOCK).unlink(missing_ok=True)


def failures(logs: Path, since: float) -> Iterator[str]:
    """``log: line`` of every log written since then that ends in a failure: our own last line, or simply the last.

    Several processes of one job end in torchrun's report, which stands below the line that says what to do.
    """
    for path in sorted(logs.rglob("*.log")):
        if path.stat().st_mtime < since:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        ours = next((line for line in reversed(lines) if line.startswith("prefopt ")), None)
        if lines and (lines[-1] == ours or any(line.startswith("Traceback") for line in lines)):
            yield f"{path}: {ours or lines[-1]}"


@contextmanager
def jobs_left(logs: Path) -> Iterator[None]:
    """Say on stderr at a ``Pace`` how many jobs are done and how long the others will take, until the block ends.

    ``logs``: the folder of Snakemake's own logs; the one that appears in the block is followed. The estimate takes all
    jobs for equally long. Snakemake itself is left alone: its output goes where it went.
    """
    before, ended = set(logs.glob("*.log")), threading.Event()
    watcher = threading.Thread(target=_watch, args=(logs, before, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(logs: Path, before: set[Path], ended: threading.Event) -> None:
    pace: Pace | None = None
    while not ended.wait(_SECONDS):
        new = sorted(set(logs.glob("*.log")) - before)
        counts = _COUNT.findall(new[-1].read_text(encoding="utf-8", errors="replace")) if new else []
        if not counts:
            continue
        done, total = map(int, counts[-1])
        pace = pace or Pace(total, done)
        if left := pace.left(done):
            print(f"{done} of {total} jobs, about {left} left", file=sys.stderr, flush=True)


def launch(command: Sequence[str], logs: Path) -> int:
    """Run a workflow command, its jobs forked from a warm server; the command's exit code.

    The command holds the locks too: a Snakemake that outlives this process still keeps others out. Where it fails, the
    last line of every failed job's log is shown, since that line says what to do. ``logs`` lies in the results folder.
    """
    with only_run() as checkout, only_run_of(logs.parent) as results:
        started = time.time()
        with jobs_left(STATE / "log"):
            code = run_beside_server(command, inherited=[checkout, results])
    if code:
        for failure in failures(logs, started):
            print(failure, file=sys.stderr)
    return code
