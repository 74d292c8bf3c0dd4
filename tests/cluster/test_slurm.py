"""The slurm profile on a real Slurm: the same artifacts as on one machine, whatever happens to a job on its way.

A run through Slurm spends most of its time waiting for the next status check, so each test runs what it needs and
takes the rest from a project that was finished on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from marks import long
from slurm import Slurm
from small_project import ROOT, TRAIN, Project, item

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

PROFILE = ROOT / "workflow" / "profiles" / "slurm"
LONG = {**TRAIN, "steps": 400}
GROUPS = {
    "data": ("prepare_pairs", "prepare_model", "tokenize", "train_sft"),
    "signals": ("score_reference", "sample_reference", "estimate_dispersion"),
    "rewards": ("train_reward", "score_rewards", "collect_ensemble"),
    "policies": ("train_policy", "generate", "judge", "win_rate"),
    "papers": ("paper_item", "publish", "report"),
}


ANSWERS = ("policy", "generations", "judgements", "metrics", "papers")


class ClusterProject:
    """A project whose jobs go to Slurm."""

    def __init__(self, project: Project, plugins: Path, slurm: Slurm) -> None:
        self.project, self.folder, self.slurm = project, project.folder, slurm
        self.environment = {
            **project.environment(),
            **slurm.environment(),
            "PYTHONPATH": os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")]),
        }
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), self.environment["PATH"]])

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Snakemake with the slurm profile; status checks come sooner than a real cluster would like."""
        command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--workflow-profile", PROFILE]
        command += ["--slurm-init-seconds-before-status-checks", 1, "--latency-wait", 5, *words]
        log = (self.folder / "snakemake.log").open("w")
        return subprocess.Popen(
            list(map(str, command)), cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True
        )

    def finish(self, run: subprocess.Popen[str]) -> str:
        """Wait for a run that must succeed; what it said."""
        code = run.wait(timeout=600)
        said = (self.folder / "snakemake.log").read_text()
        assert code == 0, said
        return said

    def rule_jobs(self, rule: str) -> list[dict[str, str]]:
        """Slurm's records of the jobs of one rule."""
        return [job for job in self.slurm.jobs() if f"rule_{rule}" in job["StdOut"] and self.is_mine(job)]

    def is_mine(self, job: dict[str, str]) -> bool:
        """Whether a job was submitted from this project's folder."""
        return job["WorkDir"] == str(self.folder)


def outputs(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["outputs"]


def wait_until(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def clone(finished, tmp_path, plugins, slurm) -> ClusterProject:
    """Everything is finished but a long SFT run, which saves its state every 20 steps."""
    project = finished.copy(tmp_path / "project")
    configure(project, checkpoint_steps=20)
    project.declare(item(sft={"train": LONG}))
    project.snakemake("-n", check=True)
    return ClusterProject(project, plugins, slurm)


def configure(project: Project, **execution: int) -> None:
    path = project.folder / "config" / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "execution": execution}))


@pytest.fixture(scope="module")
def undisturbed(finished, tmp_path_factory) -> dict:
    """Outputs of the long SFT run on this machine, without Slurm."""
    project = finished.copy(tmp_path_factory.mktemp("undisturbed") / "project")
    project.declare(item(sft={"train": LONG}))
    project.snakemake("-n", check=True)
    project.prefopt("train-sft", "--spec", long_sft(project).with_suffix(".json"), check=True)
    return outputs(project.folder / "results" / "sft" / long_sft(project).stem)


def long_sft(project: Project) -> Path:
    """Spec of the long SFT run."""
    specs = (project.folder / "results" / "specs" / "sft").glob("*.json")
    (found,) = (path for path in specs if json.loads(path.read_text())["spec"]["train"]["steps"] == LONG["steps"])
    return found


def target(clone: ClusterProject) -> Path:
    return Path("results") / "sft" / long_sft(clone.project).stem / "manifest.json"


def has_checkpoint(clone: ClusterProject) -> bool:
    folder = clone.folder / "results" / ".scratch" / "sft" / long_sft(clone.project).stem / "checkpoints"
    return folder.is_dir() and any(folder.iterdir())


@pytest.mark.parametrize(
    "anew", [ANSWERS, pytest.param(("",), marks=long("a minute of processor time"))], ids=["from policies on", "all"]
)
def test_a_project_through_slurm_gives_the_artifacts_of_one_machine(finished, tmp_path, plugins, slurm, anew):
    """One arm to its report in a few submissions: artifacts byte for byte those of the local run."""
    project = finished.copy(tmp_path / "project")
    for stage in anew:
        shutil.rmtree(project.folder / "results" / stage)
    (project.folder / "results" / "report.html").unlink(missing_ok=True)
    project.declare(item(arms={"dpo": item()["arms"]["dpo"]}, rewards={}))
    project.snakemake("-n", check=True)
    groups = [f"{rule}={group}" for group, rules in GROUPS.items() for rule in rules]
    cluster = ClusterProject(project, plugins, slurm)
    cluster.finish(cluster.start("--groups", *groups, "--group-components", *(f"{group}=99" for group in GROUPS)))
    made, local = results(project), results(finished)
    assert {"policy", "judgements", "metrics"} <= {Path(name).parent.name for name in made}
    assert {name: local[name] for name in made} == made
    assert (project.folder / "results" / "report.html").is_file()


