"""Jobs of one artifact in forked processes that are killed at chosen points, and what has to be there afterwards.

A fork of a process that has imported torch costs milliseconds, so a stage can be killed a hundred times. The job's
process is its own: the command line's ``main`` runs in it, signals and memory limits reach it alone.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from every_stage import declare, planned

from once import made_once
from prefopt.artifacts import MANIFEST, Node
from prefopt.contexts import is_locked
from prefopt.files import read_json
from prefopt.stages import STAGES
from prefopt.store.builds import BUILDING, SCRATCH
from prefopt.store.verification import verify_artifact

HERE = Path(__file__).parent
VERBS = {stage.folder: verb for verb, stage in STAGES.items()}
SECONDS = 120.0
M_MMAP_THRESHOLD = -3  # of malloc.h
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What says when, where and for how long it was made, not what it is; threads: main imports torch in some forks only.
VOLATILE = ("git", "finished", "wall_seconds", "cpu_seconds", "peak_memory_mb", "device", "threads")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["imported", "killing"])


@dataclass(frozen=True)
class Hurt:
    """What happens to a job: a signal at its ``event``-th write, or where it touches a path that ends like this.

    ``at_path`` is the beginning of an event's name and the end of its path. ``memory`` bytes are all that the job may
    take beyond what it has when its ``at_step``-th training step begins.
    """

    number: int = 0
    event: int | None = None
    at_path: tuple[str, str] | None = None
    memory: int | None = None
    at_step: int = 0
    file_bytes: int | None = None


def environment() -> None:
    """The fork server and its forks find the product and these helpers, and compute with one thread."""
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("PREFOPT_WARM", None)


def _job(argv: list[str], folder: str, log: str, hurt: Hurt | None) -> None:
    """The body of a fork: streams into ``log``, the command line in ``folder``, and the fault."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.chdir(folder)
    writes = _watched(hurt or Hurt())
    from prefopt.cli import main

    code = main(argv)
    Path(log).with_suffix(".writes").write_text(str(writes[0]))
    sys.exit(code)


def _watched(hurt: Hurt) -> list[int]:
    """Counts what changes the file system from here on, and does what ``hurt`` says."""
    seen, open_for_ever = [0], []

    def on_event(event: str, details: tuple[Any, ...]) -> None:
        if event == "open":
            if not (isinstance(details[2], int) and details[2] & WRITING):
                return
        elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        seen[0] += 1
        path = str(details[1] if event == "os.rename" else details[0])
        named = hurt.at_path is not None and event == hurt.at_path[0] and path.endswith(hurt.at_path[1])
        if not open_for_ever and (seen[0] == hurt.event or named):
            open_for_ever.append(path)
            os.kill(os.getpid(), hurt.number)

    sys.addaudithook(on_event)
    if hurt.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hurt.file_bytes, hurt.file_bytes))
    if hurt.memory is not None:
        _limit_memory(hurt.memory, hurt.at_step)
    return seen


def _limit_memory(extra: int, step: int) -> None:
    """Tensors of some size are then asked for at the system, and not taken from what an earlier step gave back."""
    from prefopt.training.training_run import Run

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 12)

    advance = Run.advance

    def limited(run: Any) -> Any:
        if run.step == step:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + extra
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return advance(run)

    Run.advance = limited


