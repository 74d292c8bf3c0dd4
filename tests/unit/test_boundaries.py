"""The design's boundaries between modules, read from the imports themselves."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

import prefopt

PACKAGE = Path(prefopt.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = PACKAGE.parents[1] / "tests"
FILE_READERS = {"store.bundles", "digests", "files", "tables", "storage", "contexts", "pairs", "tracking", "report"}
FILE_READERS |= {"planning.config", "inputs.sources", "inputs.containers", "training.checkpoints"}
FILE_READERS |= {"stages", "verbs", "plan", "processes.warm_process", "processes.launch"}

# What a layer may import of this package, at its top or inside its functions: those named, and what they may.
LAYERS = {
    "errors": "",
    "json_text": "",
    "contexts": "",
    "digests": "",
    "storage": "contexts errors",
    "tables": "errors",
    "files": "errors json_text storage",
    "team": "errors storage",
    "artifacts": "digests files",
    "readers": "errors",
    "store.provenance": "",
    "store.verification": "artifacts",
    "store.builds": "store.provenance team store.verification",
    "store.bundles": "store.builds",
}

# Groups of modules, and which other groups each may import.
GROUPS = {
    "inputs": "",
    "store": "",
    "evaluation": "",
    "processes": "store",
    "engine": "inputs processes",
    "training": "engine processes",
    "planning": "inputs processes",
    "reporting": "evaluation store",
}

# Who alone may import a group, beside those that GROUPS allows.
USERS = {
    "planning": "plan procedures studies verbs",
    "store": "stages verbs",
    "training": "stages trainer",
    "reporting": "report stages tracking verbs",
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
    assert {name for name in outside if not name.startswith("prefopt.verbs.")} == {"prefopt.__main__", "prefopt.cli"}
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

    inside = {m.split(".", 1)[1] for m in imports_of(layer) if m.startswith("prefopt.") and m[8:] not in GROUPS}
    assert {m for m in inside if not within(m, below(layer))} == set()


def test_every_package_is_a_group_or_says_what_it_is_about():
    """A new package states here what it may import, or is one of those that are a subject of their own."""
    subjects = {"annotators", "grids", "judges", "losses", "mallows", "outer", "procedures", "readers", "specs"}
    subjects |= {"stages", "studies", "templates", "verbs", "world"}
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == subjects | set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_imports_only_the_groups_below_it(group):
    inside = {m.split(".")[1] for m in imports_of(group) if m.startswith("prefopt.")}
    assert inside & (set(GROUPS) | {"stages", "verbs"}) <= {group, *GROUPS[group].split()}


@pytest.mark.parametrize("group", USERS)
def test_a_group_is_imported_only_by_its_users(group):
    above = {name for name, below in GROUPS.items() if group in below.split()}
    assert {name.split(".")[1] for name in importers(f"prefopt.{group}")} - {group} <= above | set(USERS[group].split())


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_modules_imports_none_of_them_by_itself(group):
    """Its name alone costs nothing, and says in its docstring what belongs there."""
    tree = ast.parse((PACKAGE / group / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


def test_planning_and_evaluation_never_import_torch():
    """Not even inside functions or through ``LazyModule``."""
    for group in ("planning", "evaluation"):
        assert not {m for m in imports_of(group) if m.split(".")[0] in {"torch", "transformers", "peft"}}
        assert "prefopt.lazy" not in imports_of(group)


def test_what_tests_and_benchmarks_import_is_there():
    """A name that moved is noticed here, not in the one test that imports it inside a function."""
    files = [*TESTS.rglob("*.py"), *(TESTS.parent / "benchmarks").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"prefopt", "benchmarks"}:
                there = importlib.import_module(node.module)
                found = [a.name for a in node.names if not (hasattr(there, a.name) or submodule(there, a.name))]
                assert not found, (path, node.lineno, found)


def imports_of(layer: str) -> set[str]:
    """What a module imports, or all modules of a package together."""
    place = PACKAGE.joinpath(*layer.split("."))
    files = place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    return set().union(*map(imported_by, files))


def within(module: str, places: Collection[str]) -> bool:
    """Whether a module, or a name in it, is one of these modules or in one of these packages."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


def submodule(package, name: str) -> bool:
    return hasattr(package, "__path__") and any(found.name == name for found in pkgutil.iter_modules(package.__path__))


def test_only_scoring_and_decoding_see_logits():
    users = {name_of(p) for p in MODULES if ".logits" in p.read_text(encoding="utf-8")}
    assert users == {"prefopt.scoring", "prefopt.engine.decoding"}


def test_library_modules_do_not_touch_files():
    """Reading and writing belong to the stages, and to the few modules whose business are files."""
    words = ("open(", ".read_text(", ".write_text(", "to_parquet(", "read_parquet(")
    for path in MODULES:
        if not within(name_of(path).removeprefix("prefopt."), FILE_READERS):
            text = path.read_text(encoding="utf-8")
            assert not any(f" {word}" in text or f"({word}" in text or f".{word}" in text for word in words), path
