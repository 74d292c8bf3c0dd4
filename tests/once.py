"""What is long in the making is made by one test process, and the others find it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt.contexts import locked


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, made by whichever of the test processes asks first; nobody may change it."""
    several = os.environ.get("PYTEST_XDIST_WORKER")
    base = factory.getbasetemp()
    folder = (base.parent if several else base) / name
    whole = folder.with_suffix(".whole")
    with locked(folder.with_suffix(".lock")):
        if not whole.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            whole.touch()
    return folder
