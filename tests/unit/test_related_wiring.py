"""How the needs of the related methods are wired and met by stages, and what their page and item name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from artifact_builds import make_all, plan_of, trial_of
from prefopt.artifacts import MANIFEST, Node
from prefopt.errors import BadInput
from prefopt.files import read_json, read_lines
from prefopt.models import load_causal_lm
from prefopt.procedures import PROCEDURES
from prefopt.reporting.methods_page import page_with_tables
from prefopt.scoring import response_scores
from prefopt.stages import RunOptions
from prefopt.stages.policy import collect_signals
from prefopt.stages.tables import token_rows
from prefopt.stages.weights import weights_of
from prefopt.store.builds import Build
from prefopt.tables import read_table

WORLD = {"source": {"kind": "world", "prompts": 120, "pairs": 120}, "splits": {"train": 0.6, "judge": 0.0, "test": 0.4}}
TRAIN = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}
ARMS = {
    "sampo": {"loss": {"name": "sampo", "beta": 0.1}},
    "free": {"loss": {"name": "temporal_decay_free", "beta": 0.1}},
    "bmc": {"loss": {"name": "bmc", "beta": 0.1}},
    "mrpo": {"loss": {"name": "mrpo", "beta": 0.1}, "second_reference": "other"},
    "mrpo_base": {"loss": {"name": "mrpo", "beta": 0.1}, "second_reference": "base"},
    "capo": {"loss": {"name": "capo", "beta": 0.1}, "rewards": "two", "win_rate_samples": 2},
    "drdo": {"loss": {"name": "drdo", "beta": 0.1}, "rewards": "two"},
    "hpo": {"loss": {"name": "hpo", "beta": 0.1}, "auxiliary": "truth"},
    "spo_kl": {"loss": {"name": "spo_kl", "beta": 1.0}},
    "composed": {"loss": {"name": "composed", "beta": 0.1, "aggregation": "ld", "link": "focal", "gamma": 0.5}},
}


def declare(**changes):
    return {
        "item": {"paper": "own", "name": "x", "title": "t"},
        "layout": "ranking",
        "model": {"kind": "scratch", "layers": 1, "hidden": 16, "heads": 2, "intermediate": 32, "max_positions": 96},
        "tokens": {"max_prompt_tokens": 40, "max_length": 90},
        "reference": {"data": WORLD, "sft": {"train": {**TRAIN, "steps": 20}}},
        "references": {"other": {"train": {**TRAIN, "steps": 5}, "seed": 1}},
        "conditions": {"one": {"data": {**WORLD, "source": {**WORLD["source"], "seed": 1}}}},
        "rewards": {"two": {"members": 2, "train": TRAIN}, "truth": {"oracle": True}},
        "samples": {"max_new_tokens": 6, "batch_size": 200},
        "policy": TRAIN,
        "arms": ARMS,
        "evaluate": {"sets": {"test": {"data": WORLD, "prompts": 3}}, "sampling": {"max_new_tokens": 6}},
        **changes,
    }


def planned(folder: Path, **changes):
    return plan_of(folder, declare(**changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every trial of ARMS and all below them, made by the stages in this process."""
    plan = planned(tmp_path_factory.mktemp("wired"))
    options = RunOptions(micro_batch=16, checkpoint_steps=100, device="cpu")
    return plan, make_all(plan, [trial_of(plan, arm) for arm in ARMS], options)


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_need_is_wired_and_trains(made, arm):
    plan, results = made
    node = trial_of(plan, arm)
    curve = read_lines(results / node.ref / "metrics.jsonl")
    assert len(curve) == 2
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in curve)
    roles = {
        "sampo": {"reference"},
        "free": set(),
        "bmc": {"reference"},
        "mrpo": {"reference", "second_reference"},
        "mrpo_base": {"reference", "second_reference"},
        "capo": {"reference", "win_rates"},
        "drdo": {"rewards"},
        "hpo": {"reference", "auxiliary"},
        "spo_kl": {"samples"},
        "composed": {"reference"},
    }[arm]
    assert {role for role in node.parents if not role.startswith("set.")} == {"tokens", "model"} | roles


