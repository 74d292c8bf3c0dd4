"""Items about annotators and the command for a user's own file, run on the generated sample with known dispersion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from annotated_sample import PEOPLE, sample, vote_rows, write_rows
from prefopt.artifacts import MANIFEST
from prefopt.cli import main
from prefopt.errors import BadInput
from prefopt.files import read_json
from prefopt.plan import load_plan
from prefopt.report import collect_report
from prefopt.reporting.exports import export_items, results_table
from prefopt.reporting.report_page import render_report
from prefopt.stages import STAGES, RunOptions
from prefopt.store.builds import building
from prefopt.tables import read_table

MODEL = """
model: {kind: scratch, layers: 1, hidden: 16, heads: 2, intermediate: 32, max_positions: 48,
        tokenizer: {kind: words, vocab_size: 128}}
tokens: {max_prompt_tokens: 12, max_length: 48}
sft: {train: {steps: 40, batch_size: 16, learning_rate: 1.0e-2}}
"""
HUMANS = (
    """
item: {paper: own, name: humans, title: Estimates beside people, scale: local}
annotated:
  sample: {data: {source: {kind: votes, paths: [votes.jsonl]}, splits: {train: 0.5, validation: 0.2, test: 0.3}}}
"""
    + MODEL
    + """
rewards: {members: 2, train: {steps: 3, batch_size: 8}}
samples: {max_new_tokens: 6, batch_size: 32}
samples_per_prompt: 2
resamples: 200
expect:
  - {claim: it follows, value: sample.token_entropy.spearman, above: 0.0,
     interval: [sample.token_entropy.spearman.low, sample.token_entropy.spearman.high], source: our question}
  - {claim: one above all, value: sample.token_entropy.auroc, above: 1.0, source: cannot hold}
"""
)
WEIGHT = (
    """
item: {paper: own, name: weight, title: Votes as weight and label, scale: local}
data: {source: {kind: votes, paths: [votes.jsonl], hold_out: 2}, splits: {train: 0.5, validation: 0.2, test: 0.3}}
"""
    + MODEL
    + """
policy: {steps: 3, batch_size: 8, learning_rate: 1.0e-3}
betas: [1.0]
arms:
  dpo: {loss: {name: dpo}}
  votes: {loss: {name: dpo_votes}}
  human: {loss: {name: mallows_theta}, dispersion: {estimator: human_votes}}
seeds: [0, 1]
expect:
  - {claim: soft labels fit better, arm: votes, than: dpo, source: our question}
"""
)


def project(folder: Path, **files: str) -> Path:
    """A configuration with these items over the generated sample; returns its config.yaml."""
    experiments = folder / "config" / "experiments" / "own"
    experiments.mkdir(parents=True)
    for name, text in files.items():
        (experiments / f"{name}.yaml").write_text(text, encoding="utf-8")
    config = folder / "config" / "config.yaml"
    config.write_text(f"items: [own/*]\nresults: {folder / 'results'}\ndata_root: {folder}\n", encoding="utf-8")
    write_rows(folder / "votes.jsonl", vote_rows(sample(60)))
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both items of the sample, made: their folder and plan."""
    folder = tmp_path_factory.mktemp("annotators")
    plan = load_plan(project(folder, humans=HUMANS, weight=WEIGHT))
    stages = {stage.folder: stage for stage in STAGES.values()}
    for node in plan.reachable(plan.items.values()):
        with building(node, folder / "results") as build:
            stages[node.stage.split("/")[0]].load()(build, RunOptions(device="cpu"))
    return folder, plan


def test_estimates_follow_generated_people_where_the_prompts_kind_shows(made):
    folder, plan = made
    ref = plan.items["own/humans"].parents["study"]
    values = read_json(folder / "results" / ref / "values.json")
    # open prompts have answers of random words and annotators of phi 0.9: entropy and disagreement rise together
    assert values["sample.token_entropy.spearman.low"] > 0.1
    assert values["sample.token_entropy.auroc"] > 0.6
    assert values["sample.token_entropy.phi.spearman"] > 0.1
    for estimate in ("sequence_entropy", "reward_votes", "reward_variance", "length", "length_match"):
        assert f"sample.{estimate}.auroc" in values
    table = read_table(folder / "results" / ref / "estimates-sample.parquet")
    assert (table[["votes_chosen", "votes_rejected", "votes_tie"]].sum(axis=1) == PEOPLE).all()


