"""What starting up imports: modules are counted, not seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefopt.plan import load_plan
from prefopt.planning import config, grids

HEAVY = {"accelerate", "matplotlib", "mlflow", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "tokenizers", "torch"}
HEAVY |= {"transformers", "datasets", "peft"}
RUN = "import sys; from prefopt.cli import main; main(sys.argv[1:]); print('imported', *sys.modules)"


def imported(root, *words) -> set[str]:
    """Modules that a command line has imported when it is done."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)], cwd=root, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_planning_imports_nothing_that_computes(root):
    found = imported(root, "plan", "--items", "reward_distillation/fig2,mallowspo/*")
    assert "prefopt.plan" in found
    assert not found & HEAVY


@pytest.mark.parametrize("words", [("losses",), ("studies",)], ids=" ".join)
def test_lists_import_nothing_that_computes(root, words):
    assert not imported(root, *words) & HEAVY


def test_the_parser_alone_needs_neither_declarations_nor_yaml(root):
    code = "import sys; import prefopt.cli; prefopt.cli.parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & (HEAVY | {"pydantic", "yaml", "importlib.metadata", "secrets"})


def test_planning_does_not_look_for_plugins_of_pydantic_in_every_package(root):
    """``entry_points`` is what it looks with; it reads a file of every installed package."""
    code = (
        "import importlib.metadata, runpy, sys\n"
        "importlib.metadata.entry_points = lambda **_: sys.exit('looked for plugins')\n"
        "sys.argv[1:] = ['plan', '--items', 'mallowspo/fig10']\n"
        "runpy.run_module('prefopt', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_study_that_uses_the_losses_starts_torch_but_not_transformers(root, tmp_path):
    plan = load_plan(root / "config" / "config.yaml", {"items": ["mallowspo/fig2"], "results": str(tmp_path)})
    plan.write_specs(tmp_path)
    (node,) = (node for node in plan.nodes.values() if node.stage == "studies")
    found = imported(root, "run-study", "--spec", tmp_path / "specs" / f"{node.ref}.json")
    assert "torch" in found
    assert not found & {"transformers", "tokenizers", "accelerate", "mlflow"}


def test_a_file_that_several_items_name_is_parsed_once(root, monkeypatch):
    parsed = []
    load = config.yaml.load
    monkeypatch.setattr(config.yaml, "load", lambda text, Loader: parsed.append(text) or load(text, Loader=Loader))  # noqa: N803
    config._parsed.cache_clear()
    load_plan(root / "config" / "config.yaml", {"items": ["mallowspo/*", "reward_distillation/*"]})
    assert len(parsed) == len(set(parsed))
    assert len(parsed) > 10


def test_validators_are_built_once_and_what_all_trials_share_is_planned_once(root, monkeypatch):
    """Data are looked up for an item's conditions and judge, and for its evaluation sets once, not for every trial."""
    built, looked_up = [], []
    adapter, identity = config.TypeAdapter, grids.data_identity
    monkeypatch.setattr(config, "TypeAdapter", lambda model: built.append(model) or adapter(model))
    monkeypatch.setattr(grids, "data_identity", lambda *given: looked_up.append(given) or identity(*given))
    config._validator.cache_clear()
    plan = load_plan(root / "config" / "config.yaml", {"items": ["mallowspo/fig10", "own/related_methods"]})
    assert len(built) == len(set(built))
    assert sum(node.stage == "trials" for node in plan.nodes.values()) > len(looked_up) > 0
