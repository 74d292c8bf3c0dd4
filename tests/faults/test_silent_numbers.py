"""Numbers that would spoil a result without a word: each stops the run, or is told in the log, manifest and report."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import finished_results
from artifact_builds import run_stage, save_table
from prefopt.artifacts import Node
from prefopt.cli import main
from prefopt.digests import file_sha256
from prefopt.errors import EXIT_FAILED_CHECK, FailedCheck
from prefopt.files import read_json, write_json
from prefopt.models import load_causal_lm, load_tokenizer, save_model
from prefopt.report import collect_report
from prefopt.reporting.report_page import render_report
from prefopt.specs import DispersionSpec, TrainSpec
from prefopt.stages.weights import WEIGHTS
from prefopt.tables import read_table, write_table
from prefopt.training.objectives import rows_of_stream
from test_trial import BATCH, DPO, STEPS, TRAIN, Project

MICRO = 4
IPO = {"name": "ipo", "params": {"beta": 0.2}}


def command(project: Project, verb: str, node: Node, *words: str) -> int:
    spec = project.results / "specs" / f"{node.ref}.json"
    write_json(spec, node.to_json())
    return main([verb, "--spec", str(spec), "--device", "cpu", "--micro-batch", str(MICRO), *words])


def policy_node(project: Project, loss: dict = DPO, **parents: Node) -> Node:
    sources = {"tokens": project.tokens, "model": project.model, "reference": project.reference} | parents
    spec = {"loss": loss, "regulariser": None, "train": TRAIN, "seed": 1}
    return Node("policy", 1, "policy", spec, {role: parent.ref for role, parent in sources.items()})


def train_rows(project: Project) -> pd.DataFrame:
    return read_table(project.folder(project.tokens) / "tokens.parquet", None, "train").reset_index(drop=True)


def put(project: Project, node: Node, name: str, table: pd.DataFrame) -> None:
    """Another content of a table of an artifact, as if its stage had written that."""
    folder = project.folder(node)
    write_table(folder / name, table)
    manifest = read_json(folder / "manifest.json")
    recorded = {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    write_json(folder / "manifest.json", manifest | {"outputs": manifest["outputs"] | {name: recorded}})


def last_line(capsys) -> str:
    """What the command said at the end; it was one line, without a traceback."""
    told = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in told)
    return told[-1]


# --- losses, gradients, weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [(DPO, math.nan, "nan"), (IPO, 1e30, "inf")], ids=["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_the_next_run_goes_on_to_the_same_weights(
    own_world, capsys, caplog, case
):
    loss, value, seen = case
    rows, node = train_rows(own_world), policy_node(own_world, loss)
    steps = [rows_of_stream(len(rows), 1, step * BATCH, BATCH) for step in range(STEPS)]
    looked_at = set(np.linspace(0, len(rows) - 1, MICRO, dtype=int).tolist())  # before the first step
    before = {row for step in steps[:4] for row in step}
    bad = next(row for row in steps[4] if row not in looked_at | before)
    sound = read_table(own_world.folder(own_world.reference) / "scores.parquet")
    pair_id = rows["pair_id"][bad]
    poisoned = sound.assign(chosen_logp=sound["chosen_logp"].where(sound["pair_id"] != pair_id, value))
    put(own_world, own_world.reference, "scores.parquet", poisoned)

    words = ("--checkpoint-steps", "2")
    assert command(own_world, "train-policy", node, *words) == EXIT_FAILED_CHECK
    said = last_line(capsys)
    assert said.startswith(f"prefopt train-policy: step 5 of {STEPS}: loss is {seen}, on pairs {pair_id}; no weights")
    assert not own_world.folder(node).exists()
    scratch = own_world.results / ".scratch" / node.ref / "checkpoints"
    assert [file.name for file in sorted(scratch.iterdir())] == ["step-000000002.pt", "step-000000004.pt"]

    put(own_world, own_world.reference, "scores.parquet", sound)
    undisturbed = own_world.results.parent / "undisturbed"
    shutil.copytree(own_world.results, undisturbed, ignore=shutil.ignore_patterns(".scratch"))
    with caplog.at_level("INFO"):
        assert command(own_world, "train-policy", node, *words) == 0
    assert f"going on from step 4 of {STEPS}" in caplog.text
    whole = read_json(own_world.folder(node) / "manifest.json")
    own_world.results = undisturbed
    assert command(own_world, "train-policy", node, *words) == 0
    assert read_json(own_world.folder(node) / "manifest.json")["outputs"] == whole["outputs"]


@pytest.mark.parametrize(("verb", "stage"), [("train-sft", "sft"), ("train-reward", "reward")])
def test_every_training_stage_names_pairs_by_their_ids(own_world, capsys, verb, stage):
    """Weights of about 1e30 after the first step; the second loss or its gradient is not finite."""
    train = TrainSpec(steps=3, batch_size=8, learning_rate=1e30).model_dump()
    spec = {"sft": {"train": train, "seed": 0}}.get(
        stage,
        {
            "train": train,
            "seeds": {"init": 0, "order": 0, "subset": 0},
            "split": "train",
            "longer_wins": None,
            "subset": 1.0,
        },
    )
    parents = {"tokens": own_world.tokens, "base" if stage == "sft" else "model": own_world.base}
    node = Node(stage, 1, stage, spec, {role: parent.ref for role, parent in parents.items()})
    assert command(own_world, verb, node) == EXIT_FAILED_CHECK
    said = last_line(capsys)
    assert "step 2 of 3: " in said
    assert " is nan, on pairs " in said
    named = said.split("on pairs ")[1].split(";")[0].split(", ")
    rows = train_rows(own_world)
    second = rows_of_stream(len(rows), 0, 8, 8)
    assert set(named) <= {str(rows["pair_id"][row]) for row in second}


def test_weights_that_overflow_are_neither_kept_nor_saved(own_world, capsys):
    """A rate above the largest float32: the first step's loss is fine, its weights are not."""
    train = TrainSpec(steps=3, batch_size=8, learning_rate=1e39).model_dump()
    parents = {"tokens": own_world.tokens, "base": own_world.base}
    node = Node("sft", 1, "sft", {"train": train, "seed": 0}, {role: parent.ref for role, parent in parents.items()})
    assert command(own_world, "train-sft", node, "--checkpoint-steps", "1") == EXIT_FAILED_CHECK
    assert "step 1: weights of " in last_line(capsys)
    scratch = own_world.results / ".scratch" / node.ref
    assert list(scratch.rglob("*.pt")) == []


