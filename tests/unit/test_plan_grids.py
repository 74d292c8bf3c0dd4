"""Planning grids: which runs a declaration asks for, what they share, the quick part, and wishes that are refused."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest

from artifact_builds import plan_items
from prefopt.errors import BadInput

TRAIN = {"steps": 2, "batch_size": 4}
WORLD = {"source": {"kind": "world"}, "splits": {"train": 0.6, "judge": 0.1, "validation": 0.1, "test": 0.2}}


def biased(rho):
    return {**WORLD, "source": {"kind": "world", "labels": "oracle", "rho": rho}}


def declare(**changes):
    item = {
        "item": {"paper": "own", "name": "x", "title": "t"},
        "layout": "by_condition",
        "model": {"kind": "scratch"},
        "tokens": {},
        "reference": {"data": WORLD, "sft": {"train": TRAIN}},
        "conditions": {"low": {"data": biased(0.2), "value": 0.2}, "high": {"data": biased(0.8), "value": 0.8}},
        "rewards": {
            "single": {"members": 1, "train": TRAIN},
            "biased": {"members": 2, "longer_wins": [0.4, 0.6], "train": TRAIN},
            "truth": {"oracle": True},
        },
        "samples": {},
        "policy": {**TRAIN, "learning_rate": 1e-3},
        "arms": {
            "dpo": {"loss": {"name": "dpo", "beta": 0.1}, "vary": {"beta": [0.1, 0.5], "learning_rate": [1e-3, 1e-4]}},
            "e_dpo": {"loss": {"name": "e_dpo", "beta": 0.1}, "rewards": "biased", "vary": {"beta": [0.1, 0.5]}},
            "truth": {
                "loss": {"name": "d_dpo", "beta": 0.1},
                "rewards": "truth",
                "conditions": ["low"],
                "control": True,
            },
        },
        "seeds": [0, 1, 2],
        "evaluate": {
            "sets": {"test": {"data": WORLD}, "validation": {"data": WORLD, "split": "validation", "kl": False}},
            "select": {},
        },
        "quick": {"conditions": ["low"], "seeds": [0, 1], "only": {"beta": [0.5]}},
    }
    item.update(changes)
    return item


@pytest.fixture
def planned(tmp_path):
    return partial(plan_items, tmp_path)


def trials(plan):
    return {ref: node for ref, node in plan.nodes.items() if ref.startswith("trials/")}


def grid_of(plan, name="own/x"):
    return plan.items[name].spec["grid"]


def test_every_condition_arm_point_and_seed_is_one_trial(planned):
    plan = planned(declare(), full=True)
    points = [(p["condition"], p["arm"], p["settings"]["beta"]) for p in grid_of(plan)["points"]]
    dpo = [("dpo", beta) for beta, _ in product((0.1, 0.5), (1e-3, 1e-4))]
    e_dpo = [("e_dpo", 0.1), ("e_dpo", 0.5)]
    assert points == [("low", *p) for p in (*dpo, *e_dpo, ("truth", 0.1))] + [("high", *p) for p in (*dpo, *e_dpo)]
    assert len(trials(plan)) == 3 * (13 + 1)  # and the reference for every seed


def test_settings_name_parameters_and_learning_rate(planned):
    points = grid_of(planned(declare(), full=True))["points"]
    assert points[1] == {"condition": "low", "arm": "dpo", "settings": {"beta": 0.1, "learning_rate": 1e-4}}
    assert points[4]["settings"] == {"beta": 0.1, "learning_rate": 1e-3}


def test_a_point_is_trained_with_its_own_settings(planned):
    plan = planned(declare(), full=True)
    parents = plan.items["own/x"].parents
    for number, point in enumerate(grid_of(plan)["points"]):
        spec = plan.nodes[parents[f"run.{number}.2"]].spec
        assert spec["loss"]["params"]["beta"] == point["settings"]["beta"]
        assert spec["train"]["learning_rate"] == point["settings"]["learning_rate"]
        assert spec["seed"] == 2


def test_the_quick_part_is_made_of_the_same_trials(planned):
    whole, quick = planned(declare(), full=True), planned(declare())
    assert set(trials(quick)) < set(trials(whole))
    kept = [(p["condition"], p["arm"], *p["settings"].values()) for p in grid_of(quick)["points"]]
    dpo = [("low", "dpo", 0.5, 1e-3), ("low", "dpo", 0.5, 1e-4)]
    # beta is fixed, not varied, in the last arm
    assert kept == [*dpo, ("low", "e_dpo", 0.5, 1e-3), ("low", "truth", 0.1, 1e-3)]
    assert (grid_of(quick)["tier"], grid_of(whole)["tier"]) == ("quick", "full")
    assert grid_of(quick)["seeds"] == [0, 1]


def test_reference_model_scores_and_samples_are_shared(planned):
    plan = planned(declare(), full=True)
    stages = [ref.split("/")[0] for ref in plan.nodes]
    assert [stages.count(s) for s in ("base", "sft", "samples", "reference")] == [1, 1, 1, 2]
    (samples,) = (node for ref, node in plan.nodes.items() if ref.startswith("samples/"))
    (sft,) = (node for ref, node in plan.nodes.items() if ref.startswith("sft/"))
    assert samples.parents["tokens"] == sft.parents["tokens"], "samples answer the reference's own training prompts"


def test_two_items_share_the_runs_that_they_both_declare(planned):
    other = declare(item={"paper": "own", "name": "y", "title": "t"}, conditions={"other_name": {"data": biased(0.2)}})
    other["arms"] = {"renamed": {"loss": {"name": "dpo", "beta": 0.5}}}
    other["quick"] = {}
    plan = planned(declare(), other, full=True)
    mine = {ref for role, ref in plan.items["own/y"].parents.items() if role.startswith("run.")}
    assert mine <= {ref for role, ref in plan.items["own/x"].parents.items() if role.startswith("run.")}


def test_changing_one_beta_changes_only_that_arm(planned):
    before = trials(planned(declare(), full=True))
    changed = declare()
    changed["arms"]["e_dpo"]["vary"] = {"beta": [0.1, 0.7]}
    new = set(trials(planned(changed, full=True))) - set(before)
    assert {ref.split("/")[1].rsplit("-", 2)[0] for ref in new} == {"distill-ensemble"}
    assert len(new) == 2 * 3  # two conditions, three seeds


def test_captions_and_claims_change_no_run(planned):
    before = trials(planned(declare(), full=True))
    changed = declare(item={"paper": "own", "name": "x", "title": "another title"})
    changed["arms"]["dpo"]["label"] = "DPO"
    claim = {"kind": "compare", "claim": "c", "source": "s", "metric": "reward", "arm": "e_dpo", "than": "dpo"}
    assert trials(planned(changed | {"expect": [claim]}, full=True)) == before


def test_parents_follow_the_needs_of_the_loss(planned):
    plan = planned(declare(), full=True)
    always = {"tokens", "model", "set.test.tokens", "set.test.pairs", "set.validation.tokens", "set.validation.pairs"}
    roles = {
        node.spec["loss"]["name"] if node.spec["loss"] else None: set(node.parents) for node in trials(plan).values()
    }
    assert roles["dpo"] == always | {"reference"}
    assert roles["distill_ensemble"] == always | {"reference", "rewards", "samples"}
    assert roles[None] == always - {"tokens"}


def test_the_oracle_as_reward_trains_nothing(planned):
    plan = planned(declare(), full=True)
    oracle = [node for ref, node in plan.nodes.items() if ref.startswith("ensemble/oracle")]
    assert [set(node.parents) for node in oracle] == [{"tokens", "pairs"}]


def test_members_of_different_bias_are_named_beside_the_arm_that_matches_them(planned):
    arms = grid_of(planned(declare(), full=True))["arms"]
    assert {name: arm["member_bias"] for name, arm in arms.items()} == {
        "dpo": None,
        "e_dpo": [0.4, 0.6],
        "truth": None,
    }


def test_other_dispersions_have_other_parents(planned):
    arms = {
        name: {"loss": {"name": "mallows_theta", "beta": 0.1}, "dispersion": {"estimator": name}, "rewards": "biased"}
        for name in ("token_entropy", "vote_entropy", "truth")
    }
    plan = planned(declare(arms=arms, quick={}), full=True)
    roles = {n.spec["estimator"]: set(n.parents) for ref, n in plan.nodes.items() if ref.startswith("dispersion/")}
    own = {"tokens", "reference"}
    assert roles == {"token_entropy": own, "vote_entropy": own | {"rewards"}, "truth": own | {"pairs"}}


def test_a_classifier_judges_from_data_of_its_own(planned):
    words = {"source": {"kind": "world", "labels": "polarity", "closed_fraction": 0.0, "domain": "away"}}
    evaluate = {"sets": {"test": {"data": WORLD}}, "judge": {"classifier": words}}
    plan = planned(declare(evaluate=evaluate), full=True)
    (classifier,) = (node for ref, node in plan.nodes.items() if ref.startswith("classifier/"))
    assert plan.nodes[classifier.parents["pairs"]].spec["source"]["labels"] == "polarity"
    assert all(node.parents["classifier"] == classifier.ref for node in trials(plan).values())


def test_the_histogram_layout_needs_no_arms(planned):
    item = {key: value for key, value in declare().items() if key not in ("arms", "policy", "evaluate", "quick")}
    plan = planned(item | {"layout": "histogram"}, full=True)
    assert not trials(plan)
    assert set(plan.items["own/x"].parents) == {
        f"{role}.{c}" for role in ("dispersion", "pairs") for c in ("low", "high")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quick": {"arms": ["dop"]}}, "quick.arms: the item has no 'dop'; did you mean 'dpo'"),
        ({"quick": {"only": {"beta": [7.0]}}}, "quick.only.beta: none of .7.0. is a value that arms.dpo varies"),
        ({"arms": {"a": {"loss": {"name": "dpo", "beta": 0.1}, "vary": {"beat": [1.0]}}}}, "no setting 'beat'"),
        ({"arms": {"a": {"loss": {"name": "dop", "beta": 0.1}}}}, "arms.a.loss: unknown loss 'dop'"),
        ({"arms": {"a": {"loss": {"name": "dpo", "beta": 0.1}, "against": "b"}}}, "arms.a.against: no arm 'b'"),
        ({"arms": {"a": {"loss": {"name": "dpo", "beta": 0.1}, "conditions": ["lo"]}}}, "arms.a.conditions"),
        ({"arms": {"a": {"loss": {"name": "d_dpo", "beta": 0.1}}}}, "arms.a: it needs reward models"),
        (
            {"evaluate": {"sets": {"test": {"data": WORLD}}, "select": {"set": "tset"}}},
            "evaluate.select: no set 'tset'",
        ),
        ({"layout": "bars", "arms": {}}, "the layout 'bars' needs arms"),
        ({"layout": "histogram"}, "takes no arms"),
    ],
)
def test_wrong_wishes_are_refused_in_one_sentence(planned, changes, message):
    with pytest.raises(BadInput, match=message):
        planned(declare(**changes), full="quick" not in changes)


def test_claims_are_checked_against_the_whole_grid_also_in_the_quick_tier(planned):
    def claim(**more):
        return {"kind": "compare", "claim": "c", "source": "s", "metric": "reward", "arm": "dpo", "than": 0.0} | more

    planned(declare(expect=[claim(conditions=["high"], arm_at={"beta": 0.1})]))  # of the full tier only
    with pytest.raises(BadInput, match="hihg"):
        planned(declare(expect=[claim(conditions=["hihg"])]))
    with pytest.raises(BadInput, match="e_dop"):
        planned(declare(expect=[claim(than="e_dop")]))
