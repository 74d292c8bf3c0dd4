"""A whole project whose jobs share their rows among two processes: the artifacts of single processes, byte for byte."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from marks import long
from prefopt.processes.shares import ROW_STAGES
from small_project import Project

pytestmark = long("half a minute of processor time or more")


def manifests(project: Project) -> dict[str, dict]:
    found = sorted((project.folder / "results").glob("*/*/manifest.json"))
    return {str(path.parent.relative_to(project.folder)): json.loads(path.read_text()) for path in found}


@pytest.mark.parametrize("warm", [True, False])
def test_jobs_of_two_processes_make_the_artifacts_of_one(finished, tmp_path, warm):
    """All of them beside the warm server, those of one stage cold."""
    project = finished.copy(tmp_path / "project")
    stages = ROW_STAGES if warm else {"rewards"}
    for stage in stages:
        shutil.rmtree(project.folder / "results" / stage, ignore_errors=True)
    path = project.folder / "config" / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "execution": {"row_processes": 2}}))
    targets = [f"{ref}/manifest.json" for ref in manifests(finished) if ref.split("/")[1] in stages]
    project.snakemake("--", *targets, cold=not warm, check=True)
    made, expected = manifests(project), manifests(finished)
    assert made.keys() == expected.keys()
    assert {ref: one["outputs"] for ref, one in made.items()} == {ref: one["outputs"] for ref, one in expected.items()}
    assert {made[ref.removesuffix("/manifest.json")]["summary"]["processes"] for ref in targets} == {2}
