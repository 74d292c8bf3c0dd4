"""Any YAML becomes a declaration that is valid by its schema, or one line that names the file and the key."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import yaml
from fuzzing import damaged, fuzzed, mutated, outcome, told
from hypothesis import strategies as st
from pydantic import BaseModel

from prefopt.digests import canonical_json
from prefopt.errors import BadInput
from prefopt.plan import load_plan
from prefopt.planning.config import item_files, load_config, load_item, load_yaml, parse
from prefopt.planning.yaml_text import parsed_yaml
from prefopt.specs import (
    Config,
    DataSpec,
    DisagreementItemSpec,
    ExactItemSpec,
    GridItemSpec,
    ItemSpec,
    JudgeSpec,
    ModelSpec,
    VoteWeightItemSpec,
)
from small_project import ROOT

CONFIG = ROOT / "config"
DECLARED = {
    "own/hh_rlhf": ItemSpec,
    "reward_distillation/fig2": GridItemSpec,
    "own/related_methods": GridItemSpec,
    "own/dispersion_vs_humans": DisagreementItemSpec,
    "own/disagreement_as_weight": VoteWeightItemSpec,
    "mallowspo/fig8a": ExactItemSpec,
}
ITEMS = {name: load_yaml(CONFIG / "experiments" / f"{name}.yaml") for name in DECLARED}
ENTRIES = {"datasets": DataSpec, "models": ModelSpec, "judges": JudgeSpec}
PARTS = [(model, ITEMS[name]) for name, model in DECLARED.items()]
PARTS += [(Config, load_yaml(CONFIG / "config.yaml"))]
PARTS += [(model, entry) for file, model in ENTRIES.items() for entry in load_yaml(CONFIG / f"{file}.yaml").values()]


def floats_of(value):
    """All but the parameters of losses and studies, which planning checks against their signatures."""
    if isinstance(value, dict | list):
        for part in [value[key] for key in value if key not in ("loss", "study")] if isinstance(value, dict) else value:
            yield from floats_of(part)
    elif isinstance(value, float):
        yield value


@st.composite
def contents(draw):
    model, content = draw(st.sampled_from(PARTS))
    return model, draw(mutated(content))


@fuzzed(14_000, case=contents())
def test_any_content_is_a_declaration_or_told(case):
    model, content = case
    found = outcome(lambda: parse(model, content, "file.yaml"), "file.yaml")
    if isinstance(found, BaseModel):
        dumped = found.model_dump()
        assert all(map(math.isfinite, floats_of(dumped)))
        assert parse(model, dumped, "again") == found  # what is accepted is of the schema, as it stands


YAML_TEXTS = [(CONFIG / "experiments" / f"{name}.yaml").read_text() for name in DECLARED if "fig2" not in name]
YAML_TEXTS += [(CONFIG / f"{name}.yaml").read_text()[:1500] for name in (*ENTRIES, "config")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The declarations in a folder of their own."""
    folder = tmp_path_factory.mktemp("declared")
    shutil.copytree(CONFIG, folder / "config")
    return folder / "config"


@fuzzed(12_000, content=damaged(st.sampled_from([text.encode() for text in YAML_TEXTS])))
def test_any_bytes_are_yaml_or_told(project, content):
    path = project / "any.yaml"
    path.write_bytes(content)
    found = outcome(lambda: load_yaml(path), str(path))
    if not isinstance(found, BadInput):
        outcome(lambda: load_config(path), str(path))
        item = project / "experiments" / "own" / "any.yaml"
        item.write_bytes(content)
        outcome(lambda: load_item(item), ".yaml")


@st.composite
def items(draw):
    name = draw(st.sampled_from(["own/related_methods", "mallowspo/fig8a", "mallowspo/fig8c"]))
    content = load_yaml(CONFIG / "experiments" / f"{name}.yaml")
    return draw(mutated(content, most=2))


def as_yaml(content) -> bytes:
    text = json.dumps(content).replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
    return text.encode()


@fuzzed(1_500, content=items())
def test_any_item_is_planned_with_ids_or_told(project, content):
    (project / "experiments" / "own" / "drawn.yaml").write_bytes(as_yaml(content))
    plan = outcome(lambda: load_plan(project / "config.yaml", {"items": "own/drawn"}), ".yaml")
    if not isinstance(plan, BadInput):
        assert plan.items
        for node in plan.nodes.values():
            assert node.id.rsplit("-", 1)[-1]
            canonical_json(node.to_json()).encode()


@st.composite
def command_lines(draw):
    known = draw(
        st.sampled_from(["mallowspo/fig8a", "own/*", "mallowspo/**", ".", "..", "/etc/*", "", "***", "[", "a\0b"])
    )
    return draw(st.sampled_from([known, known + draw(st.text(max_size=4)), draw(st.text(max_size=6))]))


@fuzzed(1_000, names=command_lines())
def test_any_pattern_names_items_or_is_told(names):
    found = outcome(lambda: item_files(CONFIG, [names]))
    if not isinstance(found, BadInput):
        assert found
        assert all(path.is_relative_to(CONFIG / "experiments") and path.suffix == ".yaml" for path in found)


