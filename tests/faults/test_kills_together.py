"""Jobs of several processes that lose one, or all: torchrun's trainings, and row workers with the one that watches.

Each is killed at a drawn time, run again with as many processes, and ends with the bytes of such a job that nothing
disturbed. By default none of it: a training under torchrun imports everything in both processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from killing import FORKS, MANIFEST, Everything, drawn, lasting

from marks import long
from prefopt.artifacts import Node
from prefopt.contexts import is_locked
from prefopt.files import read_json
from prefopt.processes.shares import has_divisible_rows
from prefopt.stages import STAGES
from prefopt.store.builds import BUILDING, SCRATCH
from prefopt.store.verification import verify_artifact

pytestmark = long("minutes of processor time")

TRAINED = tuple(stage.folder for stage in STAGES.values() if "sharding" in stage.options)
ROWS = tuple(stage.folder for stage in STAGES.values() if "processes" in stage.options)
SECONDS = 300.0


@dataclass
class Job:
    """A running job: the process that started the others, and how to wait for it."""

    pid: int
    wait: Callable[[float], int | None]  # exit code, or None after so many seconds

    def others(self) -> list[int]:
        """The processes that it has started and that have not ended, in the order of their ranks."""
        try:
            return sorted(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))
        except FileNotFoundError:
            return []


def start(everything: Everything, node: Node) -> Job:
    """Two processes: training under torchrun, rows by the command line's own workers."""
    if node.stage in TRAINED:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with everything.log(node).open("w") as log:
            command = [*launcher, "-m", "prefopt", *everything.argv(node, "--device", "cpu")]
            torchrun = subprocess.Popen(command, cwd=everything.folder, stdout=log, stderr=log)
        return Job(torchrun.pid, lambda seconds: _waited(torchrun, seconds))
    fork = everything.start(node, None, "--device", "cpu", "--processes", "2")
    return Job(fork.pid, lambda seconds: fork.join(seconds) or fork.exitcode)


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def ended(job: Job, others: list[int]) -> int:
    """Exit code of a job; none of its processes is left after this."""
    code = job.wait(SECONDS)
    assert code is not None, f"process {job.pid} did not end"
    limit = time.monotonic() + SECONDS
    while left := [pid for pid in others if running(pid)]:
        assert time.monotonic() < limit, f"processes {left} did not end"
        time.sleep(0.05)
    return code


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def let_go(lock: Path) -> None:
    """A worker that has just been orphaned, or is ending thread by thread, holds its files for a moment more."""
    limit = time.monotonic() + SECONDS / 10
    while is_locked(lock) and time.monotonic() < limit:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(everything, tmp_path_factory) -> Callable[[Node], tuple[float, dict[str, Any]]]:
    """Seconds and manifest of an artifact as two processes make it, made once where it is asked for."""
    known: dict[str, tuple[float, dict[str, Any]]] = {}

    def made(node: Node) -> tuple[float, dict[str, Any]]:
        if node.ref not in known:
            FORKS.Process(target=os.getpid).start()
            began = time.monotonic()
            shutil.rmtree(everything.results / node.ref)
            assert ended(start(everything, node), []) == 0, everything.log(node).read_text()
            seconds = time.monotonic() - began
            known[node.ref] = seconds, lasting(read_json(everything.results / node.ref / MANIFEST))
            everything.restore(node)
        return known[node.ref]

    return made


def killed(everything: Everything, node: Node, number: signal.Signals, victim: str, delay: float) -> int:
    """Exit code of a job of which one process got the signal; earlier where the job had ended before."""
    while True:
        shutil.rmtree(everything.results / node.ref, ignore_errors=True)
        job = start(everything, node)
        code = job.wait(delay)
        if code is None:
            os.kill(job.pid, signal.SIGSTOP)  # it starts no other between being asked for them and being killed
        others = job.others()
        if code is None and (victim == "first" or others):
            chosen = {"first": job.pid, "rank 0": others[:1], "rank 1": others[-1:]}[victim]
            for pid in [chosen] if isinstance(chosen, int) else chosen:
                os.kill(pid, number)
            os.kill(job.pid, signal.SIGCONT)
            if code := ended(job, others):
                return code
        elif code is None:
            os.kill(job.pid, signal.SIGCONT)
            ended(job, others)
        delay /= 2


def cases() -> list:
    return [
        pytest.param(stage, number, victim, id=f"{stage}-{number.name}-{victim.replace(' ', '')}")
        for stage in (*TRAINED, *ROWS)
        for number in (signal.SIGKILL, signal.SIGTERM)
        for victim in ("first", "rank 0", "rank 1")
    ]


@pytest.mark.parametrize(("stage", "number", "victim"), cases())
def test_a_job_of_several_processes_that_is_killed_ends_in_the_same_bytes(
    everything, undisturbed, stage, number, victim
):
    node = everything.first(stage)
    if stage in ROWS and not has_divisible_rows(node):
        pytest.skip(f"the rows of {node.id} are not divided")
    seconds, manifest = undisturbed(node)
    before = everything.files()
    try:
        delay = seconds * drawn(f"{stage}/{victim}", number).uniform(0.3, 0.95)
        code = killed(everything, node, number, victim, delay)
        assert code in {-number, 1, 75}, everything.log(node).read_text()  # 1 is torchrun's, whatever went wrong
        let_go(everything.results / SCRATCH / node.ref / BUILDING)
        everything.check_between(node)
        job = start(everything, node)
        assert ended(job, []) == 0, everything.log(node).read_text()
        assert verify_artifact(everything.results, node) == []
        assert lasting(read_json(everything.results / node.ref / MANIFEST)) == manifest
        assert everything.files() == before
    finally:
        everything.restore(node)
