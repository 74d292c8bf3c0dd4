"""Bad input ends as one line that names file, place and way out, exit code 2, and nothing under a final name."""

from __future__ import annotations

import json
import shutil

import pytest

from small_project import Project, hh_rows, item

GOOD = json.dumps(hh_rows(1)[0])


def assert_refused(project: Project, run, *expected: str) -> None:
    lines = [line for line in run.stderr.strip().splitlines() if line.startswith("prefopt ")]
    assert run.returncode == 2, run.stderr
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    for part in expected:
        assert part in lines[0]
    results = project.folder / "results"
    assert [p for p in results.rglob("*") if p.is_file() and p.relative_to(results).parts[0] != "specs"] == []


def prepare(project: Project, text: str):
    (project.folder / "pairs.jsonl").write_text(text)
    assert project.snakemake("-n").returncode == 0  # planning hashes the file, it does not read it
    return project.prefopt("prepare-pairs", "--spec", project.spec("pairs"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "\n{not json\n", ["pairs.jsonl", "2", "JSON"]),
        (GOOD + '\n{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}\n', ["pairs.jsonl", "2", "rejected"]),
        (GOOD + '\n{"chosen": 7, "rejected": "x"}\n', ["pairs.jsonl", "2", "chosen", "int"]),
        (GOOD + "\n[1, 2]\n", ["pairs.jsonl", "2"]),
        ("", ["pairs.jsonl"]),
    ],
    ids=["not JSON", "no rejected", "no text", "no object", "empty file"],
)
def test_unusable_rows_name_file_and_line(project, text, expected):
    assert_refused(project, prepare(project, text), *expected)


def test_missing_file(project):
    (project.folder / "pairs.jsonl").unlink()
    assert_refused(project, project.prefopt("plan"), "pairs.jsonl: no such file", "data_root")


def test_a_file_that_vanishes_after_planning(project):
    project.snakemake("-n", check=True)
    (project.folder / "pairs.jsonl").unlink()
    assert_refused(project, project.prefopt("prepare-pairs", "--spec", project.spec("pairs")), "pairs.jsonl")


def test_a_file_that_changes_after_planning(project):
    project.snakemake("-n", check=True)
    (project.folder / "pairs.jsonl").write_text(GOOD + "\n")
    run = project.prefopt("prepare-pairs", "--spec", project.spec("pairs"))
    assert_refused(project, run, "pairs.jsonl", "sha256")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": {"source": {"kind": "files", "reader": "hhh", "paths": ["pairs.jsonl"]}}}, "did you mean 'hh'"),
        ({"rewards": {"single": {"members": 0, "train": {"steps": 1}}}}, "rewards.single.members"),
        ({"seeds": [3, 3]}, "seed 3 stands 2 times"),
        ({"arms": {"a": {"loss": {"name": "mallows_theta", "betta": 0.1}}}}, "did you mean 'beta'"),
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": {"kind": "local", "path": "no/such/model"}}, "no/such/model: no config.json"),
    ],
    ids=["reader", "K = 0", "seeds", "loss parameter", "key", "model folder"],
)
def test_wrong_declarations_name_file_and_key(project, change, expected):
    project.declare(item(**change))
    for run in (project.prefopt("plan"), project.snakemake("-n")):
        assert_refused(project, run, "config/experiments/own/tiny.yaml", expected)


def finish_up_to(project: Project, *stages: str) -> None:
    manifests = [project.artifact(stage).relative_to(project.folder) / "manifest.json" for stage in stages]
    project.snakemake(*manifests, check=True)


def failed(project: Project, verb: str, stage: str, *expected: str) -> None:
    """The job fails in one line and leaves no artifact."""
    run = project.prefopt(verb, "--spec", project.spec(stage))
    assert run.returncode == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    for part in expected:
        assert part in last
    assert "Traceback" not in run.stderr
    assert not project.artifact(stage).exists()


def test_a_prompt_longer_than_allowed(project):
    project.declare(item(tokens={"max_prompt_tokens": 20, "max_length": 60}))
    project.snakemake("-n", check=True)
    finish_up_to(project, "pairs", "base")
    failed(project, "tokenize", "tokens", "pairs.jsonl", "20", "refuse")


def test_more_positions_than_the_model_has(finished, project):
    """A model from scratch is checked when planning, a folder's own limit when its config is read."""
    tokens = {"max_prompt_tokens": 110, "max_length": 400}
    project.declare(item(tokens=tokens))
    assert_refused(project, project.prefopt("plan"), "up to 400 tokens", "max_positions 160")
    local_model(finished, project, "model")
    project.declare(item(tokens=tokens, model={"kind": "local", "path": "model"}))
    project.snakemake("-n", check=True)
    finish_up_to(project, "pairs", "base")
    failed(project, "tokenize", "tokens", "400", "160")


def local_model(finished: Project, project: Project, role: str) -> None:
    shutil.copytree(finished.artifact("sft") / "weights", project.folder / role)


def test_a_model_folder_without_tokenizer(finished, project):
    local_model(finished, project, "model")
    for path in (project.folder / "model").glob("tokenizer*"):
        path.unlink()
    project.declare(item(model={"kind": "local", "path": "model"}))
    assert_refused(project, project.prefopt("plan"), "model: model folder without tokenizer")


def test_a_vocabulary_that_is_not_the_references(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    weights = clone.artifact("sft") / "weights" / "tokenizer.json"
    content = json.loads(weights.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    size = weights.stat().st_size
    weights.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    assert weights.stat().st_size == size  # another size would be noticed as damage before anything is read
    shutil.rmtree(clone.artifact("policy"))
    failed(clone, "train-policy", "policy", "policy and reference tokenizers differ", "first at id 20")


def test_an_unknown_verb_or_missing_spec(project):
    assert project.prefopt("trian-policy").returncode == 2
    assert_refused(project, project.prefopt("train-policy", "--spec", "gone.json"), "gone.json: no such file")


def test_a_stage_refuses_the_spec_of_another(project):
    project.snakemake("-n", check=True)
    run = project.prefopt("judge", "--spec", project.spec("pairs"))
    assert run.returncode == 3
    assert "a spec of 'pairs', which 'judge' does not make" in run.stderr
