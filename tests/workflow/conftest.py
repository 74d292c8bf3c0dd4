"""Projects for the workflow tests: an untouched one, and one in which everything has run."""

from __future__ import annotations

import pytest

from small_project import Project, new_project


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