# --- explicit examples ------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
TEXTS = {
    "a bomb of aliases": (BOMB, "not YAML .more than 1000000 values, by aliases of aliases"),
    "an alias of itself": ("a: &a [*a]", "not YAML .an alias of what it stands in"),
    "flow nested deeply": ("a: " + "[" * 100_000, "line 1: not YAML .nested more than 100 levels deep"),
    "flow nested deeply and closed": ("[" * 100_000 + "]" * 100_000, "line 1: not YAML .nested more than 100 levels"),
    "blocks nested deeply": ("- " * 100_000 + "a", "line 1: not YAML .nested more than 100 levels deep"),
    "keys nested deeply": ("".join(" " * n + "a:\n" for n in range(500)), "line 101: not YAML .nested more than 100"),
    "a list as key": ("? [a]\n: 1", "line 1: not YAML .a key that is a list or mapping"),
    "a mapping as key": ("? {a: 1}\n: 2", "line 1: not YAML .a key that is a list or mapping"),
    "a day that is none": ("b: 1\na: 2024-99-99", "line 2: not YAML .'2024-99-99' is no timestamp"),
    "a number that is none": ("!!int abc", "line 1: not YAML .'abc' is no int"),
    "an empty number": ('a: !!float ""', "line 1: not YAML .'' is no float"),
    "a truth value that is none": ("!!bool foo", "line 1: not YAML .'foo' is no bool"),
    "a mapping that is a list": ("!!map [a]", "line 1: not YAML"),
    "a number of 5000 digits": ("a: " + "9" * 5000, "line 1: not YAML .'9999"),
    "hexadecimal nothing": ("a: 0x_", "line 1: not YAML .'0x_' is no int"),
    "a program": ("!!python/object/apply:os.system [echo]", "line 1: not YAML .could not determine a constructor"),
    "a merge": ("<<: {a: 1}\nb: 2", "line 1: not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: not YAML .but found another document"),
    "a key twice": ("a: 1\nb:\n  c: 1\n  c: 2", "line 4: not YAML .the key 'c' stands twice"),
    "a NUL byte": ("a: 1\0", "not YAML"),
    "a terminal's control characters": ("a: \x1b[31m", "not YAML"),
    "a lone surrogate": ('a: "\\ud800"', "line 1: not YAML"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_yaml_that_breaks_parsers_is_told(tmp_path, case):
    text, expected = TEXTS[case]
    (tmp_path / "a.yaml").write_text(text)
    told(lambda: load_yaml(tmp_path / "a.yaml"), r"a\.yaml", expected)


@pytest.mark.parametrize("content", ["a: é".encode("latin-1"), "a: 1".encode("utf-16"), b"\xff\xfe"])
def test_wrong_encodings_are_told(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    told(lambda: load_yaml(tmp_path / "a.yaml"), r"a\.yaml: cannot be read \('utf-8' codec")


def test_a_mark_windows_line_ends_and_every_script_are_read(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffa: שלום\r\nb: 👩‍👧\r\n".encode())
    assert load_yaml(tmp_path / "a.yaml") == {"a": "שלום", "b": "👩‍👧"}


def test_a_line_of_10_mb_is_read_and_told_short(tmp_path):
    (tmp_path / "a.yaml").write_text("items: " + "x" * 10_000_000)
    assert isinstance(outcome(lambda: load_config(tmp_path / "a.yaml")), Config)
    (tmp_path / "a.yaml").write_text("items: [a]\nexecution: " + "x" * 10_000_000)
    told(lambda: load_config(tmp_path / "a.yaml"), "execution: ")


def test_aliases_of_small_things_stay_allowed():
    assert parsed_yaml("a: &s {train: 0.8}\nb: *s\nc: [*s, *s]")["c"] == [{"train": 0.8}] * 2


def test_a_folder_in_place_of_a_file(tmp_path):
    told(lambda: load_yaml(tmp_path), "cannot be read")


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(key, value):
    content = json.loads(json.dumps(ITEMS["own/hh_rlhf"]))
    content["policy"][key] = value
    told(lambda: parse(ItemSpec, content, "a.yaml"), rf"a\.yaml: policy\.{key}: ")


def test_a_seed_fits_the_generators():
    told(lambda: parse(ItemSpec, ITEMS["own/hh_rlhf"] | {"seeds": [2**63]}, "a.yaml"), r"seeds\.0: .*less than")


def test_parameters_of_a_study_are_finite(project):
    content = {**ITEMS["mallowspo/fig8a"]}
    content["study"] = {**content["study"], "betas": [math.inf]}
    (project / "experiments" / "own" / "infinite.yaml").write_bytes(as_yaml(content))
    told(lambda: load_plan(project / "config.yaml", {"items": "own/infinite"}), "infinite.yaml: study .*betas")


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../../x", "***", "a\0b", "", "x" * 5000])
def test_a_pattern_that_is_none_is_told(pattern):
    told(lambda: item_files(CONFIG, [pattern]), "no item '")


@pytest.mark.parametrize("entries", ["[a, b]", "word", "7"])
def test_entries_that_are_no_mapping_are_told(tmp_path, entries):
    shutil.copytree(CONFIG, tmp_path / "config")
    (tmp_path / "config" / "models.yaml").write_text(entries)
    item = tmp_path / "config" / "experiments" / "own" / "a.yaml"
    item.write_text(yaml.safe_dump({**ITEMS["own/hh_rlhf"], "model": "some"}))
    told(lambda: load_item(item), r"models\.yaml: .*expected names with their declarations")


def test_a_config_file_without_declarations_beside_it(tmp_path):
    (tmp_path / "config.yaml").write_text("items: [own/x]\n")
    told(lambda: load_plan(tmp_path / "config.yaml"), "no item 'own/x' below")
