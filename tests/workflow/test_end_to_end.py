"""The whole chain on a small project: run, run again, restore, change one thing, damage one thing."""

from __future__ import annotations

import json
import math
import shutil

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file

from small_project import hh_rows, item


def test_everything_is_made_and_verifies(finished):
    plan = finished.prefopt("plan", check=True).stdout
    assert plan.splitlines()[-1].endswith(" 0 to make")
    assert "artifacts are what their manifests say" in finished.prefopt("verify", check=True).stdout
    assert not any((finished.folder / "results" / ".scratch").rglob("*.*"))


def test_a_second_run_has_nothing_to_do(finished):
    assert finished.planned_jobs() == {}
    assert "Nothing to be done" in finished.snakemake("-n").stdout


def test_the_item_has_all_arms_with_intervals(finished):
    content = json.loads((finished.artifact("papers/own") / "item.json").read_text())
    assert list(content["arms"]) == ["dpo", "mallows_theta", "distill", "e_dpo"]
    for arm in content["arms"].values():
        win_rate = arm["summary"]["win_rate"]
        assert 0 <= win_rate["low"] <= win_rate["mean"] <= win_rate["high"] <= 100


def test_every_job_left_a_log_and_a_benchmark(finished):
    """Members of an ensemble are scored in one job, whose log has the name of the first."""
    results = finished.folder / "results"
    specs = sorted((results / "specs").rglob("*.json"))
    first = next(spec for spec in specs if spec.parent.name == "rewards" and spec.name.startswith("train-s0"))
    for spec in [spec for spec in specs if spec.parent.name != "rewards"] + [first]:
        tail = spec.relative_to(results / "specs").with_suffix("")
        assert (results / "logs" / tail).with_name(f"{tail.name}.log").is_file()
        assert (results / "benchmarks" / tail).with_name(f"{tail.name}.tsv").is_file()


def test_report_and_tracking_are_there(finished):
    results = finished.folder / "results"
    html = (results / "report.html").read_text()
    assert "Tiny dialogues" in html
    assert "mallows_theta" in html
    published = json.loads((results / "published.json").read_text())
    # sft; one reward model on all pairs, three on subsets, one judge; four policies; the item
    assert len(published["published"]) == 1 + (1 + 3 + 1) + 4 + 1
    assert (results / "mlflow.db").stat().st_size > 0


def test_evaluation_files_are_alpaca_evals(finished):
    outputs = json.loads((finished.artifact("generations", "dpo") / "outputs.json").read_text())
    assert {"instruction", "output", "generator"} <= set(outputs[0])
    assert len({record["generator"] for record in outputs}) == 1
    annotations = json.loads((finished.artifact("judgements", "dpo") / "annotations.json").read_text())
    fields = {"instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator", "preference"}
    assert fields <= set(annotations[0])
    assert all(1 <= record["preference"] <= 2 for record in annotations)


def test_win_rate_is_the_mean_of_the_judgements_over_both_orders(finished):
    table = pd.read_parquet(finished.artifact("judgements", "dpo") / "judgements.parquet")
    expected = 100 * ((table["baseline_first"] + table["model_first"]) / 2 - 1).mean()
    metrics = json.loads((finished.artifact("metrics", "dpo") / "metrics.json").read_text())
    assert metrics["win_rate"] == pytest.approx(expected, abs=1e-9)
    assert metrics["n_missing"] == 0


def test_dispersion_weights_have_mean_one_on_train(finished):
    table = pd.read_parquet(finished.artifact("dispersion") / "dispersion.parquet")
    assert table.loc[table["split"] == "train", "dispersion_weight"].mean() == pytest.approx(1.0, abs=1e-12)
    calibration = json.loads((finished.artifact("dispersion") / "calibration.json").read_text())
    assert calibration["calibrated_on"] == (table["split"] == "train").sum()


def test_ensemble_members_differ_and_stay_apart(finished):
    table = pd.read_parquet(finished.artifact("ensemble", "seeds-k3") / "scores.parquet")
    margins = [
        chosen - rejected for chosen, rejected in zip(table["chosen_reward"], table["rejected_reward"], strict=True)
    ]
    spread = pd.DataFrame(margins)
    assert spread.shape[1] == 3
    assert (spread.std(axis=1) > 0).all()


def test_the_judge_saw_none_of_the_learners_pairs(finished):
    tokens = pd.read_parquet(finished.artifact("tokens") / "tokens.parquet")
    prompts = tokens.groupby("split")["prompt_id"].agg(set)
    assert not prompts["judge"] & prompts["train"]
    assert not prompts["test"] & (prompts["train"] | prompts["judge"])


def test_policies_start_at_the_reference_and_move(finished):
    manifest = json.loads((finished.artifact("policy", "dpo") / "manifest.json").read_text())
    assert manifest["summary"]["step_zero_margin_gap"] < 1e-4
    before = load_file(finished.artifact("sft") / "weights" / "model.safetensors")
    after = load_file(finished.artifact("policy", "dpo") / "weights" / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)


def test_after_clone_and_pull_nothing_runs(finished, tmp_path):
    assert finished.copy(tmp_path / "clone").planned_jobs() == {}


