"""Members of an ensemble are scored in one job; heads on one body have a way through the rules of their own."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt.plan import load_plan
from small_project import TRAIN, item, new_project


def test_an_ensemble_is_scored_in_one_job_and_heads_are_one_model(tmp_path, monkeypatch):
    project = new_project(tmp_path)
    heads = {"kind": "shared_backbone", "members": 3, "train": TRAIN}
    loss = {"name": "distill_ensemble", "beta": 0.1}
    rewards = {"three": {"members": 3, "train": TRAIN}, "heads": heads}
    project.declare(item(rewards=rewards, arms={name: {"loss": loss, "rewards": name} for name in rewards}))
    monkeypatch.chdir(tmp_path)
    ensembles = [node.ref for node in load_plan(Path("config/config.yaml")).nodes.values() if node.stage == "ensemble"]
    assert len(ensembles) == 2
    dry = project.snakemake("-n", "--", *(f"results/{ref}/manifest.json" for ref in ensembles), check=True)
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", dry.stdout, re.MULTILINE))
    # Three members trained and scored together; the heads are one model, scored in a job of its own.
    wanted = {"train_reward": "4", "score_rewards_0": "1", "score_rewards": "1", "collect_ensemble": "2"}
    assert jobs.items() >= wanted.items()