def test_claims_at_small_scale_are_directions(made):
    folder, plan = made
    item = read_json(folder / "results" / plan.items["own/humans"].ref / "item.json")
    assert [row["verdict"] for row in item["expect"]] == ["direction only", "not reproduced"]
    assert item["verdict"] == "not reproduced"
    assert item["scale"] == "local"


def test_every_arm_is_evaluated_on_the_same_held_out_votes(made):
    folder, plan = made
    item = plan.items["own/weight"]
    study = folder / "results" / item.parents["study"]
    both = read_json(study / "arms.json")
    assert set(both) == {"seen", "new"}
    arms = both["seen"]
    assert set(arms["arms"]) == {"dpo", "votes", "human"}
    manifest = read_json(study / MANIFEST)
    runs = [ref for role, ref in manifest["parents"].items() if role.startswith("run.")]
    assert len(runs) == len(set(runs)) == 3 * 2  # arms and seeds
    tables = [read_table(folder / "results" / ref / "margins.parquet") for ref in runs]
    assert all(table["pair_id"].tolist() == tables[0]["pair_id"].tolist() for table in tables)
    assert set(tables[0]["split"]) == {"train", "validation", "test"}
    lowest = arms["bounds"]["log_loss_of_the_votes_themselves"]
    assert all(lowest < found["metrics"]["log_loss"]["mean"] for found in arms["arms"].values())
    claim = read_json(folder / "results" / item.ref / "item.json")["expect"][0]
    difference = arms["differences"]["votes.over.dpo.log_loss"]
    assert (claim["value"], claim["interval"]) == (difference["mean"], [difference["low"], difference["high"]])


def test_human_dispersion_is_large_where_people_agree(made):
    folder, plan = made
    (ref,) = [ref for ref in plan.nodes if ref.startswith("dispersion/human-votes")]
    weights = read_table(folder / "results" / ref / "dispersion.parquet")
    pairs = read_table(folder / "results" / plan.nodes[ref].parents["pairs"] / "pairs.parquet")
    both = weights.merge(pairs, on="pair_id")
    unanimous = both["votes_chosen"] == PEOPLE - 2  # two of five votes are held out
    assert both.loc[unanimous, "dispersion_weight"].min() > both.loc[~unanimous, "dispersion_weight"].max()
    assert weights.loc[weights["split"] == "train", "dispersion_weight"].mean() == pytest.approx(1)


def test_report_and_export_take_both_items(made, tmp_path):
    folder, plan = made
    refs = {name: node.ref for name, node in plan.items.items()}
    html = render_report(collect_report(folder / "results", list(refs.values())))
    assert "Estimates beside people" in html
    assert "seen.votes.over.dpo.log_loss" in html or "soft labels fit better" in html
    export_items(folder / "results", refs, tmp_path / "out")
    assert "local, whole" in results_table(tmp_path / "out")
    shown = (tmp_path / "out" / "own" / "humans" / "table.md").read_text(encoding="utf-8")
    assert "## agreement" in shown
    assert "| sample | token entropy |" in shown


