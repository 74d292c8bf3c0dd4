"""Versions as a group uses them: commit, push, clone, pull, go on there; go back; find where a number comes from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marks import long
from prefopt.files import read_json
from prefopt.reporting.trace import Tracer
from s3_server import s3_server, s3_tools
from small_project import ROOT, Project, item

REMADE = {"win_rate": 1, "paper_item": 1, "publish": 1, "report": 1}
BRANCH = {"train_policy": 1, "generate": 1, "judge": 1, **REMADE}


def other_beta() -> dict:
    return item(arms={**item()["arms"], "dpo": {"loss": {"name": "dpo", "beta": 0.2}}})


class Checkout(Project):
    """A project that is a git checkout with DVC in it, and has the rules of its own."""

    def run(self, *command: object, tools: Path | None = None, both: bool = False, **variables: str) -> str:
        environment = {**self.environment(), **variables}
        if tools is not None:
            environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
        words = list(map(str, command))
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr if both else done.stdout

    def reproduce(self) -> dict[str, int]:
        """``make reproduce``, the environment being there; rule -> number of jobs that ran."""
        text = self.run("make", "-o", ".venv/.ready", "reproduce", both=True)
        stats = re.search(r"^Job stats:\n(.*?)^total", text, re.MULTILINE | re.DOTALL)
        assert stats or "Nothing to be done" in text, text
        table = re.findall(r"^(\w+) +(\d+)$", stats[1], re.MULTILINE) if stats else []
        return {rule: int(count) for rule, count in table if rule != "all"}

    def commit(self, text: str) -> str:
        self.run("dvc", "commit", "-f", "-q")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", text)
        return self.run("git", "rev-parse", "HEAD").strip()

    def clone(self, folder: Path) -> Checkout:
        self.run("git", "clone", "-q", self.folder, folder)
        return named(Checkout(folder))


def named(checkout: Checkout) -> Checkout:
    for key, value in {"user.name": "someone", "user.email": "someone@example.org"}.items():
        checkout.run("git", "config", key, value)
    return checkout


@pytest.fixture(scope="module")
def pushed(finished, tmp_path_factory) -> Checkout:
    """A finished checkout, committed and pushed to a folder; tests clone it and leave it as it is."""
    folder = tmp_path_factory.mktemp("versions")
    checkout = Checkout(finished.copy(folder / "first").folder)
    for name in ("Makefile", "Snakefile", "dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / name, checkout.folder / name)
    caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("workflow", "envs"):
        shutil.copytree(ROOT / name, checkout.folder / name, ignore=caches)
    for paper in ("mallowspo", "reward_distillation"):
        (checkout.folder / "config" / "experiments" / paper).mkdir()
        (checkout.folder / "config" / "experiments" / paper / ".gitkeep").touch()
    for leftover in ("mlflow.db", ".mlflow.lock", "mlartifacts"):  # runs there name the folder of the copied project
        path = checkout.folder / "results" / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    checkout.run("git", "init", "-q")
    named(checkout)
    checkout.run("dvc", "init", "-q")
    shutil.copyfile(ROOT / ".dvc" / "config", checkout.folder / ".dvc" / "config")
    checkout.run("dvc", "remote", "add", "-d", "store", folder / "remote")
    checkout.prefopt("publish", check=True)
    checkout.prefopt("export", check=True)
    assert checkout.reproduce() == {}
    checkout.commit("first results")
    checkout.run("dvc", "push", "-q")
    return checkout


@pytest.fixture(scope="module")
def second(pushed, tmp_path_factory) -> Checkout:
    """A clone elsewhere with everything pulled; tests change copies of it."""
    clone = pushed.clone(tmp_path_factory.mktemp("elsewhere") / "second")
    clone.run("dvc", "pull", "-q")
    return clone


@pytest.fixture
def pulled(second, tmp_path) -> Checkout:
    """A copy of the clone, with file times of its own."""
    return Checkout(Path(shutil.copytree(second.folder, tmp_path / "copy", copy_function=shutil.copyfile)))


def test_a_clone_with_pulled_results_runs_nothing(pulled):
    assert pulled.reproduce() == {}
    assert "up to date" in pulled.run("dvc", "status")
    assert "artifacts are what their manifests say" in pulled.prefopt("verify", check=True).stdout
    assert "didn't change" in pulled.run("dvc", "repro", "--dry", both=True)


@pytest.mark.slow
def test_the_same_through_an_s3_bucket(pushed, tmp_path):
    tools = s3_tools()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    source = pushed.clone(tmp_path / "source")
    source.run("dvc", "pull", "-q")
    with s3_server(tools) as address:
        bucket = f"import boto3; boto3.client('s3', endpoint_url='{address}').create_bucket(Bucket='lab')"
        source.run(tools / "python", "-c", bucket, **keys)
        source.run("dvc", "remote", "add", "-f", "-d", "store", "s3://lab/dvc")
        source.run("dvc", "remote", "modify", "store", "endpointurl", address)
        source.commit("a bucket")
        source.run("dvc", "push", "-q", tools=tools, **keys)
        clone = source.clone(tmp_path / "second")
        shutil.rmtree(clone.folder / ".dvc" / "cache", ignore_errors=True)
        clone.run("dvc", "pull", "-q", tools=tools, **keys)
    assert clone.reproduce() == {}
    assert "artifacts are what their manifests say" in clone.prefopt("verify", check=True).stdout


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_a_changed_beta_runs_its_branch_and_both_versions_can_be_compared(pulled):
    before = pulled.run("git", "rev-parse", "HEAD").strip()
    pulled.declare(other_beta())
    assert pulled.reproduce() == BRANCH
    pulled.prefopt("export", check=True)
    pulled.commit("beta 0.2")
    text = pulled.prefopt("compare", before, "HEAD", check=True).stdout
    assert "declared  arms.dpo.loss.beta: 0.1 -> 0.2" in text
    found = json.loads(pulled.prefopt("compare", before, "HEAD", "--json", check=True).stdout)
    assert {row["key"] for row in found["items"][0]["changed"]} == {"arms.dpo.loss.beta"}
    diff = json.loads(pulled.run("dvc", "metrics", "diff", "--json", before, "HEAD", "--all"))
    assert "docs/results/own/metrics.json" in diff

    pulled.run("git", "checkout", "-q", before)
    pulled.run("dvc", "checkout", "-q")
    again = pulled.reproduce()
    assert again.keys() <= {"publish", "report"}, "an old version is there again, and only its page may be made anew"
    assert "up to date" in pulled.run("dvc", "status")


def test_a_changed_caption_trains_nothing(pulled):
    caption = pulled.folder / "workflow" / "report" / "figure.rst"
    caption.write_text(f"{caption.read_text()}\nSmall models.\n")
    assert pulled.reproduce() == {}
    pulled.declare(item(item={**item()["item"], "title": "Another caption"}))
    assert pulled.planned_jobs() == {"paper_item": 1, "publish": 1, "report": 1}


def edited_by_hand(checkout: Checkout) -> tuple[Path, bytes]:
    """A number changed in one arm's metrics: the file, and what it was."""
    (path,) = (checkout.folder / "results" / "metrics").glob("dpo-*/metrics.json")
    sound = path.read_bytes()
    path.write_text(path.read_text().replace('"n_missing": 0', '"n_missing": 1'))
    return path, sound


