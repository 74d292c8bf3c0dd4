"""docs/add_a_loss.md, followed word for word in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

FILE = re.compile(r"^`([\w./-]+)`:\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPLACEMENT = re.compile(r"In `([\w./-]+)` replace\n\n```python\n(.*?)\n```\n\nby\n\n```python\n(.*?)\n```", re.DOTALL)


@pytest.fixture(scope="module")
def followed(tmp_path_factory, request):
    """The project's code, declarations and test helpers with the page's steps done, and the page."""
    root = request.config.rootpath
    page = (root / "docs" / "add_a_loss.md").read_text(encoding="utf-8")
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("workflow/prefopt", "config"):
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests" / "unit").mkdir(parents=True)
    shutil.copy(root / "tests" / "unit" / "loss_batches.py", copy / "tests" / "unit")
    written = FILE.findall(page)
    for name, text in written:
        (copy / name).write_text(text, encoding="utf-8")
    replacements = [match.groups() for match in REPLACEMENT.finditer(page)]
    for name, old, new in replacements:
        before = (copy / name).read_text(encoding="utf-8")
        assert before.count(old) == 1, f"the page replaces a line that {name} does not have"
        (copy / name).write_text(before.replace(old, new), encoding="utf-8")
    assert (len(written), len(replacements)) == (3, 1)
    return copy, page


def run(copy, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy / "workflow"), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # seconds of imports
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_loss_is_listed_with_its_formula(followed):
    copy, _ = followed
    listed = run(copy, "-m", "prefopt", "losses")
    assert re.search(r"^squared_hinge +beta\n +needs reference", listed, re.MULTILINE)


def test_the_plan_has_what_the_page_says(followed):
    copy, page = followed
    assert "two policies and one reference pass, and no reward model" in " ".join(page.split())
    (command,) = re.findall(r"^python -m (prefopt plan .*)$", page, re.MULTILINE)
    rows = {line.split()[0]: line.split()[1] for line in run(copy, "-m", *command.split()).splitlines() if line}
    assert (rows["policy"], rows["reference"], "reward" in rows) == ("2", "1", False)


def test_the_pages_test_passes_and_can_fail(followed):
    copy, _ = followed
    test = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_squared.py")
    assert "2 passed" in run(copy, *test)
    source = copy / "workflow" / "prefopt" / "losses" / "squared.py"
    right = source.read_text(encoding="utf-8")
    source.write_text(right.replace("1 - beta", "2 - beta"), encoding="utf-8")
    with pytest.raises(AssertionError):
        run(copy, *test)
    source.write_text(right, encoding="utf-8")
