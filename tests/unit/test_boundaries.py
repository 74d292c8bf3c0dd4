"""The design's boundaries between modules, read from the imports themselves."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import cache
from pathlib import Path

import pytest

import prefopt

PACKAGE = Path(prefopt.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = PACKAGE.parents[1] / "tests"
FILE_READERS = {"bundles", "digests", "files", "tables", "storage"}
FILE_READERS |= {"config", "sources", "containers", "pairs", "checkpoints", "tracking", "report"}

# What a layer may import of this package, at its top or inside its functions: those named, and what they may.
LAYERS = {
    "errors": "",
    "json_text": "",
    "contexts": "",
    "digests": "",
    "provenance": "",
    "storage": "contexts errors",
    "tables": "errors",
    "files": "errors json_text storage",
    "artifacts": "digests files",
    "readers": "errors markup",
    "verification": "artifacts",
    "builds": "provenance team verification",
    "bundles": "builds",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported_by(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(module: str) -> set[str]:
    return {name_of(p) for p in MODULES if any(m == module or m.startswith(f"{module}.") for m in imported_by(p))}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_can_be_imported(path):
    if path.name != "__main__.py":  # importing it would run the command line
        importlib.import_module(name_of(path))


def test_every_module_is_in_the_package():
    found = {info.name for info in pkgutil.walk_packages([str(PACKAGE)], "prefopt.")}
    assert {name_of(p) for p in MODULES} == found | {"prefopt"}


def test_nothing_imports_the_workflow_engines():
    assert importers("snakemake") == importers("dvc") == set()


def test_only_tracking_imports_mlflow():
    assert importers("mlflow") == {"prefopt.tracking"}


def test_only_the_command_line_imports_the_stages():
    outside = {name for name in importers("prefopt.stages") if not name.startswith("prefopt.stages")}
    assert {name for name in outside if not name.startswith("prefopt.verbs.")} == {"prefopt.cli"}
    users = {name for name in importers("prefopt.verbs") if not name.startswith("prefopt.verbs.")}
    assert users == {"prefopt.cli"}


def test_losses_import_only_the_batch():
    for path in (PACKAGE / "losses").glob("*.py"):
        inside = {m for m in imported_by(path) if m.startswith("prefopt")}
        allowed = ("prefopt.losses", "prefopt.batch", "prefopt.errors", "prefopt.lazy")
        assert all(m.startswith(allowed) for m in inside), (path, inside)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_those_below_it(layer):
    def below(name):
        return {name}.union(*map(below, LAYERS.get(name, "").split()))

    inside = {m.split(".")[1] for m in imports_of(layer) if m.startswith("prefopt.")}
    assert inside <= below(layer)


def test_what_tests_and_benchmarks_import_is_there():
    """A name that moved is noticed here, not in the one test that imports it inside a function."""
    files = [*TESTS.rglob("*.py"), *(TESTS.parent / "benchmarks").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prefopt":
                there = importlib.import_module(node.module)
                found = [a.name for a in node.names if not (hasattr(there, a.name) or submodule(there, a.name))]
                assert not found, (path, node.lineno, found)


def imports_of(layer: str) -> set[str]:
    """What a module imports, or all modules of a package together."""
    files = (PACKAGE / layer).glob("*.py") if (PACKAGE / layer).is_dir() else [PACKAGE / f"{layer}.py"]
    return set().union(*map(imported_by, files))


def submodule(package, name: str) -> bool:
    return hasattr(package, "__path__") and any(found.name == name for found in pkgutil.iter_modules(package.__path__))


def test_only_scoring_and_decoding_see_logits():
    users = {name_of(p) for p in MODULES if ".logits" in p.read_text(encoding="utf-8")}
    assert users == {"prefopt.scoring", "prefopt.decoding"}


def test_library_modules_do_not_touch_files():
    """Reading and writing belong to the stages, and to the few modules whose business are files."""
    words = ("open(", ".read_text(", ".write_text(", "to_parquet(", "read_parquet(")
    for path in MODULES:
        top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if top not in FILE_READERS | {"stages", "verbs", "warm", "launch", "plan", "contexts"}:
            text = path.read_text(encoding="utf-8")
            assert not any(f" {word}" in text or f"({word}" in text or f".{word}" in text for word in words), path
