"""Packages of an executor in a folder of their own: in the environment they would slow every start of Snakemake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from small_project import ROOT


def packages_of(executor: str, folder: Path) -> Path:
    """Install envs/<executor>.txt into ``folder``; the test is skipped where no registry can be reached."""
    target = folder / "packages"
    uv = Path(sys.executable).parent / "uv"
    wanted = ROOT / "envs" / f"{executor}.txt"
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", target, "-r", wanted]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"needs the packages of envs/{executor}.txt ({run.stderr.strip().splitlines()[-1]})")
    return target
