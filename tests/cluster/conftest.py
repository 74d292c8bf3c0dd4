"""A Slurm for the tests of this folder, brought up once and torn down after them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from installed import packages_of
from slurm import Slurm, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    """A running Slurm of two virtual nodes; skipped where none can be started."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def plugins(tmp_path_factory) -> Path:
    """Snakemake's Slurm plugins."""
    return packages_of("slurm", tmp_path_factory.mktemp("plugins"))
