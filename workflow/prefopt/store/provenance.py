"""What a manifest records of the program and the machine: commit, packages, threads, memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

_RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "snakemake",
)


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that ``folder`` is in; nulls where it is none."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


@cache
def code_state() -> dict[str, Any]:
    """This package's commit and the versions of what results depend on, as they were when first asked."""
    from importlib import metadata

    versions = {name: metadata.version(name) for name in _RECORDED_PACKAGES}
    return {"git": git_state(Path(__file__).resolve().parent), "packages": versions}


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6, 1)


def torch_threads() -> int | None:
    """Threads that torch computes with in this process; None where it was not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()
