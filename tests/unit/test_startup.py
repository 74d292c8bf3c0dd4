"""What starting up imports: modules are counted, not seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefopt.plan import load_plan
from prefopt.planning import config

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
    assert not set(done.stdout.split()) & (HEAVY | {"pydantic", "yaml"})


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