# --- the reference --------------------------------------------------------------------------------------------------


def test_scores_of_another_model_stop_a_policy_before_its_first_step(own_world, capsys):
    other = own_world.make(
        "score-reference", {"precision": "fp32"}, {"tokens": own_world.tokens, "model": own_world.base}
    )
    node = policy_node(own_world, reference=other)
    assert command(own_world, "train-policy", node) == EXIT_FAILED_CHECK
    said = last_line(capsys)
    assert "before the first step (band 0.001); the reference scores are not those of the model" in said
    named = int(said.split("pair_id ")[1].split(":")[0])
    assert named in set(train_rows(own_world)["pair_id"])
    assert not own_world.folder(node).exists()


def test_the_last_pairs_scores_are_looked_at_too(own_world, capsys):
    rows = train_rows(own_world)
    scores = read_table(own_world.folder(own_world.reference) / "scores.parquet")
    last = scores["pair_id"] == rows["pair_id"].iloc[-1]
    put(own_world, own_world.reference, "scores.parquet", scores.assign(chosen_logp=scores["chosen_logp"] + 7 * last))
    assert command(own_world, "train-policy", policy_node(own_world)) == EXIT_FAILED_CHECK
    assert f"pair_id {rows['pair_id'].iloc[-1]}: policy and reference margins differ by 7 nats" in last_line(capsys)


def test_the_gap_and_its_band_are_in_the_manifest(own_world):
    node = policy_node(own_world)
    assert command(own_world, "train-policy", node) == 0
    summary = read_json(own_world.folder(node) / "manifest.json")["summary"]
    assert summary["step_zero_margin_gap"] < summary["step_zero_margin_band"] == 1e-3