def test_one_changed_beta_runs_one_branch(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    arms = {**item()["arms"], "dpo": {"loss": {"name": "dpo", "beta": 0.2}}}
    clone.declare(item(arms=arms))
    once = dict.fromkeys(["train_policy", "generate", "judge", "win_rate", "paper_item", "publish", "report"], 1)
    assert clone.planned_jobs() == once


def test_a_changed_title_trains_nothing(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    clone.declare(item(item={**item()["item"], "title": "Another title"}))
    assert clone.planned_jobs() == {"paper_item": 1, "publish": 1, "report": 1}


def test_execution_settings_run_nothing(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    config = {"items": ["*/*"], "execution": {"micro_batch": 3, "threads": 2, "checkpoint_steps": 7}}
    (clone.folder / "config" / "config.yaml").write_text(json.dumps(config))
    assert clone.planned_jobs() == {}


def test_a_changed_data_file_runs_everything_that_reads_it(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    rows = hh_rows(81)
    (clone.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert clone.planned_jobs()["prepare_pairs"] == 1
    assert clone.planned_jobs()["train_policy"] == 4


def test_a_hand_edited_artifact_is_found_and_named(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    path = clone.artifact("metrics", "dpo") / "metrics.json"
    path.write_text(path.read_text().replace('"n_missing": 0', '"n_missing": 1'))
    run = clone.prefopt("verify")
    assert run.returncode == 3
    assert f"{path.relative_to(clone.folder)}: content is not what the manifest recorded" in run.stdout


def test_publishing_again_changes_nothing(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    manifest = clone.artifact("papers/own") / "manifest.json"
    again = clone.prefopt("publish", "--out", "results/again.json", manifest, check=True).stdout
    assert "0 runs imported" in again


def test_an_arm_added_later_shares_everything_else(finished, tmp_path):
    clone = finished.copy(tmp_path / "clone")
    arms = {**item()["arms"], "ipo": {"loss": {"name": "ipo", "beta": 0.1}}}
    clone.declare(item(arms=arms))
    jobs = clone.planned_jobs()
    assert (jobs["train_policy"], jobs["generate"], jobs.get("train_reward", 0)) == (1, 1, 0)


def test_dispersion_from_sampled_sequences(finished, tmp_path):
    """The mc_sequence estimate reads samples of every prompt; its weights are another artifact's, with mean 1 too."""
    clone = finished.copy(tmp_path / "clone")
    sampled = {"norm": "mc_sequence", "samples": 2}
    arms = {"theta": {"loss": {"name": "mallows_theta", "beta": 0.1}, "dispersion": sampled}}
    clone.declare(item(arms=arms))
    clone.snakemake("-n", check=True)
    before = set((clone.folder / "results" / "dispersion").iterdir())
    (new,) = {p.stem for p in (clone.folder / "results" / "specs" / "dispersion").iterdir()} - {p.name for p in before}
    clone.snakemake(f"results/dispersion/{new}/manifest.json", check=True)
    table = pd.read_parquet(clone.folder / "results" / "dispersion" / new / "dispersion.parquet")
    assert table.loc[table["split"] == "train", "dispersion_weight"].mean() == pytest.approx(1.0, abs=1e-12)
    tokens = pd.read_parquet(clone.artifact("tokens") / "tokens.parquet")
    (samples,) = (clone.folder / "results" / "samples").glob("*all*")
    drawn = pd.read_parquet(samples / "samples.parquet")
    assert drawn["prompt_id"].value_counts().to_dict() == dict.fromkeys(tokens["prompt_id"], 2)
    entropy = -drawn["ref_logp"].groupby(drawn["prompt_id"]).sum() / drawn["tokens"].groupby(drawn["prompt_id"]).sum()
    row = table.iloc[0]
    prompt = tokens.set_index("pair_id").loc[row["pair_id"], "prompt_id"]
    vocabulary = json.loads((clone.artifact("reference") / "reference.json").read_text())["vocab_size"]
    assert row["normalised_entropy"] == pytest.approx(entropy[prompt] / math.log(vocabulary))


def test_a_local_model_folder_is_its_own_reference(finished, tmp_path):
    """With ``kind: local`` and no SFT the folder is used as it is, found by its content, and not copied."""
    clone = finished.copy(tmp_path / "clone")
    shutil.copytree(finished.artifact("sft") / "weights", clone.folder / "my-model")
    content = item(model={"kind": "local", "path": "my-model"}, arms={"dpo": item()["arms"]["dpo"]})
    del content["sft"]
    clone.declare(content)
    clone.snakemake("-n", check=True)
    (base,) = (clone.folder / "results" / "specs" / "base").glob("my-model-*.json")
    policies = {p.stem for p in (clone.folder / "results" / "specs" / "policy").glob("dpo-*.json")}
    (new,) = policies - {p.name for p in (clone.folder / "results" / "policy").iterdir()}
    clone.snakemake(f"results/policy/{new}/manifest.json", check=True)
    assert sorted(p.name for p in (clone.folder / "results" / "base" / base.stem).iterdir()) == [
        "manifest.json",
        "source.json",
    ]
    manifest = json.loads((clone.folder / "results" / "policy" / new / "manifest.json").read_text())
    assert manifest["parents"]["model"] == f"base/{base.stem}"
    assert manifest["summary"]["step_zero_margin_gap"] < 1e-4


def test_the_notebook_is_kept_without_outputs_and_runs_over_these_results(finished, root, monkeypatch):
    notebook = nbformat.read(root / "docs" / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    monkeypatch.setenv("PREFOPT_RESULTS", str(finished.folder / "results"))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(root / "docs"))
    shown = {number: output.data for number, cell in enumerate(code) for output in cell.outputs if "data" in output}
    assert len(shown) == len(code) - 1  # all but the imports show something
    assert "Tiny dialogues" in shown[1]["text/plain"]
    assert all(stage in shown[2]["text/html"] for stage in ("pairs", "reference", "policy", "metrics"))
    assert "log_ratio" in shown[6]["text/html"]
    assert "dpo/reward_advantage" in shown[7]["text/html"]
    assert list(shown[8]) == ["text/plain", "image/png"]