def test_token_scores_are_the_references_and_sum_to_its_scores(made):
    plan, results = made
    node = plan.node(trial_of(plan, "sampo").parents["reference"])
    assert node.spec["tokens"] is True
    table = read_table(results / node.ref / "scores.parquet")
    for side in ("chosen", "rejected"):
        sums = np.array([values.sum() for values in table[f"{side}_token_logp"]])
        assert sums == pytest.approx(table[f"{side}_logp"].to_numpy(), rel=1e-5)
        assert [len(values) for values in table[f"{side}_token_logp"]] == table[f"{side}_tokens"].tolist()
    # A loss without token weights keeps the artifact it always had.
    plain = plan.node(trial_of(plan, "mrpo").parents["reference"])
    assert plain.spec == {"precision": "fp32"}
    assert read_json(results / plain.ref / "reference.json").keys() == {"vocab_size"}


def test_the_second_reference_is_another_model(made):
    plan, results = made
    scores = {}
    for arm in ("mrpo", "mrpo_base"):
        parents = trial_of(plan, arm).parents
        scores[arm] = read_table(results / parents["second_reference"] / "scores.parquet")
        first = read_table(results / parents["reference"] / "scores.parquet")
        assert not np.allclose(first["chosen_logp"], scores[arm]["chosen_logp"])
    base = plan.node(trial_of(plan, "mrpo_base").parents["second_reference"]).parents["model"]
    model = load_causal_lm(weights_of(results / base)[0], device="cpu")
    tokens = read_table(results / trial_of(plan, "mrpo").parents["tokens"] / "tokens.parquet").iloc[:2]
    with torch.no_grad():
        found = response_scores(
            model, [x.tolist() for x in tokens["prompt_ids"]], [x.tolist() for x in tokens["chosen_ids"]]
        )
    expected = scores["mrpo_base"].set_index("pair_id").loc[tokens["pair_id"], "chosen_logp"]
    assert found.logp.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def signals_of(made, arm):
    plan, results = made
    node = trial_of(plan, arm)
    build = Build(node=node, results=results, work=results, scratch=results)
    rows = token_rows(build.parent("tokens"), "train")
    return rows["pair_id"], collect_signals(build, rows), node.parents


def test_signals_are_the_parents_values_of_each_pair(made):
    results = made[1]
    ids, signals, parents = signals_of(made, "mrpo")
    for role, prefix in (("reference", "ref"), ("second_reference", "other_ref")):
        table = read_table(results / parents[role] / "scores.parquet").set_index("pair_id").loc[ids]
        for side in ("chosen", "rejected"):
            assert signals[f"{prefix}_{side}_logp"].tolist() == table[f"{side}_logp"].tolist()
    ids, signals, parents = signals_of(made, "capo")
    table = read_table(results / parents["win_rates"] / "win_rates.parquet").set_index("pair_id").loc[ids]
    for side in ("chosen", "rejected"):
        assert signals[f"{side}_win_rate"].tolist() == table[f"{side}_win_rate"].tolist()
    ids, signals, parents = signals_of(made, "sampo")
    table = read_table(results / parents["reference"] / "scores.parquet").set_index("pair_id").loc[ids]
    assert signals["ref_rejected_token_logp"][3].tolist() == table["rejected_token_logp"].iloc[3].tolist()


def test_the_auxiliary_reward_is_the_members_mean_on_the_chosen_response(made):
    plan, results = made
    ensemble = trial_of(plan, "drdo").parents["rewards"]  # two members, so that mean and sum differ
    node = trial_of(plan, "hpo")
    other = Node(node.stage, 1, "hpo", node.spec, {**node.parents, "auxiliary": ensemble})
    build = Build(node=other, results=results, work=results, scratch=results)
    rows = token_rows(build.parent("tokens"), "train")
    table = read_table(results / ensemble / "scores.parquet").set_index("pair_id").loc[rows["pair_id"]]
    expected = [(a + b) / 2 for a, b in table["chosen_reward"]]
    assert collect_signals(build, rows)["auxiliary_reward"] == pytest.approx(expected, rel=1e-12)


