"""The paper tier: every item is declared with pinned sources, plans without a network, and is in no default run."""

from __future__ import annotations

import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import yaml

from prefopt.errors import BadInput
from prefopt.plan import Plan, load_plan
from prefopt.planning.config import item_files, load_item
from prefopt.specs import GridItemSpec

# What a user has to bring, relative to data_root: no revision of it is known to us, or it is not ours to ship.
BROUGHT = [
    "alpaca_eval/instruction_difficulty.csv",
    "alpaca_eval/df_gamed.csv",
    "imdb_prefix20/train/a.jsonl",
    "imdb_prefix20/test/a.jsonl",
    "tldr/comparisons/a.jsonl",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, request) -> Path:
    """The declarations of this checkout, beside data folders with the brought files (planning reads no row of them)."""
    folder = tmp_path_factory.mktemp("paper")
    shutil.copytree(request.config.rootpath / "config", folder / "config")
    for name in BROUGHT:
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_text("{}\n")
    return folder


def planned(folder: Path, *items: str, data: str = "data") -> Plan:
    return load_plan(folder / "config" / "config.yaml", {"items": list(items), "data_root": str(folder / data)})


def test_every_item_is_in_the_paper_tier_and_none_in_the_default_run(root):
    files = item_files(root / "config", ["*/paper/*"])
    assert len(files) >= 10
    for path in files:
        item = load_item(path)
        assert item.item.scale == "paper"
        assert path.parts[-3:] == (item.item.paper, "paper", f"{item.item.name}.yaml")
    default = item_files(root / "config", yaml.safe_load((root / "config" / "config.yaml").read_text())["items"])
    assert not set(files) & set(default)


def test_all_of_it_plans_together_with_its_analogues(checkout):
    plan = planned(checkout, "*/paper/*", "mallowspo/fig8c")
    assert {"mallowspo/paper/fig8c", "mallowspo/fig8c"} <= set(plan.items), "the same figure in both tiers"
    assert plan.items["mallowspo/paper/fig8c"].ref != plan.items["mallowspo/fig8c"].ref


def test_what_comes_from_the_hub_is_pinned(checkout):
    plan = planned(checkout, "*/paper/*")
    sources = [node.spec.get("source", node.spec) for node in plan.nodes.values() if node.stage in ("pairs", "prompts")]
    sources += [node.spec for node in plan.nodes.values() if node.stage == "base"]
    hub = [source for source in sources if "repo" in source]
    assert all(re.fullmatch("[0-9a-f]{40}", source["revision"]) for source in hub)
    assert {
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "princeton-nlp/llama3-ultrafeedback-armorm",
        "tatsu-lab/alpaca_eval",
        "EleutherAI/pythia-2.8b",
        "Anthropic/hh-rlhf",
        "HuggingFaceH4/stack-exchange-preferences",
        "stanfordnlp/SHP",
        "openai-community/gpt2-large",
        "EleutherAI/pythia-1.4b",
    } == {source["repo"] for source in hub}


@pytest.mark.parametrize("item", ["tables1_6", "fig11", "fig8c"])
def test_what_has_to_be_brought_is_told_in_one_line(checkout, item):
    with pytest.raises(BadInput) as error:
        planned(checkout, f"mallowspo/paper/{item}", data="elsewhere")
    assert re.search(rf"paper/{item}\.yaml: .*: no such file; set data_root", str(error.value))
    assert "\n" not in str(error.value)


def stages(plan: Plan, stage: str) -> list:
    return [node for node in plan.nodes.values() if node.stage == stage]


def test_tables_1_and_6_have_the_papers_settings(checkout):
    policies = stages(planned(checkout, "mallowspo/paper/tables1_6"), "policy")
    found = {
        (node.spec["loss"]["name"], node.spec["loss"]["params"]["beta"], node.spec["train"]["learning_rate"])
        for node in policies
    }
    grid = set(product(("dpo", "mallows_theta"), (0.1, 0.05, 0.01), (5e-7, 1e-6)))
    assert found == grid | {
        ("ipo", 0.005, 1e-6),
        ("mallows_ipo", 0.005, 1e-6),
        ("simpo", 10.0, 1e-6),
        ("mallows_simpo", 10.0, 1e-6),
    }
    assert {node.spec["train"]["batch_size"] for node in policies} == {256}


def test_figure_11_shares_the_policies_of_table_1(checkout):
    both = planned(checkout, "mallowspo/paper/tables1_6", "mallowspo/paper/fig11")
    assert len(stages(both, "policy")) == 16
    assert both.items["mallowspo/paper/fig11"].spec["draws"] == 10


def test_figure_10_trains_six_policies_for_all_sets(checkout):
    plan = planned(checkout, "mallowspo/paper/fig10_*")
    assert len(stages(plan, "policy")) == 6
    assert len(stages(plan, "sft")) == 1
    assert {node.spec["train"]["optimizer"] for node in stages(plan, "policy")} == {"rmsprop"}
    assert len(stages(plan, "judgements")) == 2 * 2 * 3  # theta and phi, two betas, three sets


def test_figure_2_of_reward_distillation_is_the_papers_grid(checkout):
    plan = planned(checkout, "reward_distillation/paper/fig2")
    trained = [node for node in stages(plan, "trials") if node.spec["loss"] is not None]
    assert len(trained) == 294
    rewards = stages(plan, "reward")
    assert len(rewards) == 42 + 1  # six a rho, and the oracle, which also judges
    training = [node.spec["train"] for node in rewards]
    assert {(one["steps"], one["batch_size"], one["learning_rate"]) for one in training} == {(3000, 64, 4e-6)}
    assert all((n.spec["train"]["steps"], n.spec["train"]["batch_size"]) == (10000, 16) for n in trained)
    judged = {n.parents["judge0"] for n in trained}
    assert judged == {plan.nodes[n.parents["rewards"]].parents["reward"] for n in stages(plan, "relabelled")}
    gammas = {tuple(n.spec["regulariser"]["forward_kl"]["gamma"]) for n in trained if n.spec["regulariser"]}
    assert gammas == {(1e-4, 1e-2)}


def test_the_stand_in_is_named_as_one(root):
    item = load_item(root / "config" / "experiments" / "reward_distillation" / "paper" / "fig2.yaml")
    assert isinstance(item, GridItemSpec)
    assert "stands in for PaLM-2-XS" in item.item.note
    assert "palm2_xs_stand_in" in (root / "config" / "models.yaml").read_text()
