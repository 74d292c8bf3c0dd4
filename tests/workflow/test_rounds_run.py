"""Arms in rounds as a user runs them: by Snakemake, verified, stopped and resumed, found again without a job."""

from __future__ import annotations

import json
import shutil

import pytest

from marks import long
from small_project import TRAIN, item, new_project

DPO = {"name": "dpo", "beta": 0.1}
RESPONSES = {"labels": "three", "per_prompt": 3, "choose": "pareto"}
ARMS = {
    "dpo": {"loss": DPO},
    "accelerated": {"loss": DPO, "rounds": {"kind": "accelerated", "count": 2, "responses": RESPONSES}},
    "gpo": {
        "loss": {"name": "gpo", "beta": 0.5},
        "rounds": {"kind": "online", "count": 1, "responses": {"labels": "general"}},
    },
    "dprm": {
        "loss": {"name": "mallows_theta", "beta": 0.1},
        "dispersion": {"estimator": "rating_spread", "ratings": "rated"},
    },
    "apa": {
        "loss": {"name": "apa_tokens", "beta": 0.5},
        "rounds": {"kind": "online", "count": 1, "responses": RESPONSES},
    },
    "discriminator": {
        "loss": DPO,
        "rounds": {"kind": "discriminator", "count": 2, "discriminator": "three", "gold": "held_out", "gold_labels": 8},
    },
}
EM = {"loss": {"name": "em_dpo", "beta": 0.1}, "rounds": {"kind": "em", "count": 2}}
RATERS = {"length_preferences": [8.0, -8.0], "annotators": 12}
REWARDS = {
    "three": {"members": 3, "train": TRAIN},
    "general": {"kind": "general_preference", "train": TRAIN},
    "rated": {"kind": "distributional", "train": TRAIN},
    "held_out": {"members": 1, "split": "judge", "train": TRAIN},
}
WORLD = {"source": {"kind": "world", "prompts": 150, "pairs": 150}, "splits": {"train": 0.5, "judge": 0.1, "test": 0.4}}


def voted() -> dict:
    """The demo world's pairs with the votes of two types of annotators."""
    return {**WORLD, "source": {**WORLD["source"], "seed": 1, "raters": RATERS}}


def grid(**changes) -> dict:
    """The same arms on the demo world, with a curve over the rounds and a ranking at equal KL."""
    return {
        "item": {"paper": "own", "name": "grid", "title": "Rounds on the demo world"},
        "layout": "ranking",
        "model": {"kind": "scratch", "layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "max_positions": 96},
        "tokens": {"max_prompt_tokens": 40, "max_length": 90},
        "reference": {"data": WORLD, "sft": {"train": {**TRAIN, "steps": 60, "learning_rate": 1e-2}}},
        "conditions": {"raters": {"data": voted()}},
        "rewards": REWARDS,
        "samples": {"max_new_tokens": 20, "batch_size": 200},
        "policy": {**TRAIN, "learning_rate": 3e-3},
        "arms": {**ARMS, "em": EM},
        "seeds": [0, 1],
        "evaluate": {
            "sets": {"test": {"data": WORLD, "prompts": 20}},
            "sampling": {"max_new_tokens": 20, "batch_size": 20},
            "at": [0.0, 0.5, 1.0],
        },
        "expect": [
            {
                "kind": "frontier",
                "claim": f"{name} beats DPO at equal KL",
                "metric": "reward",
                "arm": name,
                "than": "dpo",
                "source": "our question",
            }
            for name in [*ARMS, "em"]
            if name != "dpo"
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The small project and the demo world with every arm, run once."""
    project = new_project(tmp_path_factory.mktemp("rounds") / "project")
    project.declare(item(arms=ARMS, rewards=REWARDS))
    project.declare(item(item={**item()["item"], "name": "voted"}, data=voted(), arms={"em": EM}))
    project.declare(grid())
    project.launch(check=True)
    return project


def outputs(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())["outputs"]


@long("half a minute of processor time or more")
def test_rounds_run_verify_and_are_found_again(ran):
    ran.prefopt("verify", check=True)
    assert ran.planned_jobs() == {}
    found = json.loads((ran.artifact("papers/own", "grid") / "item.json").read_text())
    assert {row["arm"] for row in found["matched"]} == {*ARMS, "em"} - {"dpo"}
    fractions = {(row["arm"], row["fraction"]) for row in found["frontier"]}
    assert {("accelerated", 0.5), ("dpo", 0.5)} <= fractions
    for name in ("tiny", "voted"):
        measured = json.loads((ran.artifact("papers/own", name) / "item.json").read_text())
        assert all(arm["seeds"]["0"]["values"] for arm in measured["arms"].values())


@long("half a minute of processor time or more")
def test_a_lost_round_and_what_came_of_it_are_made_again_with_the_same_bytes(ran, tmp_path):
    clone = ran.copy(tmp_path / "clone")
    (lost, *_) = (
        clone.folder / "results" / ref
        for ref in json.loads(clone.spec("trials", "accelerated-s0").read_text())["parents"].values()
        if ref.startswith("extrapolated")
    )
    before = outputs(lost)
    answered = clone.artifact("trials", "accelerated-s0")
    answers = outputs(answered)
    shutil.rmtree(lost)
    clone.prefopt("verify", "--remake", check=True)
    assert not answered.exists()
    clone.snakemake(check=True)
    assert outputs(lost) == before
    assert outputs(answered) == answers
    clone.prefopt("verify", check=True)


@long("half a minute of processor time or more")
def test_one_changed_value_runs_its_rounds_alone(ran, tmp_path):
    clone = ran.copy(tmp_path / "clone")
    arm = {**ARMS["accelerated"], "rounds": {**ARMS["accelerated"]["rounds"], "momentum": 0.5}}
    clone.declare(grid(arms={**ARMS, "em": EM, "accelerated": arm}, seeds=[0]))
    jobs = clone.planned_jobs()
    assert "train_sft" not in jobs
    assert jobs["extrapolate_weights"] == 2
    assert jobs["train_policy"] == 1  # the first round's fit is there, the second starts elsewhere