def test_win_rates_are_of_the_pairs_own_prompts(made):
    plan, results = made
    node = plan.node(trial_of(plan, "capo").parents["win_rates"])
    table = read_table(results / node.ref / "win_rates.parquet")
    rates = table[["chosen_win_rate", "rejected_win_rate"]].to_numpy()
    assert ((rates > 0) & (rates < 1)).all()
    tokens = read_table(results / node.parents["tokens"] / "tokens.parquet", None, "train")
    assert sorted(table["pair_id"]) == sorted(tokens["pair_id"])
    samples = read_table(results / node.parents["samples"] / "samples.parquet")
    assert samples["prompt_id"].value_counts().eq(2).all()
    assert read_json(results / node.ref / MANIFEST)["summary"]["samples_per_prompt"] == 2


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"loss": {"name": "mrpo", "beta": 0.1}}, "arms.a.second_reference: its loss has two references"),
        ({"loss": {"name": "mrpo", "beta": 0.1}, "second_reference": "othr"}, "did you mean 'other'"),
        ({"loss": {"name": "capo", "beta": 0.1}, "rewards": "truth"}, "scored by trained reward models"),
        ({"loss": {"name": "hpo", "beta": 0.1}, "auxiliary": "tw"}, "no ensemble 'tw'"),
        ({"loss": {"name": "composed", "beta": 0.1, "link": "fokal"}}, "arms.a.loss: .*did you mean 'focal'"),
        ({"loss": {"name": "composed", "beta": 0.1}, "vary": {"gamma": [0.1]}}, "no setting 'gamma'"),
    ],
)
def test_what_cannot_be_wired_is_refused_when_it_is_planned(tmp_path, arm, message):
    with pytest.raises(BadInput, match=message):
        planned(tmp_path, arms={"a": arm})


def test_the_settings_of_a_free_combination_are_its_numbers(tmp_path):
    arm = {
        "loss": {"name": "composed", "beta": 0.1, "link": "focal", "margin": ["dispersion"]},
        "vary": {"gamma": [0.1, 0.5]},
    }
    plan = planned(tmp_path, arms={"a": arm})
    settings = [point["settings"] for point in plan.items["own/x"].spec["grid"]["points"]]
    assert settings == [{"beta": 0.1, "gamma": g, "learning_rate": 1e-3} for g in (0.1, 0.5)]
    assert "dispersion" in trial_of(plan, "a").parents


# --- the page and the item --------------------------------------------------------------------------------------------


def test_the_page_of_methods_is_what_the_registry_says(root):
    text = (root / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page_with_tables(text) == text, "run: python -m prefopt losses --page docs/methods.md"
    with pytest.raises(BadInput, match="methods: begin"):
        page_with_tables("nothing here")


def test_the_item_runs_every_method_that_can_be_wired(root):
    from prefopt.losses import LOSSES

    files = [root / "config" / "experiments" / "own" / f"{name}.yaml" for name in ("related_methods", "related_rounds")]
    item, rounds = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    used = {arm["loss"]["name"] for one in (item, rounds) for arm in one["arms"].values()}
    procedures = {arm["rounds"]["kind"] for arm in rounds["arms"].values() if "rounds" in arm}
    assert procedures == set(PROCEDURES)
    elsewhere = {name for name, loss in LOSSES.items() if "vote_share" in loss.needs}  # only pairs with votes
    elsewhere |= {name for name in LOSSES if name.startswith(("mallows", "distill"))}  # the two papers' own items
    related = set(LOSSES) - elsewhere - {"ipo_scaled"}  # ipo at another scale
    assert related <= used, sorted(related - used)
    assert json.dumps(item["arms"])  # plain values only
