"""Declarations: closed, typed, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from prefopt.errors import BadInput
from prefopt.planning.config import item_files, load_config, load_item, load_yaml, parse
from prefopt.planning.schema import schemas
from prefopt.specs import DataSpec, EnsembleSpec, ItemSpec, ModelSpec, TrainSpec

TRAIN = {"steps": 2}
ITEM = {
    "item": {"paper": "own", "name": "x", "title": "t"},
    "data": {"source": {"kind": "world"}},
    "model": {"kind": "scratch"},
    "tokens": {},
    "policy": TRAIN,
    "arms": {"dpo": {"loss": {"name": "dpo", "beta": 0.1}}},
    "evaluate": {},
}


def mistake(model, content):
    with pytest.raises(BadInput) as caught:
        parse(model, content, "f.yaml")
    message = str(caught.value)
    assert message.startswith("f.yaml: ")
    assert "\n" not in message
    return message


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1e-4\nb: 3E+2\nc: .5e1\nd: 1e\n")
    assert load_yaml(tmp_path / "x.yaml") == {"a": 1e-4, "b": 300.0, "c": 5.0, "d": "1e"}


def test_a_key_that_stands_twice_is_an_error_with_its_line(tmp_path):
    (tmp_path / "x.yaml").write_text("beta: 0.1\nname: dpo\nbeta: 0.5\n")
    with pytest.raises(BadInput, match=r"line 3: not YAML \(the key 'beta' stands twice"):
        load_yaml(tmp_path / "x.yaml")


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "x.yaml").write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(BadInput, match="not YAML"):
        load_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("model", "content", "expected"),
    [
        (TrainSpec, {"steps": 1, "learning_rte": 1e-3}, "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        (TrainSpec, {"steps": "10"}, "steps: input should be a valid integer, found '10'"),
        (TrainSpec, {"steps": 1, "optimizer": "adam"}, "optimizer: unknown value 'adam'; did you mean 'adamw'?"),
        (TrainSpec, {}, "give either steps or epochs"),
        (TrainSpec, {"steps": 1, "epochs": 1.0}, "give either steps or epochs"),
        (EnsembleSpec, {"members": 0, "train": TRAIN}, "members: input should be greater than or equal to 1, found 0"),
        (EnsembleSpec, {"members": 2, "seeds": [4, 4], "train": TRAIN}, "seed 4 stands 2 times"),
        (EnsembleSpec, {"members": 3, "longer_wins": [0.2, 0.8], "train": TRAIN}, "2 values in longer_wins for 3"),
        (
            DataSpec,
            {"source": {"kind": "files", "paths": ["a"], "reader": "hhh"}},
            "unknown value 'hhh'; did you mean 'hh'",
        ),
        (DataSpec, {"source": {"kind": "world"}, "splits": {"train": 0.8, "test": 0.1}}, "shares sum to 0.9"),
        (ModelSpec, {"kind": "hub", "repo": "a/b", "revision": "main"}, "revision: string should match pattern"),
        (ModelSpec, {"kind": "scrach"}, "unknown value 'scrach'; did you mean 'scratch'?"),
        (ItemSpec, {**ITEM, "seeds": [1, 2, 1]}, "seeds: seed 1 stands 2 times"),
        (ItemSpec, {**ITEM, "arms": {}}, "arms: dictionary should have at least 1 item"),
        (ItemSpec, {**ITEM, "arms": {"dpo": {"lss": {}}}}, "unknown key 'arms.dpo.lss'; did you mean 'loss'?"),
        (ItemSpec, {k: v for k, v in ITEM.items() if k != "policy"}, "the key 'policy' is missing"),
        (ItemSpec, {**ITEM, "tokens": {"max_prompt_tokens": 64, "max_length": 64}}, "leaves no room in max_length"),
    ],
)
def test_every_mistake_is_one_line_with_key_and_way_out(model, content, expected):
    assert expected in mistake(model, content)


def test_unknown_item_names_the_nearest(root):
    with pytest.raises(BadInput, match="did you mean 'mallowspo/fig10'"):
        item_files(root / "config", ["mallowspo/fig01"])


def test_every_declared_item_is_valid(root):
    files = item_files(root / "config", ["*/*"])
    assert len(files) >= 3
    for path in files:
        item = load_item(path)
        assert path == root / "config" / "experiments" / item.item.paper / f"{item.item.name}.yaml"


def test_overrides_replace_the_file(root):
    config = load_config(root / "config" / "config.yaml", {"items": "own/a, own/b", "results": "elsewhere"})
    assert (config.items, config.results) == (["own/a", "own/b"], "elsewhere")


def test_schemas_are_generated_and_in_step(root):
    for name, text in schemas().items():
        assert (root / "workflow" / "schemas" / name).read_text() == text, f"run: python -m prefopt schema ({name})"


def test_schema_accepts_the_declared_items_and_refuses_a_typo(root):
    import jsonschema

    schema = json.loads(schemas()["item.schema.json"])
    content = yaml.safe_load((root / "config/experiments/mallowspo/fig10.yaml").read_text())
    jsonschema.validate(content, schema)
    content["sedes"] = [0]
    with pytest.raises(jsonschema.ValidationError, match="sedes"):
        jsonschema.validate(content, schema)


def test_planning_imports_no_torch():
    heavy = "{'torch', 'transformers', 'pandas'}"
    code = f"import sys, prefopt.plan, prefopt.cli, prefopt.planning.schema; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