def test_a_damaged_artifact_is_named_and_its_branch_asked_for_again(pulled):
    path, _ = edited_by_hand(pulled)
    found = pulled.prefopt("verify")
    assert found.returncode == 3
    assert f"{path.relative_to(pulled.folder)}: content is not what the manifest recorded" in found.stdout
    assert "verify --remake" in found.stderr
    made = pulled.prefopt("verify", "--remake", check=True).stdout
    assert re.findall(r"removed +results/(\w+)", made) == ["metrics", "papers"]
    assert pulled.planned_jobs() == REMADE


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_a_damaged_artifact_made_again_has_its_bytes_again(pulled):
    path, sound = edited_by_hand(pulled)
    pulled.prefopt("verify", "--remake", check=True)
    assert pulled.reproduce() == REMADE
    assert path.read_bytes() == sound
    pulled.prefopt("verify", check=True)


def test_dvc_reads_the_papers_metrics_and_plots_that_are_in_git():
    def dvc(*words: str) -> dict:
        command = [sys.executable, "-m", "dvc", *words, "--json"]
        return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    shown = dvc("metrics", "show")[""]["data"]
    papers = {"mallowspo", "reward_distillation", "own"}
    assert set(shown) == {f"docs/results/{paper}/metrics.json" for paper in papers}
    for paper in papers:
        index = read_json(ROOT / "docs" / "results" / "index.json")
        names = {entry["item"].split("/")[1] for entry in index if entry["item"].startswith(f"{paper}/")}
        assert set(shown[f"docs/results/{paper}/metrics.json"]["data"]) == names
    (plot,) = dvc("plots", "show", "docs/results/mallowspo/claims.csv")["data"]["docs/results/mallowspo/claims.csv"]
    assert plot["type"] == "vega"


