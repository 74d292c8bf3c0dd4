"""Declaring pairwise judges: names and inline, what is their identity, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from artifact_builds import plan_items
from judge_models import folder_of, judge_tokenizer, tiny_judge
from prefopt.errors import BadInput
from prefopt.judges.templates import TEMPLATES
from prefopt.planning.config import load_yaml, parse
from prefopt.specs import GridEvaluateSpec, JudgeSpec

TRAIN = {"steps": 2, "batch_size": 4}
SERVER = {"kind": "server", "base_url": "http://127.0.0.1:1/v1", "model_name": "judge-1"}


@pytest.fixture
def planned(tmp_path):
    def plan(judge, judges=None, **changes):
        item = {
            "item": {"paper": "own", "name": "x", "title": "t"},
            "data": {"source": {"kind": "world"}},
            "model": {"kind": "scratch"},
            "tokens": {},
            "policy": TRAIN,
            "arms": {"dpo": {"loss": {"name": "dpo", "beta": 0.1}}},
            "evaluate": {"judge": judge},
        } | changes
        (tmp_path / "config").mkdir(exist_ok=True)
        models = {"tiny": {"kind": "local", "path": "tiny"}, "new": {"kind": "scratch"}}
        (tmp_path / "config" / "models.yaml").write_text(yaml.safe_dump(models))
        (tmp_path / "config" / "judges.yaml").write_text(yaml.safe_dump(judges or {}))
        return plan_items(tmp_path, item, data_root=str(tmp_path))

    return plan


def judgement(plan):
    (node,) = (node for ref, node in plan.nodes.items() if ref.startswith("judgements/"))
    return node


def test_a_name_stands_for_its_entry(planned):
    inline = judgement(planned(SERVER))
    named = judgement(planned("mine", {"mine": SERVER, "other": SERVER | {"model_name": "b"}}))
    assert named == inline
    with pytest.raises(BadInput, match=r"judges\.yaml: no entry 'mein'; did you mean 'mine'"):
        planned("mein", {"mine": SERVER})


def test_what_is_asked_is_identity_and_where_is_not(planned):
    plain = judgement(planned(SERVER))
    assert plain.spec["judge"] == {
        "kind": "server",
        "model_name": "judge-1",
        "template": {"name": "ranking", "sha256": TEMPLATES["ranking"].digest},
        "labels": ["m", "M"],
        "temperature": 0.0,
        "top_logprobs": 5,
        "answer_tokens": 1,
        "max_unparsable": 0.0,
    }
    machine = {
        "base_url": "https://other/v1",
        "api_key_env": "MY_KEY",
        "concurrency": 2,
        "timeout_seconds": 5.0,
        "retries": 0,
        "prices": {"input": 1.0, "output": 2.0},
    }
    elsewhere = judgement(planned(SERVER | machine))
    assert elsewhere.id == plain.id
    assert elsewhere.execution == {"judge": machine}
    changes = {"model_name": "b", "template": "one_turn", "labels": ["1", "2"], "top_logprobs": 9, "answer_tokens": 2}
    changes |= {"labelled_pairs": 5}
    ids = {judgement(planned(SERVER | {key: value})).id for key, value in changes.items()}
    assert len(ids | {plain.id}) == len(changes) + 1


def test_no_key_reaches_a_spec(planned, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    plan = planned(SERVER | {"api_key_env": "MY_KEY"})
    assert "sk-secret" not in json.dumps([node.to_json() for node in plan.nodes.values()])


def test_a_local_judge_is_a_parent(planned, tmp_path):
    tokenizer = judge_tokenizer()
    folder = folder_of(tiny_judge(tokenizer), tokenizer, tmp_path / "tiny")
    plan = planned("near", {"near": {"kind": "lm", "model": "tiny"}})
    node = judgement(plan)
    judge = plan.nodes[node.parents["judge"]]
    assert (judge.stage, judge.execution) == ("base", {"path": str(folder)})
    assert node.spec["judge"]["precision"] == "fp32"
    assert node.execution == {}
    assert judgement(planned({"kind": "lm", "model": {"kind": "local", "path": "tiny"}})) == node
    (folder / "generation_config.json").write_text("{}")
    assert judgement(planned({"kind": "lm", "model": "tiny"})).id != node.id
    with pytest.raises(BadInput, match="a model from scratch judges at random; name a local or hub model"):
        planned({"kind": "lm", "model": "new"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "http://me:pw@host/v1"}, "may hold a secret; use 'api_key_env'"),
        ({"base_url": "host/v1"}, "expected an address such as https://host/v1"),
        ({"labels": ["m", "m"]}, "both labels are 'm'; the answers need different names"),
        ({"labels": ["m"]}, "labels: list should have at least 2 items"),
        ({"template": "rankin"}, "template: unknown value 'rankin'; did you mean 'ranking'?"),
        ({"api_key": "sk-1"}, "unknown key '.*api_key'; did you mean 'api_key_env'"),
        ({"max_unparsable": 1.5}, "max_unparsable: input should be less than or equal to 1"),
        ({"top_logprobs": 1}, "top_logprobs: input should be greater than or equal to 2"),
    ],
)
def test_mistakes_are_one_line(change, message, planned):
    with pytest.raises(BadInput, match=message):
        parse(JudgeSpec, SERVER | change, "judges.yaml")
    with pytest.raises(BadInput, match=f"evaluate.judge.*{message}|{message}"):
        planned(SERVER | change)


def test_a_pairwise_judge_gives_no_reward_to_claim(planned):
    claim = {"claim": "c", "arm": "dpo", "metric": "reward_advantage", "than": "reference", "source": "s"}
    with pytest.raises(BadInput, match="gives no reward; claim the metric 'win_rate'"):
        planned(SERVER, expect=[claim])
    planned(SERVER, expect=[claim | {"metric": "win_rate"}])


@pytest.mark.parametrize("judge", [SERVER, {"kind": "lm", "model": "tiny"}, "gpt4_turbo"])
def test_a_grid_takes_no_pairwise_judge(judge):
    with pytest.raises(
        BadInput, match=r"f: judge: a grid scores every answer alone.*belongs into an item without cond"
    ):
        parse(GridEvaluateSpec, {"judge": judge}, "f")


def test_the_shipped_judges_are_valid(root):
    entries = load_yaml(root / "config" / "judges.yaml")
    assert {parse(JudgeSpec, entry, name).kind for name, entry in entries.items()} == {"lm", "server"}
