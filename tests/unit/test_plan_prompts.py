"""Planning where prompts, opponents and draws are declared: what is wired, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prefopt.errors import BadInput
from prefopt.plan import Plan, load_plan
from small_project import item

ASKED = [{"instruction": "Name a river.", "output": "The Elbe.", "generator": "someone"}]
FILE = {"kind": "file", "path": "asked.json"}
SERVER = {"kind": "server", "base_url": "http://127.0.0.1:8000/v1", "model_name": "x"}
DPO = {"arms": {"dpo": item()["arms"]["dpo"]}, "rewards": {}, "samples": None}


def planned(folder: Path, content: dict) -> Plan:
    (folder / "asked.json").write_text(json.dumps(ASKED))
    (folder / "numbers.csv").write_text("index,instruction_difficulty\n0,0.5\n")
    (folder / "pairs.jsonl").write_text("{}\n")
    path = folder / "config" / "experiments" / "own" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    config = folder / "config" / "config.yaml"
    config.write_text(yaml.safe_dump({"items": ["own/tiny"], "data_root": str(folder)}))
    return load_plan(config)


def evaluated(folder: Path, **evaluate) -> Plan:
    return planned(folder, item(**DPO, evaluate={**item()["evaluate"], **evaluate}))


def nodes(plan: Plan, stage: str) -> list:
    return [node for node in plan.nodes.values() if node.stage == stage]


def test_a_prompt_set_stands_where_pairs_and_tokens_do(tmp_path):
    plan = evaluated(tmp_path, prompt_set=FILE, prompts=None)
    (prompts,) = nodes(plan, "prompts")
    for answers in nodes(plan, "generations"):
        assert answers.parents["pairs"] == answers.parents["tokens"] == prompts.ref
        assert answers.spec["prompts"] is None, "all of them"
    (judged,) = nodes(plan, "judgements")
    assert judged.parents["pairs"] == prompts.ref
    assert not prompts.spec["outputs"]


def test_outputs_of_a_file_are_the_opponent(tmp_path):
    own = evaluated(tmp_path, prompt_set=FILE, against="outputs")
    (judged,) = nodes(own, "judgements")
    assert own.nodes[judged.parents["baseline"]].spec["outputs"]
    assert len(nodes(own, "generations")) == 1, "nobody else answers"
    other = evaluated(tmp_path, against="outputs", outputs={"path": "asked.json"})
    (judged,) = nodes(other, "judgements")
    assert other.nodes[judged.parents["baseline"]].spec["source"]["name"] == "asked.json"
    assert other.nodes[judged.parents["pairs"]].stage == "pairs", "prompts are the item's own"


def test_every_draw_has_a_seed_of_its_own_and_the_first_is_as_without_draws(tmp_path):
    once, thrice = evaluated(tmp_path), evaluated(tmp_path, draws=3)
    assert set(once.nodes) - set(thrice.nodes) == {next(iter(once.items.values())).ref}
    seeds = [node.spec["sampling"]["seed"] for node in nodes(thrice, "generations")]
    assert sorted(seeds) == [0, 0, 100_000, 100_000, 200_000, 200_000]  # of the policy, and of the reference
    (whole,) = thrice.items.values()
    assert {role for role in whole.parents if role.startswith("metrics.")} == {
        "metrics.dpo.0",
        "metrics.dpo.0.1",
        "metrics.dpo.0.2",
    }
    assert whole.spec["draws"] == 3


def test_the_file_that_length_control_reads_is_part_of_the_metrics_id(tmp_path):
    control = {"prompt_set": FILE, "length_control": {"difficulty": {"path": "numbers.csv"}}}
    (first,) = nodes(evaluated(tmp_path, **control), "metrics")
    assert first.spec["length_control"]["gamed"] is None
    assert first.execution["difficulty"].endswith("numbers.csv")
    (plain,) = nodes(evaluated(tmp_path, prompt_set=FILE), "metrics")
    assert plain.spec == {}
    assert plain.id != first.id


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        (
            {"prompt_set": {"kind": "fill", "path": "x"}},
            "evaluate.prompt_set: unknown value 'fill'; did you mean 'file'",
        ),
        ({"prompt_set": {"kind": "file", "pth": "x"}}, "unknown key 'evaluate.prompt_set.pth'; did you mean 'path'"),
        ({"prompt_set": {"kind": "hub", "repo": "a/b"}}, "the key 'evaluate.prompt_set.revision' is missing"),
        (
            {"prompt_set": {"kind": "hub", "repo": "a/b", "revision": "main"}},
            "evaluate.prompt_set.revision: string should match pattern",
        ),
        ({"prompt_set": {**FILE, "column": "a", "reader": "hh"}}, "give either column or reader"),
        ({"prompt_set": {**FILE, "path": "gone.json"}}, "gone.json: no such file"),
        ({"prompt_set": FILE, "judge": "oracle"}, "the oracle exists for the demo world only"),
        (
            {"prompt_set": FILE, "judge": {**SERVER, "labelled_pairs": 10}},
            "a prompt_set holds no labelled pairs; declare 'labelled_pairs: 0'",
        ),
        ({"against": "outputs"}, "against: outputs needs answers; give 'outputs', or a prompt_set"),
        ({"outputs": {"path": "asked.json"}}, "outputs are judged against only with 'against: outputs'"),
        ({"against": "dpoo"}, "evaluate.against: no arm 'dpoo'; did you mean 'dpo'"),
        ({"draws": 2, "sampling": {"temperature": 0.0}}, "at temperature 0 all draws are the same answer"),
        ({"draws": 0}, "evaluate.draws: input should be greater than or equal to 1"),
        ({"length_control": {"difficulty": {"path": "numbers.csv"}}}, "about numbered prompts; give their prompt_set"),
        ({"length_control": {"gamed": {"path": "numbers.csv"}}}, "give 'difficulty' with them"),
    ],
)
def test_every_mistake_is_one_line_with_the_way_out(tmp_path, evaluate, expected):
    with pytest.raises(BadInput) as error:
        evaluated(tmp_path, **evaluate)
    assert expected in str(error.value)
    assert "own/tiny.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_claims_about_length_control_need_it_and_no_arm_is_called_outputs(tmp_path):
    claim = {"claim": "x", "arm": "dpo", "metric": "length_controlled_win_rate", "than": 50.0, "source": "t"}
    with pytest.raises(BadInput, match=r"declare evaluate\.length_control"):
        planned(tmp_path, item(**DPO, expect=[claim]))
    with pytest.raises(BadInput, match=r"arms\.outputs: this name stands for answers in a file"):
        planned(tmp_path, item(**{**DPO, "arms": {"outputs": DPO["arms"]["dpo"]}}))


# --- grids ----------------------------------------------------------------------------------------------------------


def grid(**changes) -> dict:
    content = item()
    judge = content["evaluate"]["judge"]
    return {
        "item": content["item"],
        "layout": "bars",
        "model": content["model"],
        "tokens": content["tokens"],
        "reference": {"data": content["data"], "sft": content["sft"]},
        "conditions": {"all": {"data": content["data"]}},
        "policy": content["policy"],
        "arms": {"dpo": {"loss": {"name": "dpo", "beta": 0.1}}},
        "evaluate": {
            "sets": {"asked": {"prompt_set": FILE}, "test": {"data": content["data"]}},
            "sampling": content["evaluate"]["sampling"],
            "judge": {"data": content["data"], "rewards": judge},
        },
        **changes,
    }


def test_an_evaluation_set_of_a_grid_may_be_a_prompt_set(tmp_path):
    plan = planned(tmp_path, grid())
    (prompts,) = nodes(plan, "prompts")
    for trial in nodes(plan, "trials"):
        assert trial.parents["set.asked.tokens"] == trial.parents["set.asked.pairs"] == prompts.ref
        sets = trial.spec["evaluate"]["sets"]
        assert (sets["asked"]["prompts"], sets["test"]["prompts"]) == (None, 300)
    wrong = grid()
    wrong["evaluate"]["sets"]["asked"] = {"prompt_set": FILE, "split": "validation"}
    with pytest.raises(BadInput, match="a prompt_set has no splits; remove 'split: validation'"):
        planned(tmp_path, wrong)
    wrong["evaluate"]["sets"]["asked"] = {"kl": True}
    with pytest.raises(BadInput, match="give either data or prompt_set"):
        planned(tmp_path, wrong)


def test_a_condition_may_be_labelled_again_by_a_reward_model(tmp_path):
    oracle = {"members": 1, "split": "judge", "train": item()["policy"]}
    data = item()["data"]
    shares = {f"rho_{round(10 * rho)}": {"data": data, "relabel": {"oracle": oracle, "rho": rho}} for rho in (0.2, 0.8)}
    plan = planned(tmp_path, grid(conditions=shares))
    found = nodes(plan, "relabelled")
    assert sorted(node.spec["rho"] for node in found) == [0.2, 0.8]
    assert len({node.parents["rewards"] for node in found}) == 1, "one oracle labels for all shares"
    tokenised = {plan.nodes[node.parents["pairs"]].stage for node in nodes(plan, "tokens")}
    assert tokenised == {"pairs", "relabelled"}
    for change, expected in (({"split": "train"}, "split: judge"), ({"members": 2}, "one reward model")):
        wrong = {"all": {"data": data, "relabel": {"oracle": {**oracle, **change}}}}
        with pytest.raises(BadInput, match=expected):
            planned(tmp_path, grid(conditions=wrong))