def test_losses_and_estimators_of_votes_need_data_with_votes(tmp_path):
    world = WEIGHT.replace("{kind: votes, paths: [votes.jsonl], hold_out: 2}", "{kind: world}")
    with pytest.raises(BadInput, match="a source of kind 'world' has no annotators"):
        load_plan(project(tmp_path, weight=world))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("arm: votes, than: dpo", "arm: votes, than: dop", "expect: no arm 'dop'; did you mean 'dpo'"),
        ("validation: 0.2, test: 0.3", "test: 0.5", "give validation no share"),
        (", hold_out: 2", "", "a claim on seen pairs needs votes held out"),
        ("{name: dpo}", "{name: dpo, beta: 0.1}", "'beta' is tried over 'betas'"),
        ("betas: [1.0]", "betas: [0.0]", "betas.0"),
    ],
)
def test_mistakes_in_the_declaration_are_told(tmp_path, old, new, told):
    assert old in WEIGHT
    with pytest.raises(BadInput, match=told):
        load_plan(project(tmp_path, weight=WEIGHT.replace(old, new)))


# --- the command ----------------------------------------------------------------------------------------------------


def command(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["disagreement", *map(str, words)])
    return code, *capsys.readouterr()


def test_one_command_on_a_users_own_file(tmp_path, capsys):
    path = write_rows(tmp_path / "votes.jsonl", vote_rows(sample(30)))
    code, out, _ = command(capsys, "--votes", path, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["agreement"]["items"] == 30 * 3
    assert found["annotators"]["count"] == PEOPLE
    assert found["systems"]["strengths"][0]["system"] == "s0"  # first of the centre of every prompt
    assert found["rankings"]["prompts"] == 30
    assert found["rankings"]["phi"]["lowest"] < 0.3 < found["rankings"]["phi"]["highest"]
    code, out, _ = command(capsys, "--votes", path)
    assert "two annotators agree" in out
    assert "Mallows phi" in out


def test_the_command_compares_any_model_folder(made, capsys):
    folder, plan = made
    (model,) = [
        ref for ref in plan.nodes if ref.startswith("sft/") and ref in plan.nodes[_reference(plan)].parents.values()
    ]
    rewards = [ref for ref in plan.nodes if ref.startswith("reward/")]
    weights = folder / "results" / model / "weights"
    given = [
        "--votes",
        folder / "votes.jsonl",
        "--model",
        weights,
        "--samples",
        2,
        "--new-tokens",
        6,
        "--device",
        "cpu",
    ]
    given += ["--rewards", *(folder / "results" / ref / "weights" for ref in rewards), "--resamples", 100, "--json"]
    code, out, err = command(capsys, *given)
    assert code == 0, err
    found = json.loads(out)["model"]
    assert found["pairs"] == 60 * 3
    assert {"token_entropy", "sequence_entropy", "reward_votes", "reward_variance"} <= found["estimates"].keys()
    assert found["estimates"]["token_entropy"]["auroc"]["low"] > 0.5


def _reference(plan) -> str:
    return plan.nodes[plan.items["own/humans"].parents["study"]].parents["reference.sample"]


def test_the_commands_failures_are_one_line(tmp_path, capsys, made):
    missing = tmp_path / "none.jsonl"
    code, _, err = command(capsys, "--votes", missing)
    assert (code, err.count("\n")) == (2, 1)
    path = write_rows(
        tmp_path / "votes.jsonl", [{"prompt": "q", "response_a": "x", "response_b": "y", "annotator": 1, "vote": "c"}]
    )
    code, _, err = command(capsys, "--votes", path)
    assert code == 2
    assert f"{path}: line 1: 'vote' is 'c'" in err
    code, _, err = command(capsys, "--votes", made[0] / "votes.jsonl", "--samples", 3)
    assert "--rewards, --samples and --max-length go with --model" in err
    code, _, err = command(capsys, "--votes", made[0] / "votes.jsonl", "--model", tmp_path)
    assert code == 2
    assert "config.json" in err or "tokenizer" in err


def test_the_real_items_plan_over_the_shared_data(shared_data, root, tmp_path):
    shutil.copytree(root / "config", tmp_path / "config")
    names = "own/dispersion_vs_humans,own/disagreement_as_weight"
    plan = load_plan(tmp_path / "config" / "config.yaml", {"items": names, "data_root": str(shared_data)})
    assert {node.spec["item"]["scale"] for node in plan.items.values()} == {"local"}
    assert all(node.spec["expect"] for node in plan.items.values())
