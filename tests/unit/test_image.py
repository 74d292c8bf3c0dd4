"""The image of a cluster's jobs, as far as it can be checked where none can be built: what its file names is there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def lines(root) -> dict[str, str]:
    """Instruction -> words, the last of each kind."""
    text = (root / "envs" / "Dockerfile").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))


def test_its_python_is_that_of_the_other_environments(root, lines):
    conda = yaml.safe_load((root / "envs" / "prefopt.yaml").read_text(encoding="utf-8"))
    (wanted,) = (entry for entry in conda["dependencies"] if str(entry).startswith("python="))
    assert re.fullmatch(rf"python:{wanted.removeprefix('python=')}\.\d+-slim-bookworm", lines["FROM"])


def test_it_is_set_up_by_the_script_of_every_machine_and_its_python_comes_first(root, lines):
    script, mark = lines["RUN"].split(" && ")
    assert os.access(root / script, os.X_OK)
    assert "-m venv --clear .venv" in (root / script).read_text(encoding="utf-8")
    assert mark == "touch .venv/.ready", "what the Makefile looks for"
    assert f"PATH={Path(lines['WORKDIR']) / '.venv' / 'bin'}:$PATH" in lines["ENV"]


def test_results_and_environments_stay_out_of_it(root):
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "results", ".snakemake"} <= set(ignored)