def results(project: Project) -> dict[str, dict]:
    """Outputs of every artifact below the items; those of items name the time they were made."""
    manifests = sorted((project.folder / "results").glob("*/*/manifest.json"))
    return {str(path.parent.relative_to(project.folder)): outputs(path.parent) for path in manifests}


def test_a_job_killed_for_memory_is_submitted_again_with_more(clone, undisturbed):
    """250 MB are not enough for torch: the second attempt asks for 8 times as much, and ends in the same bytes."""
    run = clone.start("--set-resources", "train_sft:mem_mb=250 * 8 ** (attempt - 1)", "--", target(clone))
    clone.finish(run)
    first, second = clone.rule_jobs("train_sft")
    assert (first["JobState"], first["MinMemoryNode"]) == ("FAILED", "250M")
    assert (second["JobState"], second["MinMemoryNode"]) == ("COMPLETED", "2000M")
    assert minutes(second["TimeLimit"]) == 2 * minutes(first["TimeLimit"])
    assert outputs(clone.folder / target(clone).parent) == undisturbed


def minutes(limit: str) -> int:
    hours, minute, _ = map(int, limit.split(":"))
    return 60 * hours + minute


def test_a_cancelled_job_is_submitted_again_and_resumes(clone, undisturbed):
    run = clone.start("--", target(clone))
    wait_until(lambda: has_checkpoint(clone))
    clone.slurm.ask("scancel", clone.rule_jobs("train_sft")[0]["JobId"])
    clone.finish(run)
    assert [job["JobState"] for job in clone.rule_jobs("train_sft")] == ["CANCELLED", "COMPLETED"]
    assert "going on from step" in sft_log(clone)
    assert outputs(clone.folder / target(clone).parent) == undisturbed


def sft_log(clone: ClusterProject) -> str:
    return (clone.folder / "results" / "logs" / "sft" / f"{long_sft(clone.project).stem}.log").read_text()


def test_a_preempted_job_goes_back_into_the_queue_and_resumes(clone, undisturbed):
    """An urgent job takes both nodes; Slurm puts ours back and starts it again under its old number."""
    run = clone.start("--", target(clone))
    wait_until(lambda: has_checkpoint(clone))
    clone.slurm.ask("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
    clone.finish(run)
    (job,) = clone.rule_jobs("train_sft")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert "going on from step" in sft_log(clone)
    assert outputs(clone.folder / target(clone).parent) == undisturbed


def test_jobs_of_one_group_share_a_submission_and_its_gpu(finished, tmp_path, plugins, slurm):
    """Two policies in one submission that asks for one GPU, as the profile has it for trials."""
    project = finished.copy(tmp_path / "project")
    configure(project, gpus=1)
    made = sorted((project.folder / "results" / "policy").glob("*/manifest.json"))[:2]
    for path in made:
        shutil.rmtree(path.parent)
    project.snakemake("-n", check=True)
    cluster = ClusterProject(project, plugins, slurm)
    targets = [path.relative_to(project.folder) for path in made]
    grouped = ["--groups", "train_policy=trials"]
    grouped += ["--set-resources", "train_policy:device=cpu", "train_policy:lane=4"]
    cluster.finish(cluster.start(*grouped, "--", *targets))
    (job,) = [job for job in slurm.jobs() if cluster.is_mine(job)]
    assert job["TresPerJob"] == "gres:gpu:1"
    assert len(made) == 2
    assert all(path.is_file() for path in made)


@long("2 minutes")
def test_a_job_of_two_processes_asks_for_two_gpus_and_goes_on_after_preemption(finished, tmp_path, plugins, slurm):
    """Sampling by two processes, to the bytes of one; batches that were drawn before the node was taken are kept."""
    project = finished.copy(tmp_path / "project")
    deep = {**item()["model"], "layers": 4, "hidden": 64, "intermediate": 128}  # so that it takes a while
    project.declare(item(model=deep, samples={"max_new_tokens": 40, "batch_size": 1}))
    project.snakemake("-n", check=True)
    specs = (project.folder / "results" / "specs" / "samples").glob("*.json")
    (spec,) = (path for path in specs if json.loads(path.read_text())["spec"]["sampling"]["batch_size"] == 1)
    made = project.folder / "results" / "samples" / spec.stem
    project.snakemake("--", made.relative_to(project.folder) / "manifest.json", check=True)
    alone = outputs(made)
    shutil.rmtree(made)
    configure(project, gpus=1, row_processes=2)
    project.snakemake("-n", check=True)
    cluster = ClusterProject(project, plugins, slurm)
    target = (made / "manifest.json").relative_to(project.folder)
    run = cluster.start("--set-resources", "sample_reference:device=cpu", "--", target)
    drawn = project.folder / "results" / ".scratch" / "samples" / spec.stem / "responses"
    wait_until(lambda: len(list(drawn.glob("batch-*.json"))) > 3)
    slurm.ask("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
    cluster.finish(run)
    (job,) = cluster.rule_jobs("sample_reference")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert (job["TresPerJob"], job["NumCPUs"], job["MinMemoryNode"]) == ("gres:gpu:2", "2", "16000M")
    assert outputs(made) == alone
    assert json.loads((made / "manifest.json").read_text())["summary"]["processes"] == 2