@dataclass
class Everything:
    """The project with an artifact of every stage and what those are made from; ``undisturbed``: of an unhurt run."""

    folder: Path
    nodes: dict[str, Node]
    undisturbed: Path
    seconds: dict[str, float] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def first(self, stage: str) -> Node:
        """The artifact that stands for its stage."""
        return next(node for node in self.nodes.values() if node.stage.split("/")[0] == stage)

    def argv(self, node: Node, *more: str) -> list[str]:
        verb = VERBS[node.stage.split("/")[0]]
        steps = ["--checkpoint-steps", "3"] if "checkpoint_steps" in STAGES[verb].options else []
        return [verb, "--spec", f"results/specs/{node.ref}.json", *steps, *more]

    def log(self, node: Node) -> Path:
        return self.folder / f"{node.id}.log"

    def start(self, node: Node, hurt: Hurt | None = None, *more: str, log: Path | None = None) -> Any:
        arguments = (self.argv(node, *more), str(self.folder), str(log or self.log(node)), hurt)
        job = FORKS.Process(target=_job, args=arguments)
        job.start()
        return job

    def run(self, node: Node, hurt: Hurt | None = None, *more: str) -> int:
        """Exit code of the job, negative for a signal."""
        job = self.start(node, hurt, *more)
        return ended(job)

    def make_all(self) -> None:
        ended(self._forks_nothing())  # the server's imports are no part of the first job's time
        for node in self.nodes.values():
            began = time.monotonic()
            assert self.run(node) == 0, self.log(node).read_text()
            self.seconds[node.ref] = time.monotonic() - began
            self.writes[node.ref] = int(self.log(node).with_suffix(".writes").read_text())

    @staticmethod
    def _forks_nothing() -> Any:
        job = FORKS.Process(target=os.getpid)
        job.start()
        return job

    def manifest(self, node: Node) -> dict[str, Any]:
        return lasting(read_json(self.results / node.ref / MANIFEST))

    def files(self) -> set[str]:
        """Everything below results, folders too."""
        return {path.relative_to(self.results).as_posix() for path in self.results.rglob("*")}

    def check_between(self, node: Node) -> None:
        """After a fault: under the final name stands nothing, or all of it; the dead hold no lock."""
        if (self.results / node.ref).exists():
            assert verify_artifact(self.results, node) == []
        assert not is_locked(self.results / SCRATCH / node.ref / BUILDING)

    def check_after(self, node: Node, before: set[str]) -> None:
        """After the next run: the same bytes as without a fault, and not one file or folder more."""
        assert verify_artifact(self.results, node) == []
        assert self.manifest(node) == lasting(read_json(self.undisturbed / node.ref / MANIFEST))
        assert self.files() == before

    def restore(self, node: Node) -> None:
        """As ``make_all`` left it, whatever a failed test did."""
        for folder in (self.results / node.ref, self.results / SCRATCH / node.ref):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.undisturbed / node.ref, self.results / node.ref)


def ended(job: Any) -> int:
    job.join(SECONDS)
    if job.exitcode is None:
        job.kill()
        raise AssertionError(f"process {job.pid} did not end")
    return job.exitcode


def killed_after(everything: Everything, node: Node, number: signal.Signals, share: float) -> int:
    """Exit code of a job that got the signal after this share of its time; earlier where it had ended before."""
    delay = share * everything.seconds[node.ref]
    while True:
        shutil.rmtree(everything.results / node.ref, ignore_errors=True)
        job = everything.start(node)
        job.join(delay)
        if job.exitcode is None:
            os.kill(job.pid, number)
            if code := ended(job):
                return code
        delay /= 2


def killed_at_write(everything: Everything, node: Node, number: signal.Signals, share: float) -> int:
    """Exit code of a job that sends itself the signal at a write, as far among all its writes as ``share`` says."""
    event = 1 + int(share * everything.writes[node.ref])
    while True:
        shutil.rmtree(everything.results / node.ref, ignore_errors=True)
        code = everything.run(node, Hurt(number, event))
        if code:
            return code
        assert event > 1, "the first write was not reached"
        event = max(1, event - 4)  # fewer folders are made than the first time


def lasting(manifest: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in manifest.items() if key not in VOLATILE}
    kept["summary"] = {key: value for key, value in kept["summary"].items() if not key.endswith("seconds")}
    return kept


def drawn(stage: str, seed: int) -> random.Random:
    return random.Random(f"{stage}/{seed}")


@pytest.fixture(scope="session")
def everything(tmp_path_factory) -> Everything:
    """Every stage made once without a fault; with several test processes by one of them, the others copy it."""
    environment()

    def make(shared: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            project = _planned(shared / "project", patch)
        project.make_all()
        shutil.copytree(project.results, shared / "undisturbed")
        (shared / "measured.json").write_text(json.dumps([project.seconds, project.writes]))

    shared = made_once(tmp_path_factory, "every-stage", make)
    folder = tmp_path_factory.mktemp("faults") / "project"
    shutil.copytree(shared / "project", folder)
    with pytest.MonkeyPatch.context() as patch:
        project = _planned(folder, patch)
    project.undisturbed = shared / "undisturbed"
    project.seconds, project.writes = json.loads((shared / "measured.json").read_text())
    return project


def _planned(folder: Path, patch: pytest.MonkeyPatch) -> Everything:
    declare(folder)
    plan = planned(folder, patch)
    plan.write_specs(folder / "results")
    first = {node.stage.split("/")[0]: node for node in reversed(plan.reachable(plan.items.values()))}
    nodes = {node.ref: node for node in plan.reachable(first.values())}
    return Everything(folder, nodes, folder / "results")
