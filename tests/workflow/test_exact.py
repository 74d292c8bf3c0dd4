"""An exact item from its declaration to the report, in a project without data and models."""

from __future__ import annotations

import csv
import json

import pytest

from small_project import Project, new_project

ITEM = {
    "item": {"paper": "own", "name": "small_exact", "title": "A small exact item", "scale": "exact"},
    "study": {"name": "pessimistic_policy", "draws": 3},
    "expect": [
        {"claim": "the hull's value", "value": "hull_value", "reported": 0.272, "tolerance": 0.001, "source": "ours"},
        {"claim": "better than staying", "value": "hull_value", "above": "reference_value", "source": "ours"},
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Project:
    project = declared(new_project(tmp_path_factory.mktemp("exact") / "project"), ITEM)
    project.snakemake(check=True)
    return project


def declared(project: Project, content: dict) -> Project:
    project.declare(content)
    (project.folder / "config" / "config.yaml").write_text(json.dumps({"items": ["own/small_exact"]}))
    return project


def test_the_item_its_study_and_the_report_are_there(made):
    study = made.artifact("studies", "pessimistic-policy")
    values = json.loads((study / "values.json").read_text())
    item = json.loads((made.artifact("papers/own") / "item.json").read_text())
    assert item["verdict"] == "reproduced"
    assert [row["value"] for row in item["expect"]] == [values["hull_value"]] * 2
    assert item["study"]["artifact"] == f"studies/{study.name}"
    assert item["study"]["params"]["draws"] == 3
    with (study / "tables" / "random.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 3
    (figure,) = (study / "figures").glob("*.svg")
    assert (made.artifact("papers/own") / "figure.svg").read_text() == figure.read_text()
    with (made.artifact("papers/own") / "table.csv").open() as stream:
        assert [row["verdict"] for row in csv.DictReader(stream)] == ["reproduced"] * 2
    assert "A small exact item" in (made.folder / "results" / "report.html").read_text()
    assert json.loads((made.folder / "results" / "published.json").read_text())["published"] == [
        f"papers/own/{made.artifact('papers/own').name}"
    ]


def test_nothing_else_is_planned_and_nothing_runs_twice(made):
    assert made.planned_jobs() == {}
    assert "2 artifacts are what their manifests say" in made.prefopt("verify", check=True).stdout


def test_claims_do_not_run_the_study_again_and_parameters_do(made, tmp_path):
    clone = made.copy(tmp_path / "clone")
    declared(clone, {**ITEM, "expect": ITEM["expect"][:1]})
    assert clone.planned_jobs() == {"paper_item": 1, "publish": 1, "report": 1}
    declared(clone, {**ITEM, "study": {"name": "pessimistic_policy", "draws": 4}})
    assert clone.planned_jobs() == {"run_study": 1, "paper_item": 1, "publish": 1, "report": 1}


def test_the_rule_exact_makes_exact_items_only(made, tmp_path):
    clone = made.copy(tmp_path / "clone")
    (clone.folder / "config" / "config.yaml").write_text(json.dumps({"items": ["*/*"]}))
    assert "Nothing to be done" in clone.snakemake("-n", "exact", check=True).stdout


def test_a_claim_about_an_unknown_value_fails_in_one_line(made, tmp_path):
    clone = made.copy(tmp_path / "clone")
    declared(clone, {**ITEM, "expect": [{**ITEM["expect"][0], "value": "hul_value"}]})
    clone.snakemake("-n", check=True)
    specs = (clone.folder / "results" / "specs" / "papers" / "own").glob("*.json")
    (spec,) = (path for path in specs if "hul_value" in path.read_text())
    run = clone.prefopt("paper-item", "--spec", spec)
    assert run.returncode == 2
    assert (
        run.stderr.strip().splitlines()[-1].endswith("the study has no value 'hul_value'; did you mean 'hull_value'?")
    )


def test_a_wrong_parameter_stops_the_plan_in_one_line(made, tmp_path):
    clone = made.copy(tmp_path / "clone")
    declared(clone, {**ITEM, "study": {"name": "pessimistic_policy", "drawz": 4}})
    run = clone.snakemake("-n")
    assert run.returncode == 2
    assert "unknown key 'drawz'; did you mean 'draws'" in run.stderr
    assert "Traceback" not in run.stderr
