"""Killed runs go on where they were and end with the same bytes; warm and cold jobs give the same bytes too."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from small_project import ROOT, TRAIN, Project, item
from warm_server import beside_server

LONG = {**TRAIN, "steps": 60}


def outputs(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["outputs"]


@pytest.fixture(scope="module")
def long_sft(finished, tmp_path_factory) -> Project:
    """A project whose SFT takes 60 steps, made once without a disturbance."""
    clone = finished.copy(tmp_path_factory.mktemp("long") / "project")
    clone.declare(item(sft={"train": LONG}))
    clone.snakemake("-n", check=True)
    clone.prefopt("train-sft", "--spec", sft_spec(clone), "--checkpoint-steps", 5, check=True)
    return clone


def sft_spec(project: Project) -> Path:
    (found,) = (
        path
        for path in (project.folder / "results" / "specs" / "sft").glob("*.json")
        if json.loads(path.read_text())["spec"]["train"]["steps"] == LONG["steps"]
    )
    return found


def stopped_after_a_checkpoint(project: Project, number: signal.Signals, environment: dict[str, str]) -> int:
    """Start the training, send it a signal once it has saved a checkpoint; its exit code."""
    spec = sft_spec(project)
    command = [sys.executable, "-m", "prefopt", "train-sft", "--spec", str(spec), "--checkpoint-steps", "5"]
    job = subprocess.Popen(
        command, cwd=project.folder, env=project.environment() | environment, stderr=subprocess.DEVNULL
    )
    scratch = project.folder / "results" / ".scratch" / "sft" / spec.stem / "checkpoints"
    deadline = time.monotonic() + 120
    while not (scratch.is_dir() and any(scratch.iterdir())):
        assert job.poll() is None, "the training ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(number)
    return job.wait()


@pytest.mark.parametrize(
    ("number", "code", "warm"), [(signal.SIGKILL, -signal.SIGKILL, True), (signal.SIGTERM, 75, False)]
)
def test_a_stopped_training_resumes_to_the_same_weights(long_sft, tmp_path, number, code, warm):
    """A warm job is stopped by its command, behind which the fork ends; a cold one by itself."""
    clone = long_sft.copy(tmp_path / "clone")
    artifact = clone.folder / "results" / "sft" / sft_spec(clone).stem
    undisturbed = outputs(artifact)
    shutil.rmtree(artifact)
    assert stopped_after_a_checkpoint(clone, number, beside_server() if warm else {}) == code
    assert not artifact.exists()
    run = clone.prefopt("train-sft", "--spec", sft_spec(clone), "--checkpoint-steps", 5, check=True)
    assert outputs(artifact) == undisturbed, run.stderr
    assert not (clone.folder / "results" / ".scratch" / "sft").exists() or not any(
        (clone.folder / "results" / ".scratch" / "sft").iterdir()
    )


def test_micro_batch_does_not_change_what_is_learned(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    artifact = clone.artifact("policy", "dpo")
    before = [json.loads(line) for line in (artifact / "metrics.jsonl").open()]
    shutil.rmtree(artifact)
    clone.prefopt("train-policy", "--spec", clone.spec("policy", "dpo"), "--micro-batch", 3, check=True)
    after = [json.loads(line) for line in (artifact / "metrics.jsonl").open()]
    for one, other in zip(before, after, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-3)


@pytest.mark.parametrize(
    ("verb", "stage", "name"),
    [("train-policy", "policy", "e-dpo"), ("train-reward", "reward", "train")],
)
def test_a_cold_job_gives_the_bytes_of_a_warm_one(finished, tmp_path, verb, stage, name):
    """The same of ``generate``: test_threads.py."""
    clone = finished.copy(tmp_path / "clone")
    warm = outputs(clone.artifact(stage, name))
    shutil.rmtree(clone.artifact(stage, name))
    clone.prefopt(verb, "--spec", clone.spec(stage, name), cold=True, check=True)
    assert outputs(clone.artifact(stage, name)) == warm


def test_a_warm_job_dies_with_the_process_that_asked_for_it(finished, tmp_path):
    """Snakemake kills jobs by their process: the fork behind it must not live on."""
    clone = finished.copy(tmp_path / "clone")
    clone.declare(item(sft={"train": {**LONG, "steps": 100_000}}))
    clone.snakemake("-n", check=True)
    (spec,) = (p for p in (clone.folder / "results/specs/sft").glob("*.json") if "100000" in p.read_text())
    curve = clone.folder / "results" / ".scratch" / "sft" / spec.stem / "checkpoints"
    script = f"""
        {sys.executable} -m prefopt train-sft --spec {spec} --checkpoint-steps 5 & job=$!
        until ls {curve}/* >/dev/null 2>&1; do sleep 0.05; done
        kill -KILL $job; sleep 1
        ls -t --full-time {curve} > first; sleep 1; ls -t --full-time {curve} > second
        cmp first second
    """
    run = beside(clone, script)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not (clone.folder / "results" / "sft" / spec.stem).exists()


def beside(project: Project, script: str) -> subprocess.CompletedProcess[str]:
    """A shell whose jobs find a warm server."""
    environment = project.environment() | beside_server()
    words = ["bash", "-c", script]
    return subprocess.run(words, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)


def test_the_warm_wrapper_hands_on_streams_and_exit_codes(project):
    script = f"{sys.executable} -m prefopt train-sft --spec gone.json"
    run = project.prefopt("launch", "--", "bash", "-c", script)
    assert run.returncode == 2
    assert run.stderr.strip() == "prefopt train-sft: gone.json: no such file"


def started(project: Project, *command: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "prefopt", "launch", "--", *command]
    return subprocess.Popen(words, cwd=project.folder, env=project.environment(), start_new_session=True)


def servers(project: Project) -> list[str]:
    """Processes of warm servers that were started in this project's folder."""
    words = ["pgrep", "-f", "prefopt[.]processes[.]warm"]
    listing = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return [pid for pid in listing.split() if folder_of(pid) == project.folder.resolve()]


def folder_of(pid: str) -> Path | None:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:  # it has ended meanwhile
        return None


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runs_in_one_checkout_do_not_mix(project):
    first = started(project, "sleep", "30")
    wait_until(lambda: servers(project))
    second = project.prefopt("launch", "--", "true")
    first.terminate()
    assert second.returncode == 2
    assert f"another run works in {project.folder}" in second.stderr
    assert f"(process {first.pid})" in second.stderr
    assert first.wait() == 128 + signal.SIGTERM or first.returncode == 256 - signal.SIGTERM


def test_a_killed_run_leaves_no_server_and_no_lock(project):
    locks = project.folder / ".snakemake" / "locks"
    first = started(project, "sleep", "30")
    wait_until(lambda: servers(project))
    locks.mkdir(parents=True)
    (locks / "0.input.lock").write_text("")
    first.kill()
    first.wait()
    wait_until(lambda: not servers(project))
    assert project.prefopt("launch", "--", "true").returncode == 2, "the workflow lives on and keeps the checkout"
    os.killpg(first.pid, signal.SIGKILL)
    assert project.prefopt("launch", "--", "true").returncode == 0
    assert list(locks.iterdir()) == []


def test_a_failed_job_ends_in_the_line_that_says_what_to_do(project):
    (project.folder / "pairs.jsonl").write_text("{not json\n")
    run = project.launch()
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("results/logs/pairs/")
    assert "prefopt prepare-pairs: " in last
    assert "pairs.jsonl" in last


def test_a_job_that_slurm_started_imports_for_itself(project):
    """Slurm hands the environment on, so its jobs know of a server that their limits do not reach."""
    asked = "from prefopt.processes.warm import run_in_server; print(run_in_server(['--help']))"
    here, there = (f'{prefix} {sys.executable} -c "{asked}"' for prefix in ("", "SLURM_JOB_ID=7"))
    run = beside(project, f"{there}; {here}")
    assert run.stdout.splitlines()[0] == "None"
    assert run.stdout.splitlines()[-1] == "0"


def test_a_kill_between_an_artifact_and_snakemakes_note_of_it_hides_nothing_behind_it(finished, tmp_path):
    """Snakemake would make the artifact again, and take what follows from it for there: all of its inputs are."""
    clone = finished.copy(tmp_path / "project")
    judgement = next((clone.folder / "results" / "judgements").glob("dpo-*"))
    metrics = json.loads(clone.spec("metrics", "dpo").read_text())
    shutil.rmtree(clone.folder / "results" / "metrics" / metrics["id"])
    shutil.rmtree(clone.folder / "results" / "papers")
    left = clone.planned_jobs()
    assert {"win_rate", "paper_item"} <= left.keys()
    marks = clone.folder / ".snakemake" / "incomplete"
    marks.mkdir(parents=True, exist_ok=True)
    for path in judgement.iterdir():
        name = base64.b64encode(str(path.relative_to(clone.folder)).encode()).decode()
        (marks / name).write_text('{"external_jobid": null}')
    assert clone.planned_jobs() == left


def test_all_profiles_leave_the_question_what_is_whole_to_artifacts():
    for path in sorted((ROOT / "workflow" / "profiles").glob("*/config.yaml")):
        declared = yaml.safe_load(path.read_text())
        assert declared["ignore-incomplete"] is True, path
        assert "rerun-incomplete" not in declared, path
