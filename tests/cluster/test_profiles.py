"""The cluster profiles plan every job; Kubernetes jobs are what kubectl is asked for.

No Kubernetes runs here: a kubectl of the test's own keeps what it is given and runs the container's command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from installed import packages_of
from marks import long
from small_project import ROOT, Project, item

KUBECTL = """#!{python}
import json, subprocess, sys
from pathlib import Path
here, words = Path(__file__).parent / "jobs", sys.argv[1:]
here.mkdir(exist_ok=True)
if words[0] == "create":
    name, job = f"prefopt-{{len(list(here.iterdir()))}}", json.load(sys.stdin)
    container = job["spec"]["template"]["spec"]["containers"][0]
    job["script"] = Path(container["command"][-1]).read_text()
    code = subprocess.run(container["command"], cwd=container["workingDir"], stdout=subprocess.DEVNULL).returncode
    job["status"] = {{"conditions": [{{"type": "Failed" if code else "Complete", "status": "True"}}]}}
    (here / name).write_text(json.dumps(job))
    print(f"job.batch/{{name}}")
elif words[0] == "get":
    path = here / words[1].removeprefix("job.batch/")
    print(path.read_text() if path.exists() else "")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, Path]:
    return {name: packages_of(name, tmp_path_factory.mktemp(name)) for name in ("slurm", "kubernetes")}


def environment(project: Project, packages: Path) -> dict[str, str]:
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    return {**project.environment(), "PYTHONPATH": path, "PREFOPT_IMAGE": "registry/prefopt:1", "PREFOPT_CLAIM": "lab"}


def snakemake(project: Project, executor: str, env: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    profile = ROOT / "workflow" / "profiles" / executor
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--workflow-profile", profile, *words]
    return subprocess.run(
        list(map(str, command)), cwd=project.folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("executor", ["slurm", "kubernetes"])
def test_a_cluster_profile_plans_every_job(project, installed, executor):
    configured = ["--config", "execution={container: 'docker://registry.example/prefopt:1'}"]
    run = snakemake(project, executor, environment(project, installed[executor]), "-n", *configured)
    assert run.returncode == 0, run.stdout + run.stderr
    local = project.planned_jobs()
    assert local["train_policy"] == 4
    planned = [line.split() for line in run.stdout.splitlines()]
    assert [rule for rule, count in local.items() if [rule, str(count)] not in planned] == []


def pairs_by_kubernetes(project, installed, tmp_path) -> Path:
    """Make the pairs with a kubectl that runs a pod's command here; the folder in which it keeps the jobs it got."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL.format(python=sys.executable))
    kubectl.chmod(0o755)
    (project.folder / "workflow").symlink_to(ROOT / "workflow")
    env = environment(project, installed["kubernetes"])
    env["PATH"] = os.pathsep.join([str(kubectl.parent), env["PATH"]])
    project.snakemake("-n", check=True)
    target = Path("results/pairs") / project.spec("pairs").stem / "manifest.json"
    run = snakemake(project, "kubernetes", env, "--latency-wait", 5, "--", target)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (project.folder / target).is_file()
    return kubectl.parent / "jobs"


def test_a_kubernetes_job_is_a_pod_on_the_shared_volume(project, installed, tmp_path):
    jobs = pairs_by_kubernetes(project, installed, tmp_path)
    (path,) = jobs.iterdir()
    made = json.loads(path.read_text())
    job = made["spec"]
    assert sys.executable not in made["script"], "a pod's Python is that of its image, not that of this machine"
    assert re.search(r"^(.* )?python -m snakemake ", made["script"], re.MULTILINE)
    pod = job["template"]["spec"]
    assert job["activeDeadlineSeconds"] % 60 == 0
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "lab"}
    (container,) = pod["containers"]
    assert container["image"] == "registry/prefopt:1"
    assert container["workingDir"] == container["volumeMounts"][0]["mountPath"] == str(project.folder)
    assert container["resources"]["requests"]["cpu"] == 1
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_without_an_image_the_kubernetes_profile_says_what_to_set(tmp_path):
    jobs = ROOT / "workflow" / "profiles" / "kubernetes" / "jobs.py"
    command = [sys.executable, str(jobs), "submit", "1", "1000", "10", "0", "script"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
    assert run.returncode == 1
    assert "set PREFOPT_IMAGE" in run.stderr


@long("half a minute of processor time")
def test_job_scripts_run_nothing_that_a_users_names_say(project, installed, tmp_path):
    """Files, title and note are commands; the folder has a space; the scripts are run as a cluster would."""
    names = ["$(touch pwned);touch pwned.jsonl", "a'b.jsonl", 'c"d.jsonl', "e\ntouch pwned\n.jsonl", "-n.jsonl"]
    rows = (project.folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    moved = Project(project.folder.rename(tmp_path / "two words"))
    for number, name in enumerate(names):
        (moved.folder / name).write_text("".join(rows[number :: len(names)]))
    content = item()
    content["item"] |= {"title": "t'; touch pwned; '$(touch pwned)", "note": "`touch pwned`"}
    content["data"]["source"]["paths"] = names
    moved.declare(content)
    pairs_by_kubernetes(moved, installed, tmp_path)
    assert [path for path in tmp_path.rglob("pwned*") if path.is_file()] == []
