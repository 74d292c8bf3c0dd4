"""What the related methods need beside the pairs: token sets, calibrated rewards, rewrites, heads, and their wiring."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import tiny
from artifact_builds import make_all, plan_of, trial_of
from prefopt.artifacts import MANIFEST, Node
from prefopt.builds import Build
from prefopt.calibration import expected_win_rates, pair_win_rates
from prefopt.errors import BadInput, TryAgain
from prefopt.files import read_json, read_lines
from prefopt.heads import head_margin, heads_on, prompt_value
from prefopt.methods_page import page_with_tables
from prefopt.models import load_causal_lm
from prefopt.objectives import Moment, PolicyObjective
from prefopt.pairs import digest63
from prefopt.procedures import PROCEDURES
from prefopt.rewriting import rewrite_chosen
from prefopt.scoring import response_scores
from prefopt.specs import TrainSpec
from prefopt.stages import RunOptions
from prefopt.stages.policy import collect_signals
from prefopt.stages.tables import token_rows
from prefopt.stages.weights import weights_of
from prefopt.tables import read_table
from prefopt.token_sets import diff_masks, shared_subset
from prefopt.trainer import Visits, train

# --- token sets -------------------------------------------------------------------------------------------------------


def common_length(first, second):
    """Length of a longest common subsequence, by the textbook recurrence."""
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        same = first[i] == second[j]
        table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_diff_masks_leave_a_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(300):
        first, second = ([draw.randrange(5) for _ in range(draw.randint(0, 12))] for _ in range(2))
        masks = diff_masks(first, second)
        kept = [
            [x for x, m in zip(side, mask, strict=True) if m == 0]
            for side, mask in zip((first, second), masks, strict=True)
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) == common_length(first, second)


def test_diff_masks_by_hand():
    # "a b c d" against "a x c": b and d stand alone, x does; equal sequences differ in nothing.
    masks = diff_masks([1, 2, 3, 4], [1, 9, 3])
    assert [m.tolist() for m in masks] == [[0, 1, 0, 1], [0, 1, 0]]
    assert sum(m.sum() for m in diff_masks([5, 6, 5], [5, 6, 5])) == 0
    long = list(range(3000))
    masks = diff_masks(long, [x for x in long if x % 7])
    assert masks[0].sum() == len([x for x in long if x % 7 == 0])
    assert masks[1].sum() == 0


def test_shared_subsets_have_the_shorter_length_and_depend_on_seed_step_and_pair_alone():
    again = [shared_subset(7, 3, 1, 9, 4) for _ in range(2)]
    assert [m.tolist() for m in again[0]] == [m.tolist() for m in again[1]]
    assert [m.sum() for m in again[0]] == [4, 4]
    assert [len(m) for m in again[0]] == [9, 4]
    others = [shared_subset(*key, 9, 4)[0].tolist() for key in ((8, 3, 1), (7, 4, 1), (7, 3, 2))]
    assert again[0][0].tolist() not in others
    assert shared_subset(2**63 - 1, 0, 0, 5, 5)[0].tolist() == [1.0] * 5
    # Every place is drawn equally often: 4 of 9 over 3000 steps, within four standard deviations.
    counts = sum(shared_subset(7, step, 0, 9, 4)[0] for step in range(3000))
    sd = math.sqrt(3000 * 4 / 9 * 5 / 9)
    assert np.abs(counts - 3000 * 4 / 9).max() < 4 * sd


# --- calibrated rewards -----------------------------------------------------------------------------------------------


def test_expected_win_rate_vectors():
    first, second = [2, 0.5, -0.3, -1.2], [0.2, 0.9, 0.1, -0.4]
    member0 = [0.8957619307940078, 0.572644913283478, 0.37069932750408247, 0.1608938284184317]
    member1 = [0.5008159071788564, 0.7146657454461124, 0.46916855419843406, 0.3153497931765971]
    assert expected_win_rates(np.array([first]).T) == pytest.approx(member0, rel=1e-12)
    assert expected_win_rates(np.array([second]).T) == pytest.approx(member1, rel=1e-12)
    mean = [0.6982889189864321, 0.6436553293647952, 0.41993394085125824, 0.2381218107975144]
    both = expected_win_rates(np.array([first, second]).T)
    assert both == pytest.approx(mean, rel=1e-12)
    assert both[0] - both[3] == pytest.approx(0.4601671081889177, rel=1e-12)


def test_win_rates_sum_to_half_the_responses_and_ignore_a_models_shift():
    scores = np.random.default_rng(0).normal(size=(6, 5, 3))
    rates = expected_win_rates(scores)
    assert rates.sum(axis=-1) == pytest.approx(np.full(6, 2.5), rel=1e-12)
    assert expected_win_rates(scores + np.array([10, -3, 0.5])) == pytest.approx(rates, rel=1e-10)
    assert ((rates > 0) & (rates < 1)).all()
    with pytest.raises(ValueError, match="two responses"):
        expected_win_rates(scores[:, :1])


def test_a_pair_alone_has_twice_the_sigmoid_minus_one():
    chosen, rejected = pair_win_rates([[1.0, 0.5]], [[0.2, 0.9]], np.empty((1, 0, 2)))
    expected = np.mean([2 / (1 + math.exp(-d)) - 1 for d in (0.8, -0.4)])
    assert (chosen - rejected).item() == pytest.approx(expected, rel=1e-12)


# --- rewriting --------------------------------------------------------------------------------------------------------


def pair_table():
    prompt = [{"role": "user", "content": "what is it"}]
    rows = [
        {"prompt": prompt, "chosen": f"good {n}", "rejected": f"bad {n}", "split": split}
        for n, split in enumerate(["train", "test", "train"])
    ]
    for row in rows:
        row |= {"pair_id": digest63([prompt, row["chosen"], row["rejected"]]), "prompt_id": 5, "source": "s"}
    return pd.DataFrame(rows)


def test_only_the_chosen_responses_of_the_split_are_rewritten():
    before = pair_table()
    after = rewrite_chosen(
        before, lambda _p, chosen, rejected: rejected.replace("bad", "better") if "0" in chosen else None
    )
    assert after["chosen"].tolist() == ["better 0", "good 1", "good 2"]
    assert after.drop(columns=["chosen", "pair_id"]).equals(before.drop(columns=["chosen", "pair_id"]))
    assert after["pair_id"].tolist()[1:] == before["pair_id"].tolist()[1:]
    prompt = before["prompt"][0]
    assert after["pair_id"][0] == digest63([prompt, "better 0", "bad 0"])
    everything = rewrite_chosen(before, lambda _p, chosen, _r: chosen + " !", split=None)
    assert everything["chosen"].tolist() == ["good 0 !", "good 1 !", "good 2 !"]


@pytest.mark.parametrize("text", ["", "  ", "bad 0", 7])
def test_a_rewrite_that_is_no_answer_is_refused(text):
    with pytest.raises(BadInput, match="rewriter returned"):
        rewrite_chosen(pair_table(), lambda *_: text)


# --- heads ------------------------------------------------------------------------------------------------------------

PAIRS = tiny.pairs(24, seed=3)
SPEC = TrainSpec(steps=6, batch_size=8, learning_rate=3e-3)


def objective_of(loss, **signals):
    draw = np.random.default_rng(1)
    with torch.no_grad():
        reference = {
            f"ref_{side}_logp": response_scores(
                tiny.causal_lm(), PAIRS["prompt_ids"], PAIRS[f"{side}_ids"]
            ).logp.tolist()
            for side in ("chosen", "rejected")
        }
    rewards = {f"{side}_reward": draw.normal(size=(24, 3)) for side in ("chosen", "rejected")}
    signals = {**reference, **rewards, "auxiliary_reward": draw.normal(size=24), **signals}
    return PolicyObjective(**PAIRS, pair_ids=range(24), loss=loss, loss_params={"beta": 0.1}, signals=signals)


@pytest.mark.parametrize(("loss", "head"), [("drdo", "reward"), ("hpo", "value"), ("beta_dpo_filtered", "gap")])
def test_heads_train_with_the_model_are_checkpointed_and_leave_no_trace(tmp_path, loss, head):
    def run(folder, stop_at=None):
        model, objective = tiny.causal_lm(), objective_of(loss)
        names = set(dict(model.named_parameters()))

        def stop(_model, step):
            if step == stop_at:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

        with heads_on(model, objective.pair_loss.needs):
            settings = {"seed": 5, "micro_batch": 4, "checkpoint_steps": 2, "device": "cpu", "progress": False}
            settings |= {"micro_batch": 8} if not objective.divisible else {}
            train(model, objective, SPEC, state_dir=tmp_path / folder, visits=Visits({3}, stop), **settings)
            part = model.objective_heads[head]
            weight = (part.state if head == "gap" else part.weight).detach().clone()
        assert set(dict(model.named_parameters())) == names
        return weight, [p.detach().clone() for p in model.parameters()]

    whole = run("whole")
    assert whole[0].abs().max() > 0
    with pytest.raises(TryAgain):
        run("cut", stop_at=3)
    resumed = run("cut")
    assert torch.equal(whole[0], resumed[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[1], resumed[1], strict=True))


def test_head_values_are_those_of_the_states_at_the_last_tokens():
    model = tiny.causal_lm()
    prompts, responses = (
        [[1, 5, 6], [1, 7]],
        [[8, 9], [10, 2]],
    )
    with heads_on(model, frozenset({"reward_head", "auxiliary"})):
        for name in ("reward", "value"):
            torch.nn.init.normal_(model.objective_heads[name].weight)
        both = [*responses, [11, 12, 2], [13]]
        margin, value = head_margin(model, prompts, both), prompt_value(model, prompts)
        weights = {name: model.objective_heads[name].weight[0] for name in ("reward", "value")}

        def state(ids):
            return model.base_model(torch.tensor([ids]), use_cache=False)[0][0, -1]

        rewards = [weights["reward"] @ state(prompts[n % 2] + ids) for n, ids in enumerate(both)]
        expected = torch.stack([rewards[0] - rewards[2], rewards[1] - rewards[3]])
        torch.testing.assert_close(margin, expected, rtol=1e-4, atol=1e-5)
        values = torch.stack([weights["value"] @ state(prompt) for prompt in prompts])
        torch.testing.assert_close(value, values, rtol=1e-4, atol=1e-5)
        # The value's gradient stops at the head, the margin's goes on into the body.
        body = next(model.base_model.parameters())
        assert torch.autograd.grad(value.sum(), body, allow_unused=True)[0] is None
        assert torch.autograd.grad(margin.sum(), body)[0].abs().sum() > 0


def test_a_loss_without_needs_of_heads_gets_none():
    model = tiny.causal_lm()
    with heads_on(model, frozenset({"reference"})):
        assert not hasattr(model, "objective_heads")


def test_subsets_are_drawn_anew_at_every_step_and_the_same_in_any_micro_batch():
    tokens = {
        f"ref_{side}_token_logp": [[-1.0] * len(row) for row in PAIRS[f"{side}_ids"]] for side in ("chosen", "rejected")
    }
    objective, model = objective_of("sampo", **tokens), tiny.causal_lm()
    rows = list(range(24))
    first, second = (objective.batch(model, rows, step) for step in (0, 1))
    assert not torch.equal(first.chosen_subset, second.chosen_subset)
    shorter = torch.minimum(first.chosen_tokens, first.rejected_tokens)
    for side in ("chosen", "rejected"):
        subset, mask = getattr(first, f"{side}_subset"), getattr(first, f"{side}_mask")
        assert torch.equal(subset.sum(1), shorter)
        assert (subset <= mask).all()
    part = objective.batch(model, [5, 17], 0)
    width = part.chosen_subset.shape[1]
    assert torch.equal(part.chosen_subset, first.chosen_subset[[5, 17], :width])
    whole, _ = objective.loss(model, rows, Moment(2, 4, 0))
    halves = [objective.loss(model, half, Moment(2, 4, 0))[0] for half in (rows[:9], rows[9:])]
    torch.testing.assert_close(whole, sum(halves), rtol=1e-5, atol=1e-5)


# --- wiring -----------------------------------------------------------------------------------------------------------

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
