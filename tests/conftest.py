"""Shared by all tests: the checkout, the optional real data, and projects in which workflows run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from once import made_once
from small_project import Project, new_project
from warm_server import warm_server

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config) -> None:
    """The processes that xdist starts find the server of the process that starts them."""
    if not hasattr(config, "workerinput"):
        server = warm_server()
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


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

    def make(folder: Path) -> None:
        new_project(folder).snakemake(check=True)

    made = made_once(tmp_path_factory, "finished", make)
    own = tmp_path_factory.mktemp("finished") / "project"
    return Project(shutil.copytree(made, own))
