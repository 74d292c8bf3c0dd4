"""The README's table of promises: every row names tests, and every named test exists."""

from __future__ import annotations

import ast
import re

from small_project import ROOT

_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """Promise -> (file, test) of every row of the table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## What is promised\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == "| promise | test |"
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert all(len(row) == 2 for row in rows)
    return [(promise, _TEST.findall(tests)) for promise, tests in rows]


def names_in(file: str) -> set[str]:
    """Names of a file's tests, read from its text."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_promise_names_tests_that_exist():
    rows = promises()
    assert len(rows) >= 20
    assert len({promise for promise, _ in rows}) == len(rows)
    missing = [f"{file}::{name}" for _, named in rows for file, name in named if name not in names_in(file)]
    assert missing == []
    assert [promise for promise, named in rows if not named] == []


def test_nothing_else_stands_in_the_column_of_tests():
    """A misspelt path would otherwise be read as none."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is promised\n")[1].split("\n## ")[0]
    for line in text.splitlines()[4:]:
        if line.startswith("| ") and not line.startswith(("| promise", "| ---")):
            cell = line.strip("| ").split(" | ")[1]
            assert re.fullmatch(rf"{_TEST.pattern}(<br>{_TEST.pattern})*", cell), cell
