"""The package is free of type errors under the configuration of pyproject.toml, and an error would be seen."""

from __future__ import annotations

import subprocess
import sys


def checked(root, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--no-color-output", *map(str, words)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_package_has_no_type_errors(root):
    found = checked(root)
    assert found.returncode == 0, found.stdout


def test_a_wrong_call_of_the_package_is_an_error(root, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("from prefopt.planning.text import duration\n\nlength: int = duration('12 s')\n")
    found = checked(root, path)
    assert found.returncode == 1
    assert 'incompatible type "str"; expected "float"' in found.stdout
    assert 'expression has type "str", variable has type "int"' in found.stdout
