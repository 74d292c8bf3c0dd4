"""Planning: what shares an artifact, what re-runs, and which wishes are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from artifact_builds import plan_items
from prefopt.errors import BadInput
from prefopt.plan import readable_name

TRAIN = {"steps": 2, "batch_size": 4}


def declare(**changes):
    item = {
        "item": {"paper": "own", "name": "x", "title": "t"},
        "data": {"source": {"kind": "world"}, "splits": {"train": 0.6, "judge": 0.2, "test": 0.2}},
        "model": {"kind": "scratch"},
        "tokens": {},
        "sft": {"train": TRAIN},
        "rewards": {"single": {"members": 1, "train": TRAIN}, "three": {"members": 3, "train": TRAIN}},
        "samples": {},
        "policy": TRAIN,
        "arms": {
            "dpo": {"loss": {"name": "dpo", "beta": 0.1}},
            "simpo": {"loss": {"name": "simpo", "beta": 2.0, "target_margin": 0.5}},
            "theta": {"loss": {"name": "mallows_theta", "beta": 0.1}},
            "distill": {"loss": {"name": "distill", "beta": 0.1}, "rewards": "single"},
            "e_dpo": {"loss": {"name": "e_dpo", "beta": 0.1}, "rewards": "three"},
        },
        "seeds": [0, 1],
        "evaluate": {"judge": "oracle"},
    }
    item.update(changes)
    return item


@pytest.fixture
def planned(tmp_path):
    return partial(plan_items, tmp_path)


def refs(plan, stage):
    return {ref for ref in plan.nodes if ref.startswith(f"{stage}/")}


def parents_of(plan, name):
    return {
        role for node in plan.nodes.values() if node.stage == "policy" and node.name == name for role in node.parents
    }


def test_a_loss_gets_exactly_the_parents_it_needs(planned):
    plan = planned(declare())
    assert parents_of(plan, "dpo-s0") == {"tokens", "model", "reference"}
    assert parents_of(plan, "simpo-s0") == {"tokens", "model"}
    assert parents_of(plan, "mallows-theta-s0") == {"tokens", "model", "reference", "dispersion"}
    assert parents_of(plan, "distill-s0") == {"tokens", "model", "reference", "rewards"}
    assert parents_of(plan, "e-dpo-s0") == {"tokens", "model", "reference", "rewards", "samples"}


def test_shared_things_are_planned_once(planned):
    plan = planned(declare())
    # 5 arms x 2 seeds; the single reward model is member 0 of the three
    counts = {stage: len(refs(plan, stage)) for stage in ("pairs", "sft", "reference", "reward", "ensemble", "policy")}
    assert counts == {"pairs": 1, "sft": 1, "reference": 1, "reward": 3, "ensemble": 2, "policy": 10}
    # one baseline for all, one set of answers per policy
    assert len(refs(plan, "generations")) == 11


def test_two_items_share_what_they_have_in_common(planned):
    one = planned(declare())
    other = declare(item={"paper": "another", "name": "y", "title": "t"}, arms={"dpo": declare()["arms"]["dpo"]})
    both = planned(declare(), other)
    new = set(both.nodes) - set(one.nodes)
    assert {ref.split("/")[0] for ref in new} == {"papers"}


def test_one_changed_beta_changes_one_branch(planned):
    before = planned(declare())
    arms = {**declare()["arms"], "dpo": {"loss": {"name": "dpo", "beta": 0.2}}}
    after = planned(declare(arms=arms))
    changed = sorted(ref.split("/")[0] for ref in set(after.nodes) - set(before.nodes))
    # two seeds of: policy, generations, judgements, metrics; and the item above them
    assert changed == sorted(["policy", "generations", "judgements", "metrics"] * 2 + ["papers"])


def test_a_changed_title_makes_only_the_item_again(planned):
    before = planned(declare())
    after = planned(declare(item={"paper": "own", "name": "x", "title": "another title"}))
    assert {ref.split("/")[0] for ref in set(after.nodes) - set(before.nodes)} == {"papers"}


def test_shuffle_seed_counts_only_where_something_is_shuffled(planned):
    def ids(dispersion):
        arms = {"theta": {"loss": {"name": "mallows_theta", "beta": 0.1}, "dispersion": dispersion}}
        return refs(planned(declare(arms=arms)), "dispersion")

    assert ids({"seed": 0}) == ids({"seed": 1})
    assert ids({"control": "shuffled", "seed": 0}) != ids({"control": "shuffled", "seed": 1})


def test_sequence_entropy_samples_every_prompt_and_forward_kl_the_training_prompts(planned):
    sampled = {"norm": "mc_sequence", "samples": 4}
    arms = {"theta": {"loss": {"name": "mallows_theta", "beta": 0.1}, "dispersion": sampled}}
    plan = planned(declare(arms=arms))
    (samples,) = (plan.nodes[ref] for ref in refs(plan, "samples"))
    assert (samples.spec["split"], samples.spec["per_prompt"]) == ("all", 4)
    (dispersion,) = (plan.nodes[ref] for ref in refs(plan, "dispersion"))
    assert set(dispersion.parents) == {"tokens", "reference", "samples"}
    plan = planned(declare())
    (samples,) = (plan.nodes[ref] for ref in refs(plan, "samples"))
    assert (samples.spec["split"], samples.spec["per_prompt"]) == ("train", 1)


def test_reachable_lists_parents_first(planned):
    plan = planned(declare())
    seen = set()
    for node in plan.reachable(plan.items.values()):
        assert set(node.parents.values()) <= seen
        seen.add(node.ref)
    assert seen == set(plan.nodes)


def test_writing_specs_again_touches_nothing(planned, tmp_path):
    plan = planned(declare())
    plan.write_specs(tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "specs").rglob("*.json")}
    assert len(files) == len(plan.nodes)
    plan.write_specs(tmp_path)
    assert files == {p: p.stat().st_mtime_ns for p in files}


def test_editing_a_data_file_changes_every_id_moving_it_none(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = {"judge": {"members": 1, "split": "judge", "train": TRAIN}}

    def ids(folder):
        source = {"kind": "files", "paths": ["d.jsonl"]}
        item = declare(data={**declare()["data"], "source": source}, evaluate=judge)
        return set(planned(item, data_root=str(folder)).nodes)

    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "d.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    first = ids("a")
    assert ids("b") == first
    Path("b", "d.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "x"}\n')
    assert not ids("b") & first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arms": {"a": {"loss": {"name": "mallows_teta", "beta": 0.1}}}}, "did you mean 'mallows_theta'"),
        ({"arms": {"a": {"loss": {"name": "dpo", "bta": 0.1}}}}, "unknown parameter 'bta'; did you mean 'beta'"),
        ({"arms": {"a": {"loss": {"name": "dpo"}}}}, "missing parameter 'beta'"),
        ({"arms": {"a": {"loss": {"name": "distill", "beta": 0.1}}}}, "set 'rewards' to one of"),
        ({"arms": {"a": {"loss": {"name": "distill", "beta": 0.1}, "rewards": "singel"}}}, "did you mean 'single'"),
        ({"samples": None}, "arms.e_dpo: needs reference samples"),
        ({"samples": {"temperature": 0.7}}, "set temperature and top_p to 1"),
        ({"evaluate": {"against": "dop"}}, "evaluate.against: no arm 'dop'; did you mean 'dpo'"),
        ({"evaluate": {"judge": {"members": 1, "train": TRAIN}}}, "trains on 'split: judge'"),
        ({"data": {"source": {"kind": "files", "paths": ["gone.jsonl"]}}}, "gone.jsonl: no such file"),
        ({"data": "no_such_set"}, "no such file"),
        ({"tokens": {"max_prompt_tokens": 80, "max_length": 90}}, "up to 112 tokens"),
        ({"model": {"kind": "local", "path": "nowhere"}}, "no config.json, so this is no Hugging Face model folder"),
        (
            {"expect": [{"claim": "c", "arm": "dop", "metric": "win_rate", "than": "dpo", "source": "s"}]},
            "no arm 'dop'",
        ),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_in_one_line(planned, changes, expected):
    with pytest.raises(BadInput) as caught:
        planned(declare(**changes))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_folder_without_tokenizer_is_refused(planned, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="model folder without tokenizer"):
        planned(declare(model={"kind": "local", "path": str(tmp_path / "m")}))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("train-b0.2-s0", "train-b0.2-s0"),
        ("My Pairs (1)", "my-pairs-1"),
        ("Llama_3.1_8B", "llama-3.1-8b"),
        ("数据", "unnamed"),
    ],
)
def test_names_in_ids_are_plain(given, name):
    assert readable_name(given) == name