def test_a_number_leads_to_run_artifact_hash_and_commit_and_back(pushed):
    def trace(name: str) -> dict:
        return Tracer(pushed.folder / "results").trace(name)

    found = trace("own/tiny:dpo/win_rate")
    policy = next(facts for facts in found["artifacts"] if facts["artifact"].startswith("policy/dpo"))
    summary = read_json(pushed.artifact("papers/own") / "item.json")["arms"]["dpo"]["summary"]["win_rate"]
    assert found["numbers"][0]["mean"] == summary["mean"]
    (run,) = policy["runs"]
    commit = pushed.run("git", "rev-parse", "HEAD").strip()
    assert policy["git"]["recorded_by"] == commit
    assert policy["dvc"]["recorded"] is True
    listing = json.loads(pushed.run("dvc", "ls", "--dvc-only", "--json", ".", f"results/{policy['artifact']}"))
    assert {entry["path"] for entry in listing} >= {"manifest.json", "metrics.jsonl", "weights"}
    for name in (policy["artifact"], run["run_id"], policy["dvc"]["manifest_md5"], policy["dvc"]["out_md5"]):
        back = trace(name)
        assert policy["artifact"] in [facts["artifact"] for facts in back["artifacts"]], name
        assert "own/tiny:dpo/win_rate" in [row["address"] for row in back["numbers"]], name
    assert trace(commit[:10])["outs"]["results/policy"] == policy["dvc"]["out_md5"]
    said = pushed.prefopt("trace", "own/tiny:dpo/win_rate", check=True).stdout
    assert run["run_id"] in said
    assert f"trace {found['asked'].partition(':')[0]}" in (pushed.folder / "results" / "report.html").read_text()


def test_gc_keeps_what_is_declared_and_removes_what_is_not(pulled):
    before = sorted(p.name for p in (pulled.folder / "results" / "policy").iterdir())
    pulled.declare(other_beta())
    listed = pulled.prefopt("gc", check=True).stdout
    gone = re.findall(r"MB +results/(\w+)/(\S+)", listed)
    assert {stage for stage, _ in gone} == {"policy", "generations", "judgements", "metrics", "papers"}
    assert sorted(p.name for p in (pulled.folder / "results" / "policy").iterdir()) == before
    pulled.prefopt("gc", "--delete", check=True)
    left = {p.name for p in (pulled.folder / "results" / "policy").iterdir()}
    assert left == set(before) - {name for _, name in gone}
    assert len(left) == len(before) - 1
    assert pulled.prefopt("gc", check=True).stdout.startswith("0 artifacts")
