"""Shared by all tests: the checkout, the optional real data, and projects in which workflows run."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_project import Project, new_project

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch) -> None:
    """The user's own store stays out of the tests; what ``mlflow.set_tracking_uri`` exports ends with its test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def shared_data() -> Path:
    """Public data beside the checkout; the test is skipped where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the public data folder shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture
def project(tmp_path) -> Project:
    """A project in which nothing has been run."""
    return new_project(tmp_path / "project")


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Project:
    """A project in which everything has been run once; tests must not change it."""
    project = new_project(tmp_path_factory.mktemp("finished") / "project")
    project.snakemake(warm=True, check=True)
    return project