def test_a_reference_with_broken_weights_scores_no_pair(own_world, capsys):
    sound = own_world.folder(own_world.model) / WEIGHTS
    model = load_causal_lm(sound, device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    broken = own_world.write("sft", "broken", lambda work: save_model(model, load_tokenizer(sound), work / WEIGHTS))
    parents = {"tokens": own_world.tokens.ref, "model": broken.ref}
    node = Node("reference", 1, "reference", {"precision": "fp32"}, parents)
    assert command(own_world, "score-reference", node) == EXIT_FAILED_CHECK
    first = read_table(own_world.folder(own_world.tokens) / "tokens.parquet")["pair_id"].iloc[0]
    assert f"pair_id {first}: chosen_logp of the reference is nan" in last_line(capsys)
    assert not own_world.folder(node).exists()


# --- reward models and dispersion -----------------------------------------------------------------------------------


def test_a_reward_model_below_chance_is_told_in_log_and_manifest(own_world, caplog):
    """Held-out labels turned round: accuracies add up to one, so one of the two is below a half."""
    train = TrainSpec(steps=6, batch_size=16, learning_rate=3e-3).model_dump()
    seeds = {"init": 0, "order": 0, "subset": 0}
    spec = {"train": train, "seeds": seeds, "split": "train", "longer_wins": None, "subset": 1.0}
    parents = {"tokens": own_world.tokens.ref, "model": own_world.model.ref}
    found = []
    for name in ("as-labelled", "turned"):
        node = Node("reward", 1, name, spec, parents)
        assert command(own_world, "train-reward", node) == 0
        summary = read_json(own_world.folder(node) / "manifest.json")["summary"]
        accuracy = summary["held_out_accuracy"]
        expected = [f"the reward model is right on {accuracy:.1%} of the held-out pairs, less than chance"]
        assert summary.get("warnings", []) == (expected if accuracy < 0.5 else [])
        assert (expected[0] in caplog.messages) == (accuracy < 0.5)
        caplog.clear()
        found.append(accuracy)
        shutil.move(own_world.folder(node), own_world.results / f"kept-{name}")
        table = read_table(own_world.folder(own_world.tokens) / "tokens.parquet")
        test = table["split"] == "test"
        for what in ("ids", "tokens"):
            sides = table[f"chosen_{what}"].copy(), table[f"rejected_{what}"].copy()
            table[f"chosen_{what}"] = sides[0].where(~test, sides[1])
            table[f"rejected_{what}"] = sides[1].where(~test, sides[0])
        put(own_world, own_world.tokens, "tokens.parquet", table)
    assert sum(found) == pytest.approx(1, abs=1e-5)
    assert min(found) < 0.5


def ensemble(results: Path, *margins: list[float]) -> dict:
    """Summary of an ensemble whose members have these margins on the test pairs."""
    ids = np.arange(len(margins[0]))
    save_table(results, "tokens", "tokens", pd.DataFrame({"pair_id": ids, "split": "test"}))
    members = [f"member{k}" for k in range(len(margins))]
    for name, margin in zip(members, margins, strict=True):
        scores = pd.DataFrame({"pair_id": ids, "chosen_reward": np.array(margin), "rejected_reward": 0.0 * ids})
        save_table(results, name, "scores", scores)
    return run_stage(results, "collect-ensemble", {}, ["tokens", *members]).summary


def test_members_that_are_one_model_or_below_chance_or_constant_are_told(tmp_path, caplog):
    summary = ensemble(tmp_path, [1.0, 2.0, -1.0], [1.0, 2.0, -1.0], [-1.0, -2.0, 1.0], [1.0, 1.0, 1.0])
    expected = [
        "member 2 is right on 33.3% of the pairs, less than chance",
        "member 3 has the same reward margin on every pair",
        "members 0 and 1 have the same reward margins",
    ]
    assert summary["warnings"] == expected
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == expected


def test_sound_members_have_no_warning(tmp_path):
    assert "warnings" not in ensemble(tmp_path, [1.0, 2.0, -1.0], [1.0, 3.0, -1.0])


def test_a_dispersion_that_is_the_same_everywhere_is_refused(tmp_path):
    ids = np.arange(6)
    save_table(tmp_path, "tokens", "tokens", pd.DataFrame({"pair_id": ids, "prompt_id": ids, "split": "train"}))
    scores = {f"{side}_{what}": 0.5 for side in ("chosen", "rejected") for what in ("entropy", "tokens")}
    save_table(tmp_path, "reference", "scores", pd.DataFrame({"pair_id": ids, **scores}))
    (tmp_path / "reference" / "reference.json").write_text('{"vocab_size": 4}')
    with pytest.raises(FailedCheck, match="the same on every training pair, so MallowsPO would be plain DPO"):
        run_stage(tmp_path, "estimate-dispersion", DispersionSpec().model_dump(), ["tokens", "reference"])
    assert not (tmp_path / "built" / "dispersion.parquet").exists()


def test_the_report_lists_every_warning(tmp_path):
    data = collect_report(tmp_path, finished_results.finished(tmp_path))
    assert "What was found" not in render_report(data)
    ref = next(ref for ref in data["artifacts"] if ref.startswith("reward/"))
    data["artifacts"][ref]["summary"]["warnings"] = ["right on 41.0% <b>", "another"]
    page = render_report(data)
    assert "right on 41.0% &lt;b&gt;" in page
    assert page.index("What was found") < page.index(ref, page.index("What was found")) < page.index("another")
