"""The rules themselves: formatted, linted, complete, and the same words everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml

import forked_commands
from prefopt.plan import STAGE_VERSIONS, load_plan
from prefopt.stages import STAGES
from small_project import ROOT

RULE_FILES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
RULES = {
    match["name"]: match["body"]
    for path in RULE_FILES
    for match in re.finditer(r"^rule (?P<name>\w+):\n(?P<body>(?:(?:    .*)?\n)+)", path.read_text(), re.MULTILINE)
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


def snakemake(*words: str) -> subprocess.CompletedProcess[str]:
    return forked_commands.run(["snakemake", *words], ROOT, os.environ)


def test_one_rule_for_every_stage_named_as_its_verb():
    assert {name.replace("_", "-") for name in RULES} == {*STAGES, "publish", "report"}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_complete(name):
    body = RULES[name]
    assert body.startswith('    """'), "no docstring"
    for directive in ("input:", "output:", "log:", "benchmark:", "conda:", "threads:", "resources:", "shell:"):
        assert f"    {directive}" in body, directive
    verb = name.replace("_", "-")
    assert re.search(rf'python -m prefopt {verb} |(trained_by|one_process)\("{verb}"\)', body)
    assert ">> {log:q} 2>&1" in body, "the log must be appended to, or a retry hides the first attempt"
    for line in re.search(r"input:\n((?: {8}.*\n)+)", body)[1].splitlines():
        assert "ancient(" in line or line.startswith("            ") or line.strip() == ")", line


def test_snakemake_lint_is_clean():
    lint = snakemake("--lint", "--config", "items=mallowspo/*")
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_snakefmt_is_clean():
    check = run("snakefmt", "--check", "Snakefile", "workflow/rules")
    assert check.returncode == 0, check.stderr


def test_ruff_is_clean():
    for words in (("check",), ("format", "--check")):
        check = run("ruff", *words, ".")
        assert check.returncode == 0, check.stdout


def test_every_declared_item_plans_and_dry_runs(tmp_path):
    trials = {}
    for full in ("false", "true"):
        dry = snakemake("-n", "--config", f"results={tmp_path}", f"full={full}")
        assert dry.returncode == 0, dry.stdout + dry.stderr
        trials[full] = int(re.search(r"^run_trial +(\d+)$", dry.stdout, re.MULTILINE)[1])
    assert 0 < trials["false"] < trials["true"]


def test_conda_and_pip_environments_have_the_same_pins():
    project = (ROOT / "pyproject.toml").read_text()
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    pins = dict(re.findall(r'^    "([a-z-]+)==([^"]+)"', project, re.MULTILINE))
    torch = pins.pop("torch")
    assert {name: lock.get(name) for name in pins} == pins
    assert "torch" not in lock, "torch is a step of its own, so that one lock serves CPU and CUDA machines"
    conda = yaml.safe_load((ROOT / "envs" / "prefopt.yaml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pip == [f"torch=={torch}", "-r ../requirements.lock"]


def test_the_lock_names_no_host():
    assert not re.search(r"https?:|--(?:extra-)?index|--find-links|@ file", (ROOT / "requirements.lock").read_text())


def test_dvc_keeps_every_stage_folder_between_runs():
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    outs = {
        path: flags for stage in pipeline["stages"].values() for out in stage["outs"] for path, flags in out.items()
    }
    plan = load_plan(ROOT / "config" / "config.yaml")  # its folders are made by every run, also those left empty
    folders = {*STAGE_VERSIONS} - {"papers"} | {f"papers/{paper}" for paper in plan.papers}
    assert set(outs) == {f"results/{name}" for name in (*folders, "published.json", "report.html")}
    assert all(flags["persist"] for flags in outs.values())
    assert 'type = "reflink,copy"' in (ROOT / ".dvc" / "config").read_text()
