"""Prompts of a file, answers of a file to judge against, several draws: through the real rules."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

import forked_commands
from prefopt.evaluation.items import two_way_interval
from small_project import DETAILS, ROOT, THINGS, Project, item

COUNT = 16


def asked() -> list[dict[str, str]]:
    places = [(thing, detail) for detail in DETAILS for thing in THINGS][:COUNT]
    return [
        {
            "instruction": f"Tell me about the {detail} {thing}.",
            "output": f"The {thing} is {detail}" + (" and old." if number % 2 else "."),
            "generator": "someone",
            "dataset": "places",
        }
        for number, (thing, detail) in enumerate(places)
    ]


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory) -> Project:
    """The finished project with its policy asked about places, twice, against somebody's answers."""
    clone = finished.copy(tmp_path_factory.mktemp("asked") / "clone")
    (clone.folder / "asked.json").write_text(json.dumps(asked()))
    evaluate = {
        **item()["evaluate"],
        "prompts": None,
        "prompt_set": {"kind": "file", "path": "asked.json"},
        "draws": 2,
        "against": "outputs",
        "length_control": {},
    }
    clone.declare(item(arms={"dpo": item()["arms"]["dpo"]}, evaluate=evaluate))
    jobs = clone.planned_jobs()
    expected = {"prepare_prompts": 2, "generate": 2, "judge": 2, "win_rate": 2}
    assert jobs == expected | {"paper_item": 1, "publish": 1, "report": 1}, "nothing is trained again"
    (paper,) = made(clone, "papers/own", '"outputs"')
    clone.snakemake(f"results/papers/own/{paper.name}/manifest.json", check=True)
    return clone


def made(project: Project, stage: str, mark: str) -> list:
    """Artifacts of a stage whose spec or parents say the mark, in the order of their names."""
    specs = sorted((project.folder / "results" / "specs" / stage).glob("*.json"))
    return [project.folder / "results" / stage / spec.stem for spec in specs if mark in spec.read_text()]


def test_every_prompt_is_answered_twice_in_alpaca_evals_form(evaluated):
    answers = [json.loads((f / "outputs.json").read_text()) for f in made(evaluated, "generations", "prompts/")]
    assert len(answers) == 2
    for records in answers:
        assert {r["instruction"]: r["index"] for r in records} == {r["instruction"]: n for n, r in enumerate(asked())}
        assert {record["dataset"] for record in records} == {"places"}
    assert [r["output"] for r in answers[0]] != [r["output"] for r in answers[1]]


def test_the_policy_read_every_template_once(evaluated):
    tokenizer = json.loads((evaluated.artifact("tokens") / "tokenizer" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for folder in made(evaluated, "generations", ""):
        table = pd.read_parquet(folder / "responses.parquet")
        for prompt in table["prompt_ids"]:
            assert list(prompt).count(ids["<s>"]) == 1
            assert list(prompt)[-1] == ids["<|assistant|>"]
    (prompts,) = (f for f in made(evaluated, "prompts", "asked.json") if not (f / "outputs.json").exists())
    of_prompts = json.loads((prompts / "manifest.json").read_text())["summary"]
    of_pairs = json.loads((evaluated.artifact("tokens") / "manifest.json").read_text())["summary"]
    assert of_prompts["prompts_by_style"] == {"chat": COUNT}
    assert of_prompts["chat_template_sha256"] == of_pairs["chat_template_sha256"]


def test_the_opponent_is_the_files_and_length_control_reads_its_lengths(evaluated):
    theirs = {row["instruction"]: row["output"] for row in asked()}
    for folder in made(evaluated, "judgements", "prompts/"):
        annotations = json.loads((folder / "annotations.json").read_text())
        assert {row["generator_1"] for row in annotations} == {"someone"}
        assert {row["instruction"]: row["output_1"] for row in annotations} == theirs
    for folder in made(evaluated, "metrics", "length_control"):
        metrics = json.loads((folder / "metrics.json").read_text())
        values = pd.read_parquet(folder / "prompts.parquet")["length_controlled"]
        assert metrics["variant"] == "length_controlled_minimal"
        assert values.mean() == pytest.approx(metrics["length_controlled_win_rate"], abs=1e-8)


def test_the_item_averages_over_draws_with_draws_as_a_factor(evaluated):
    (paper,) = made(evaluated, "papers/own", '"outputs"')
    summary = json.loads((paper / "item.json").read_text())["arms"]["dpo"]["summary"]["win_rate"]
    tables = [
        pd.read_parquet(folder / "prompts.parquet").set_index("prompt_id")["outcome"].sort_index()
        for folder in made(evaluated, "metrics", "length_control")
    ]
    low, high = two_way_interval(100 * np.array(tables))
    assert (summary["n_seeds"], summary["n_prompts"]) == (2, COUNT)
    assert summary["mean"] == pytest.approx(100 * np.mean(tables))
    assert sorted((summary["low"], summary["high"])) == pytest.approx(sorted((low, high)), abs=2)


def test_the_paper_tier_dry_runs(tmp_path):
    """All rules of all paper items, without a network; empty rows stand in for what a user brings."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for name in ("imdb_prefix20/train", "imdb_prefix20/test", "tldr/comparisons"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text("{}\n")
    (tmp_path / "alpaca_eval").mkdir()
    for name in ("instruction_difficulty", "df_gamed"):
        (tmp_path / "alpaca_eval" / f"{name}.csv").write_text("preference\n")
    words = ["snakemake", "-n", "-s", str(ROOT / "Snakefile"), "--config"]
    words.append("items=mallowspo/paper/*,reward_distillation/paper/*")
    run = forked_commands.run(words, tmp_path, Project(tmp_path).environment())
    assert run.returncode == 0, run.stdout + run.stderr
    for rule, count in (("paper_item", 10), ("relabel_pairs", 7), ("train_policy", 22), ("prepare_prompts", 5)):
        assert int(run.stdout.split(f"\n{rule} ")[1].split()[0]) >= count
