"""Two at once of one artifact, of one checkout, of one results folder: nothing is torn, no lock outlives its holder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from killing import Everything, Hurt, ended

from marks import long
from prefopt.artifacts import MANIFEST
from prefopt.contexts import is_locked, locked
from prefopt.files import read_json
from prefopt.store.builds import BUILDING, SCRATCH
from prefopt.store.verification import verify_artifact
from small_project import ROOT, Project

AT_MANIFEST = ("open", f".{MANIFEST}.part")
ANSWERS = ("generations", "judgements", "metrics")


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lock_of(everything: Everything, stage: str) -> Path:
    return everything.results / SCRATCH / everything.first(stage).ref / BUILDING


# --- one artifact -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(everything, request):
    """Two jobs of one artifact: the first stopped where it would begin its manifest, the second waiting for it."""
    stage = request.param
    node, before = everything.first(stage), everything.files()
    shutil.rmtree(everything.results / node.ref)
    logs = [everything.folder / f"{name}.log" for name in ("first", "second")]
    logs[1].unlink(missing_ok=True)
    first = everything.start(node, Hurt(signal.SIGSTOP, at_path=AT_MANIFEST), log=logs[0])
    until(lambda: (everything.results / SCRATCH / node.ref / "out").exists() and stopped(first.pid))
    second = everything.start(node, log=logs[1])
    until(lambda: logs[1].is_file() and "builds it; waiting" in logs[1].read_text())
    assert second.exitcode is None
    yield everything, node, before, first, second, logs[1]
    for job in (first, second):
        job.kill()
    everything.restore(node)


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.parametrize("two", ["tokens", "reference"], indirect=True)
def test_the_second_job_of_an_artifact_takes_what_the_first_makes(two):
    everything, node, before, first, second, log = two
    os.kill(first.pid, signal.SIGCONT)
    assert (ended(first), ended(second)) == (0, 0)
    assert f"process {first.pid}" in log.read_text()
    assert "has made it meanwhile" in log.read_text()
    everything.check_after(node, before)


@pytest.mark.parametrize("two", ["tokens"], indirect=True)
def test_the_second_job_makes_the_artifact_where_the_first_dies(two):
    everything, node, before, first, second, log = two
    first.kill()
    assert (ended(first), ended(second)) == (-signal.SIGKILL, 0)
    assert "has made it meanwhile" not in log.read_text()
    everything.check_after(node, before)


@pytest.mark.parametrize("two", ["reference"], indirect=True)
def test_a_job_that_waits_ends_when_it_is_asked_to(two):
    """Scoring heeds SIGTERM between its batches, and has none of them while it waits."""
    everything, node, before, first, second, _ = two
    second.terminate()
    assert ended(second) in (75, -signal.SIGTERM)
    os.kill(first.pid, signal.SIGCONT)
    assert ended(first) == 0
    everything.check_after(node, before)


def test_a_lock_on_a_removed_file_counts_for_nothing(tmp_path):
    """The holder removes the file; who waited for that one takes the new one."""
    path = tmp_path / "folder" / "lock"
    with locked(path) as held:
        path.unlink()
        path.parent.rmdir()
        with locked(path) as other:
            assert os.fstat(held).st_ino != os.fstat(other).st_ino
            assert is_locked(path)
    assert not is_locked(path)


# --- one checkout, one results folder ---------------------------------------------------------------------------------


class Checkout(Project):
    """A copy of the project without its answers, and the run of ``make reproduce`` that makes them."""

    @classmethod
    def of(cls, everything: Everything, folder: Path) -> Checkout:
        left_out = shutil.ignore_patterns(".snakemake", *ANSWERS, SCRATCH, "*.log", "*.writes")
        shutil.copytree(everything.folder, folder, ignore=left_out)
        return cls(folder)

    def start(self, target: str, results: Path | None = None) -> subprocess.Popen[str]:
        profile = ROOT / "workflow" / "profiles" / "local"
        python = [sys.executable, "-m"]
        workflow = ["snakemake", "-s", str(ROOT / "Snakefile"), "--workflow-profile", str(profile), target]
        logs = [] if results is None else ["--logs", str(results / "logs")]
        config = [] if results is None else ["--config", f"results={results}"]
        return subprocess.Popen(
            [*python, "prefopt", "launch", *logs, "--", *python, *workflow, *config],
            cwd=self.folder,
            env=self.environment(),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def check_answers(everything: Everything, results: Path) -> None:
    """All answers are there, sound and the same; nothing is left beside them."""
    for node in everything.nodes.values():
        assert verify_artifact(results, node) == []
        ours, theirs = (read_json(r / node.ref / MANIFEST)["outputs"] for r in (results, everything.undisturbed))
        assert ours == theirs
    left = [path.name for path in results.rglob("*") if path.name.startswith(".") and path.name != SCRATCH]
    assert left == [name for name in left if name.startswith(".snakemake")], "Snakemake dates folders by a file in them"
    assert not [path for path in (results / SCRATCH).rglob("*") if path.is_file()]


@long("twenty seconds of processor time")
def test_a_second_run_is_refused_and_a_killed_one_goes_on(everything, tmp_path):
    checkout = Checkout.of(everything, tmp_path / "checkout")
    project = replace(everything, folder=checkout.folder)
    target = f"results/{everything.first('metrics').ref}/{MANIFEST}"
    first = checkout.start(target)
    until(lambda: is_locked(lock_of(project, "generations")) or first.poll() is not None)
    assert first.poll() is None, first.communicate()

    second = checkout.start(target)
    assert second.wait() == 2
    (line,) = second.communicate()[1].splitlines()
    assert line == (
        f"prefopt launch: another run works in {checkout.folder} (process {first.pid}); wait for it or stop it"
    )

    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert any((checkout.folder / ".snakemake" / "locks").iterdir()), "Snakemake's own lock survives it"
    third = checkout.start(target)
    out, err = third.communicate()
    assert third.returncode == 0, out + err
    check_answers(everything, project.results)
    assert not list((checkout.folder / ".snakemake").glob("locks/*"))


@long("twenty seconds of processor time")
def test_two_checkouts_share_a_results_folder(everything, tmp_path):
    """Both want the same answers at the same time: one makes them, the other waits and finds them."""
    checkouts = [Checkout.of(everything, tmp_path / name) for name in ("one", "two")]
    shared = tmp_path / "shared"
    (checkouts[0].folder / "results").rename(shared)
    shutil.rmtree(checkouts[1].folder / "results")
    target = f"{shared}/{everything.first('metrics').ref}/{MANIFEST}"
    runs = [checkout.start(target, shared) for checkout in checkouts]
    told = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    waited = [err for _, err in told if f"works in {shared}; waiting for its end" in err]
    assert len(waited) == 1
    assert sum("Nothing to be done" in out + err for out, err in told) == 1
    check_answers(everything, shared)


@long("twenty seconds of processor time")
def test_a_job_without_memory_is_tried_again_by_its_rule(everything, tmp_path):
    """A machine on which 32 rows find no memory: the rule's second attempt takes 16, from the state that was kept."""
    checkout = Checkout.of(everything, tmp_path / "checkout")
    node = everything.first("policy")
    shutil.rmtree(checkout.folder / "results" / node.ref)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    # Modules take 5 GB of addresses and more; what 32 rows may have is too little to import them.
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"--micro-batch 32"*) ulimit -v 1000000;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    profile = ROOT / "workflow" / "profiles" / "local"
    words = ["snakemake", "-s", str(ROOT / "Snakefile"), "--workflow-profile", str(profile)]
    environment = checkout.environment()
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    run = subprocess.run(
        [sys.executable, "-m", *words, f"results/{node.ref}/{MANIFEST}"],
        cwd=checkout.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Trying to restart job" in run.stdout + run.stderr
    made = read_json(checkout.folder / "results" / node.ref / MANIFEST)
    assert made["outputs"] == read_json(everything.undisturbed / node.ref / MANIFEST)["outputs"]
