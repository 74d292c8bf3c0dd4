"""Arms in rounds: what a declaration plans and what the stages make of it, against arithmetic and plain functions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from artifact_builds import make_all, plan_of, trial_of
from loss_batches import ADVANTAGE, TOKENS, close, t, three_pairs
from prefopt.calibration import expected_win_rates
from prefopt.engine.answers import Mixture, draw_answers, log_ratio
from prefopt.engine.bulk import score_responses
from prefopt.engine.reward_models import load_reward_model
from prefopt.errors import BadInput
from prefopt.files import read_json, read_lines
from prefopt.inputs.rendering import response_texts
from prefopt.losses import LOSSES
from prefopt.models import load_causal_lm, load_tokenizer
from prefopt.outer.annotator_types import expectation, min_max_regret
from prefopt.outer.choice import chosen_and_rejected, fronts
from prefopt.outer.general_preference import scores
from prefopt.outer.rounds import advantage_policy, advantage_regression, extrapolated
from prefopt.outer.weights import extrapolate
from prefopt.pairs import build_pairs
from prefopt.procedures import PROCEDURES
from prefopt.scoring import reward_scores
from prefopt.specs import DataSpec, SamplingSpec
from prefopt.stages import RunOptions
from prefopt.tables import read_table
from prefopt.world import Raters, WorldParams, cast_votes, generate_pairs, oracle_reward

WORLD = {
    "source": {"kind": "world", "prompts": 120, "pairs": 120},
    "splits": {"train": 0.5, "judge": 0.1, "test": 0.4},
}
TRAIN = {"steps": 3, "batch_size": 8, "learning_rate": 3e-3}
DPO = {"name": "dpo", "beta": 0.1}
FRESH = {"labels": "truth", "prompts": 20}
ARMS = {
    "accelerated": {"loss": DPO, "rounds": {"kind": "accelerated", "count": 2}},
    "fresh": {"loss": DPO, "rounds": {"kind": "accelerated", "count": 2, "momentum": 0.0, "responses": FRESH}},
    "start": {"loss": DPO, "rounds": {"kind": "accelerated", "count": 2, "against": "start"}},
    "discriminator": {
        "loss": DPO,
        "rounds": {
            "kind": "discriminator",
            "count": 2,
            "discriminator": "two",
            "gold": "truth",
            "gold_labels": 4,
            "prompts": 12,
        },
    },
    "apa": {
        "loss": {"name": "apa", "beta": 2.0},
        "rounds": {"kind": "online", "count": 2, "responses": {**FRESH, "per_prompt": 4, "choose": "random"}},
    },
    "gpo": {
        "loss": {"name": "gpo", "beta": 0.5},
        "rounds": {
            "kind": "online",
            "count": 1,
            "responses": {"labels": "general", "per_prompt": 3, "choose": "random", "prompts": 20},
        },
    },
    "dprm": {
        "loss": {"name": "mallows_theta", "beta": 0.1},
        "dispersion": {"estimator": "rating_spread", "ratings": "rated"},
        "conditions": ["raters"],
    },
    "em": {"loss": {"name": "em_dpo", "beta": 0.5}, "rounds": {"kind": "em", "count": 2}, "conditions": ["raters"]},
}
RATERS = {"length_preferences": [12.0, -12.0], "annotators": 10, "votes": 3, "noise": 0.2}


def declare(**changes):
    """Arms that say nothing of conditions run in the first one."""
    arms = {name: {"conditions": ["one"], **arm} for name, arm in changes.pop("arms", ARMS).items()}
    return {
        "item": {"paper": "own", "name": "x", "title": "t"},
        "layout": "ranking",
        "model": {"kind": "scratch", "layers": 1, "hidden": 16, "heads": 2, "intermediate": 32, "max_positions": 96},
        "tokens": {"max_prompt_tokens": 40, "max_length": 90},
        "reference": {"data": WORLD, "sft": {"train": {**TRAIN, "steps": 60, "learning_rate": 1e-2}}},
        "conditions": {
            "one": {"data": {**WORLD, "source": {**WORLD["source"], "seed": 1}}},
            "raters": {"data": {**WORLD, "source": {**WORLD["source"], "raters": RATERS}}},
        },
        "rewards": {
            "two": {"members": 2, "train": TRAIN},
            "truth": {"oracle": True},
            "general": {"kind": "general_preference", "dimension": 2, "train": TRAIN},
            "rated": {"kind": "distributional", "train": TRAIN},
        },
        "samples": {"max_new_tokens": 20, "batch_size": 200},
        "policy": TRAIN,
        "arms": arms,
        "evaluate": {
            "sets": {"test": {"data": WORLD, "prompts": 3}},
            "sampling": {"max_new_tokens": 12},
            "at": [0.0, 1.0],
        },
        **changes,
    }


def planned(folder: Path, **changes):
    return plan_of(folder, declare(**changes))


def parent(plan, node, *roles):
    for role in roles:
        node = plan.node(node.parents[role])
    return node


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every trial of ARMS and all below them, made by the stages in this process."""
    plan = planned(tmp_path_factory.mktemp("rounds"))
    options = RunOptions(micro_batch=16, device="cpu")
    return plan, make_all(plan, [trial_of(plan, arm) for arm in ARMS], options)


def model_of(results, node):
    return load_causal_lm(results / node.ref / "weights", device="cpu")


def weights(results, node):
    return {name: weight.detach().double() for name, weight in model_of(results, node).named_parameters()}


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_rounds_are_chains_of_ordinary_artifacts(tmp_path):
    plan = planned(tmp_path)
    trial = trial_of(plan, "accelerated")
    first, second = (parent(plan, trial, f"round{n}") for n in (1, 2))
    assert trial.spec["evaluate"]["at"] == [0.0, 0.5, 1.0]
    assert (first.stage, second.stage) == ("extrapolated", "extrapolated")
    fits = [parent(plan, one, "model") for one in (first, second)]
    home = parent(plan, trial, "model")
    assert parent(plan, first, "before") == home  # F_0 is the reference
    assert parent(plan, second, "before") == fits[0]
    assert [parent(plan, fit, "model") for fit in fits] == [home, first]
    assert [parent(plan, fit, "reference", "model") for fit in fits] == [home, first]
    assert parent(plan, trial_of(plan, "start"), "round2", "before") == parent(plan, trial_of(plan, "start"), "round1")


def test_a_round_of_its_own_responses_asks_the_arms_prompts_and_keeps_their_reward_models(tmp_path):
    responses = {"labels": "two", "per_prompt": 4, "choose": "pareto"}
    arm = {"loss": {"name": "distill_mean", "beta": 0.1}, "rewards": "two", "rounds": {**ARMS["fresh"]["rounds"]}}
    arm["rounds"]["responses"] = responses
    plan = planned(tmp_path, arms={"own": arm})
    second = parent(plan, trial_of(plan, "own"), "round2")
    pairs = parent(plan, second, "tokens", "pairs")
    assert pairs.spec == {"choose": "pareto", "prompts": None, "oracle": False, "seed": 2}
    samples = parent(plan, pairs, "samples")
    assert samples.spec["per_prompt"] == 4
    assert parent(plan, samples, "model") == parent(plan, trial_of(plan, "own"), "round1")
    home = parent(plan, samples, "tokens")
    assert home.parents["pairs"].startswith("pairs/world")
    member = parent(plan, second, "rewards", "member0", "reward")
    assert member == parent(plan, pairs, "reward0")
    assert parent(plan, member, "tokens") == home
    assert parent(plan, second, "rewards", "tokens") == parent(plan, second, "tokens")


def test_without_a_curve_the_last_round_alone_answers(tmp_path):
    sets = {"test": {"data": WORLD, "prompts": 3}}
    trial = trial_of(planned(tmp_path, evaluate={"sets": sets}), "accelerated")
    assert trial.spec["evaluate"]["at"] == [1.0]
    assert [role for role in trial.parents if role.startswith("round")] == ["round2"]


def test_parameters_of_rounds_can_be_varied(tmp_path):
    arm = {**ARMS["accelerated"], "vary": {"momentum": [0.1, 0.6], "beta": [0.1, 0.5]}}
    plan = planned(tmp_path, arms={"varied": arm})
    points = plan.items["own/x"].spec["grid"]["points"]
    assert [(p["settings"]["momentum"], p["settings"]["beta"]) for p in points] == [
        (0.1, 0.1),
        (0.1, 0.5),
        (0.6, 0.1),
        (0.6, 0.5),
    ]
    assert parent(plan, trial_of(plan, "varied"), "round1").spec == {"momentum": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rounds": {"kind": "accelerated", "responses": {"labels": "one"}}},
            r"responses.labels: no ensemble 'one'",
        ),
        ({"rounds": {"kind": "hurried"}}, "accelerated"),
        ({"rounds": {"kind": "accelerated", "momentum": -0.1}}, "momentum"),
        ({"rounds": {"kind": "accelerated"}, "vary": {"count": [0]}}, "vary: count 0: "),
    ],
)
def test_rounds_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        planned(tmp_path, arms={"bad": {"loss": DPO, **changes}})


def test_fresh_responses_need_samples(tmp_path):
    with pytest.raises(BadInput, match="declare 'samples'"):
        planned(tmp_path, samples=None, arms={"fresh": ARMS["fresh"]})


def test_every_procedure_says_what_it_is():
    for kind, one in PROCEDURES.items():
        assert one.about, kind
        assert one.paper
        assert "kind" not in one.parameters()


# --- weights and pairs ------------------------------------------------------------------------------------------------


def test_weights_that_are_logits_extrapolate_as_policies_do():
    """pi_{t+1} proportional to F (F / F')^alpha: exact where the parameters are the log-probabilities."""
    now, before = ([0.6, 0.3, 0.1], [0.5, 0.3, 0.2])
    models = []
    for policy in (now, before):
        model = torch.nn.Linear(1, 3, bias=False).double()
        model.weight.data = torch.tensor(policy, dtype=torch.float64).log().unsqueeze(1)
        models.append(model)
    extrapolate(*models, 0.3)
    found = models[0](torch.ones(1, 1, dtype=torch.float64)).softmax(-1)[0]
    np.testing.assert_allclose(found.detach(), extrapolated(now, before, 0.3), rtol=1e-12)
    with pytest.raises(BadInput, match="'bias' differs"):
        extrapolate(torch.nn.Linear(1, 3), models[1].float(), 0.3)


@pytest.mark.parametrize("arm", ["accelerated", "start"])
def test_a_round_ends_momentum_beyond_its_fit(made, arm):
    """w = f + .3 (f - f'), f' the fit before or what the round started at."""
    plan, results = made
    end = parent(plan, trial_of(plan, arm), "round2")
    fit, before = (weights(results, parent(plan, end, role)) for role in ("model", "before"))
    for name, weight in weights(results, end).items():
        torch.testing.assert_close(weight, 1.3 * fit[name] - 0.3 * before[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(fit[name], before[name])


def test_pairs_of_a_round_are_its_models_responses_in_the_oracles_order(made):
    plan, results = made
    node = parent(plan, trial_of(plan, "fresh"), "round2", "tokens", "pairs")
    table = read_table(results / node.ref / "pairs.parquet")
    home = read_table(results / parent(plan, node, "pairs").ref / "pairs.parquet")
    train, others = table[table["split"] == "train"], table[table["split"] != "train"]
    kept = home[home["split"] != "train"].reset_index(drop=True)
    assert others.reset_index(drop=True)["pair_id"].tolist() == kept["pair_id"].tolist()
    assert set(train["prompt_id"]) <= set(home.loc[home["split"] == "train", "prompt_id"])
    assert 0 < len(train) <= 20
    worth = [
        [oracle_reward(row.prompt[0]["content"], text) for text in (row.chosen, row.rejected)]
        for row in train.itertuples()
    ]
    assert all(chosen > rejected for chosen, rejected in worth)
    # Of two responses the mean lies half way: advantages are plus and minus half of the difference.
    found = read_table(results / node.ref / "advantages.parquet").set_index("pair_id").loc[train["pair_id"]]
    half = [(chosen - rejected) / 2 for chosen, rejected in worth]
    assert found["chosen_advantage"].tolist() == pytest.approx(half)
    assert found["rejected_advantage"].tolist() == pytest.approx([-value for value in half])


def test_a_trial_of_rounds_answers_with_the_reference_and_after_every_round(made):
    plan, results = made
    trial = trial_of(plan, "accelerated")
    answers = read_table(results / trial.ref / "answers.parquet")
    assert sorted(set(zip(answers["fraction"], answers["step"], strict=True))) == [(0.0, 0), (0.5, 1), (1.0, 2)]
    assert (answers.loc[answers["step"] == 0, "log_ratio"] == 0).all()
    assert (answers.loc[answers["step"] > 0, "log_ratio"] != 0).all()
    gaps = [
        read_json(results / parent(plan, trial, f"round{n}", "model").ref / "manifest.json")["summary"] for n in (1, 2)
    ]
    assert all(gap["step_zero_margin_gap"] < 1e-4 for gap in gaps)  # the reference of a round is where it starts


# --- discriminators that keep learning --------------------------------------------------------------------------------


def test_discriminators_learn_from_all_gold_so_far_and_label_more(made):
    plan, results = made
    trial = trial_of(plan, "discriminator")
    pairs, learned = [], []
    for number in (1, 2):
        silver = parent(plan, trial, f"round{number}", "tokens", "pairs")
        gold = parent(plan, silver, "reward0", "tokens", "pairs")
        assert parent(plan, silver, "reward1", "tokens", "pairs") == gold
        assert silver.parents["samples"] == gold.parents["samples"]
        assert gold.spec["oracle"]
        assert not silver.spec["oracle"]
        pairs.append(read_table(results / silver.ref / "pairs.parquet"))
        learned.append(read_table(results / gold.ref / "pairs.parquet"))
    home = read_table(results / parent(plan, trial, "round1", "tokens", "pairs", "pairs").ref / "pairs.parquet")
    known = set(home["pair_id"])
    for table in learned:  # the arm's own pairs, and up to four of each round, in the oracle's order
        new = table[~table["pair_id"].isin(known)]
        assert known <= set(table["pair_id"])
        assert 0 < len(new) <= 4
        for row in new.itertuples():
            worth = [oracle_reward(row.prompt[0]["content"], text) for text in (row.chosen, row.rejected)]
            assert worth[0] > worth[1]
        known = set(table["pair_id"])
    assert all(0 < (table["split"] == "train").sum() <= 12 for table in pairs)
    assert learned[1]["split"].value_counts()["train"] > learned[0]["split"].value_counts()["train"]


def test_a_policy_that_continues_is_compared_with_the_first_reference(made):
    plan, results = made
    first, second = (parent(plan, trial_of(plan, "discriminator"), f"round{n}") for n in (1, 2))
    home = parent(plan, trial_of(plan, "discriminator"), "model")
    assert parent(plan, second, "model") == first
    assert parent(plan, second, "reference", "model") == home
    assert ("continues" in first.spec, second.spec.get("continues")) == (False, True)
    start = read_lines(results / second.ref / "metrics.jsonl")[0]
    assert start["chosen_log_ratio"] != 0  # it is not where its reference is


def test_a_discriminator_has_to_learn(tmp_path):
    rounds = {**ARMS["discriminator"]["rounds"], "discriminator": "truth"}
    with pytest.raises(BadInput, match="'truth' is the oracle, which does not learn"):
        planned(tmp_path, arms={"bad": {"loss": DPO, "rounds": rounds}})


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantage_losses_are_the_plain_regression():
    """apa: half the squares of both gaps; apa_tokens: outer.advantage_regression of either response's tokens."""
    batch = three_pairs()
    gaps = [[0.5 - 0.4 / 0.1, -0.7 + 0.3 / 0.1], [-0.8 + 0.2 / 0.1, 0.6 - 0.1 / 0.1], [-0.25 - 1.5, -1.1 + 1.5]]
    close(LOSSES["apa"].fn(batch, beta=0.1), [(c**2 + r**2) / 2 for c, r in gaps], 1e-9)
    expected = [
        sum(
            advantage_regression(np.array(TOKENS[side][n]), np.array(TOKENS[f"ref_{side}"][n]), ADVANTAGE[side][n], 0.1)
            for side in ("chosen", "rejected")
        )
        / 2
        for n in range(3)
    ]
    close(LOSSES["apa_tokens"].fn(batch, beta=0.1), expected, 1e-9)


def test_tabular_alignment_ends_at_the_tilted_policy_and_rounds_climb():
    """Regression of every response, weighted by the old policy, has its minimum where log Z is small at old exp(A/lam).

    With lam = 20 spreads of the reward, log Z = Var(A) / (2 lam^2) and the minimum agree to that order; ten rounds from
    there raise the expected reward every time.
    """
    reward, policy = np.array([1.0, 0.2, -0.5, 0.4]), np.array([0.1, 0.4, 0.3, 0.2])
    lam = 20 * reward.std()
    worth = [policy @ reward]
    for _ in range(10):
        old, advantage = policy, reward - policy @ reward

        def loss(logits, old=old, advantage=advantage):
            logp = logits - logsumexp(logits)
            return sum(old * (logp - np.log(old) - advantage / lam) ** 2)

        policy = softmax(minimize(loss, np.log(old), tol=1e-14).x)
        np.testing.assert_allclose(policy, advantage_policy(old, advantage, lam), atol=(advantage.std() / lam) ** 2)
        worth.append(policy @ reward)
    assert (np.diff(worth) > 0).all()


def test_advantages_are_against_all_samples_of_the_prompt(made):
    plan, results = made
    first = parent(plan, trial_of(plan, "apa"), "round1")
    pairs = parent(plan, first, "advantages")
    assert pairs == parent(plan, first, "tokens", "pairs")
    drawn = read_table(results / parent(plan, pairs, "samples").ref / "samples.parquet")
    tokenizer = load_tokenizer(results / parent(plan, first, "tokens").ref / "tokenizer")
    table = read_table(results / pairs.ref / "pairs.parquet", split="train").set_index("pair_id")
    found = read_table(results / pairs.ref / "advantages.parquet").set_index("pair_id")
    row = table.iloc[0]
    prompt = row["prompt"][0]["content"]
    texts = response_texts(tokenizer, drawn.loc[drawn["prompt_id"] == row["prompt_id"], "response_ids"].tolist())
    assert len(texts) == 4
    mean = np.mean([oracle_reward(prompt, text) for text in texts])
    for side in ("chosen", "rejected"):
        assert found.loc[row.name, f"{side}_advantage"] == pytest.approx(oracle_reward(prompt, row[side]) - mean)


# --- types of annotators ----------------------------------------------------------------------------------------------


def test_the_weighted_loss_has_the_published_values():
    expected = [0.4020063877298776, 0.4368424268932886, 0.41251891280228575]
    close(LOSSES["em_dpo"].fn(three_pairs(), beta=0.1), expected, 1e-12)
    turned = replace(three_pairs(), agreeing=t([0.0] * 3), opposing=t([1.0] * 3))
    swapped = [math.log1p(math.exp(0.1 * d)) for d in (1.2, -1.4, 0.85)]
    close(LOSSES["em_dpo"].fn(turned, beta=0.1), swapped, 1e-12)


def test_raters_vote_by_the_taste_of_their_type():
    """Of (short, long) those who like length take the long one, in shares sigmoid(gap / noise); types take turns."""
    prompt = generate_pairs(WorldParams(pairs=1, prompts=1))[0]["prompt"]
    short, long = "the cat sleeps .", "the cat sleeps . the dog runs . the bird sings ."
    raters = Raters([6.0, -6.0], annotators=6, votes=6, noise=2.0)
    votes = cast_votes([(prompt, short, long)] * 500, raters, seed=1, domain="home")
    assert votes == cast_votes([(prompt, short, long)] * 500, raters, seed=1, domain="home")
    assert {len({who for who, _ in cast}) for cast in votes} == {6}
    for kind, taste in enumerate((6.0, -6.0)):
        cast = [vote == "b" for one in votes for who, vote in one if int(who[-2:]) % 2 == kind]
        gap = oracle_reward(prompt, long, taste) - oracle_reward(prompt, short, taste)
        share = 1 / (1 + math.exp(-gap / 2.0))
        assert len(cast) == 1500
        assert np.mean(cast) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 1500))


def test_majorities_of_raters_choose_and_no_other_id_moves():
    source = {"kind": "world", "prompts": 60, "pairs": 60}
    splits = {"train": 0.5, "test": 0.5}
    plain = DataSpec.model_validate({"source": source, "splits": splits})
    assert "raters" not in plain.model_dump()["source"]
    voted, _ = build_pairs(DataSpec.model_validate({"source": {**source, "raters": RATERS}, "splits": splits}), Path())
    assert (voted["votes_chosen"] > voted["votes_rejected"]).all()
    assert (voted["votes_chosen"] + voted["votes_rejected"] == 3).all()
    before, _ = build_pairs(plain, Path())
    texts = [{frozenset((row.chosen, row.rejected)) for row in table.itertuples()} for table in (before, voted)]
    assert texts[0] == texts[1]


def test_types_start_at_random_and_follow_from_the_votes(made):
    plan, results = made
    mixture = parent(plan, trial_of(plan, "em"), "round2")
    second = parent(plan, mixture, "responsibilities")
    first = parent(plan, second, "before")
    assert first.spec == {"types": 2, "seed": 0}
    pairs = read_table(results / parent(plan, second, "pairs").ref / "pairs.parquet").set_index("pair_id")
    scores = [
        read_table(results / parent(plan, second, role).ref / "scores.parquet").set_index("pair_id")
        for role in ("scores0", "scores1", "reference")
    ]
    found = read_table(results / second.ref / "responsibilities.parquet").set_index("annotator")["responsibility"]
    weights = read_table(results / second.ref / "weights.parquet").set_index("pair_id")
    prior = read_json(results / first.ref / "types.json")["prior"]
    casts = [(p, v) for p in weights.index for v in json.loads(pairs.loc[p, "votes"])]
    names = sorted({vote["annotator"] for _, vote in casts})
    margins = [
        [
            (1 if vote["vote"] == "chosen" else -1)
            * float(np.subtract(*(one.loc[p, "chosen_logp"] - one.loc[p, "rejected_logp"] for one in (own, scores[2]))))
            for p, vote in casts
        ]
        for own in scores[:2]
    ]
    numbers = np.array([names.index(vote["annotator"]) for _, vote in casts])
    expected = expectation(np.array(margins), numbers, np.array(prior), 0.5)
    np.testing.assert_allclose(np.stack(found[names]), expected.responsibility, rtol=1e-9)
    np.testing.assert_allclose(read_json(results / second.ref / "types.json")["prior"], expected.prior, rtol=1e-9)
    # Every vote's responsibilities sum to 1, so those of a pair sum to its votes.
    both = np.stack(weights["agreeing"]) + np.stack(weights["opposing"])
    np.testing.assert_allclose(both.sum(axis=1), 3.0)
    pair = weights.index[0]
    for side, column in (("chosen", "agreeing"), ("rejected", "opposing")):
        cast = [vote["annotator"] for p, vote in casts if p == pair and vote["vote"] == side]
        np.testing.assert_allclose(weights.loc[pair, column], sum((found[who] for who in cast), np.zeros(2)))


def test_policies_of_types_go_on_and_are_mixed_by_least_regret(made):
    plan, results = made
    trial = trial_of(plan, "em")
    mixtures = [parent(plan, trial, f"round{n}") for n in (1, 2)]
    for k in range(2):
        policy = parent(plan, mixtures[1], f"policy{k}")
        assert policy.spec["type"] == k
        assert policy.spec["continues"] is True
        assert parent(plan, policy, "model") == parent(plan, mixtures[0], f"policy{k}")
        assert parent(plan, policy, "reference", "model") == parent(plan, trial, "model")
    content = read_json(results / mixtures[1].ref / "mixture.json")
    shares = [part["weight"] for part in content["policies"]]
    np.testing.assert_allclose(shares, min_max_regret(np.array(content["worth"])), atol=1e-12)
    worth = np.array(content["worth"])
    np.testing.assert_allclose(content["regret"], worth.max(axis=1) - worth @ shares, atol=1e-12)
    # What policy 1 is worth to type 0: beta E[log pi_0 - log ref] over policy 1's responses.
    drawn = read_table(results / parent(plan, mixtures[1], "samples1").ref / "samples.parquet")
    ids = [[row.tolist() for row in drawn[name]] for name in ("prompt_ids", "response_ids")]
    models = [model_of(results, parent(plan, mixtures[1], "policy0")), model_of(results, parent(plan, trial, "model"))]
    logp = [score_responses(model, *ids, batch_size=16)["logp"] for model in models]
    assert worth[0, 1] == pytest.approx(0.5 * float((logp[0] - logp[1]).mean()), rel=1e-4)


def test_a_mixture_draws_a_policy_for_every_prompt_and_knows_its_probability(made):
    """log sum_k share_k pi_k(y) - log ref(y), and answers of the policy whose turn it is."""
    plan, results = made
    trial = trial_of(plan, "em")
    policies = [parent(plan, trial, "round2", f"policy{k}") for k in range(2)]
    models, home = [model_of(results, node) for node in policies], model_of(results, parent(plan, trial, "model"))
    tokenizer = load_tokenizer(results / policies[0].ref / "weights")
    mixture = Mixture(tuple(models), (0.25, 0.75))
    prompts = read_table(results / parent(plan, trial, "set.test.tokens").ref / "tokens.parquet")["prompt_ids"][:12]
    prompts = [ids.tolist() for ids in prompts]
    sampling = SamplingSpec(max_new_tokens=8, temperature=0.0, batch_size=4, seed=3)
    answers = [answer["ids"] for answer in draw_answers(mixture, tokenizer, prompts, sampling)]
    alone = [[a["ids"] for a in draw_answers(model, tokenizer, prompts, sampling)] for model in models]
    turns = mixture.drawn(12, 3)
    assert answers == [alone[turn][row] for row, turn in enumerate(turns)]
    logp = [score_responses(model, prompts, answers, batch_size=8)["logp"] for model in (*models, home)]
    expected = np.log(0.25 * np.exp(logp[0]) + 0.75 * np.exp(logp[1])) - logp[2]
    found = log_ratio(mixture, home, prompts, [answers, answers[::-1]], batch_size=8)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-4)
    backwards = log_ratio(mixture, home, prompts, [answers[::-1]], batch_size=8)[:, 0]
    np.testing.assert_allclose(found[:, 1], backwards, atol=1e-4)


def test_types_need_votes_and_their_loss(tmp_path):
    for arm, message in (
        ({"loss": DPO, "rounds": {"kind": "em"}, "conditions": ["raters"]}, "give the arm the loss 'em_dpo'"),
        ({"loss": {"name": "em_dpo", "beta": 0.1}, "rounds": {"kind": "em"}}, "needs to know who voted"),
        ({"loss": {"name": "em_dpo", "beta": 0.1}}, "declare 'rounds'"),
    ):
        with pytest.raises(BadInput, match=message):
            planned(tmp_path, arms={"em": arm})


# --- which two responses become a pair --------------------------------------------------------------------------------


def test_extremes_and_fronts():
    """Means 2, 1.9, 1, .5. By both models 0 beats 2 and 3, 1 beats 3: 0 and 1 are unbeaten, 2 and 3 beat none."""
    rewards, draw = [[3.0, 1.0], [0.8, 3.0], [2.0, 0.0], [0.5, 0.5]], np.random.default_rng(0)
    assert [side.tolist() for side in fronts(rewards)] == [[True, True, False, False], [False, False, True, True]]
    assert {chosen_and_rejected(rewards, "extremes", draw) for _ in range(5)} == {(0, 3)}
    drawn = [chosen_and_rejected(rewards, "pareto", draw) for _ in range(400)]
    assert {pair: drawn.count(pair) for pair in set(drawn)} == {
        pair: pytest.approx(100, abs=4 * np.sqrt(400 * 0.25 * 0.75)) for pair in ((0, 2), (0, 3), (1, 2), (1, 3))
    }


def test_fronts_pair_no_worse_mean_above_a_better_one_and_survive_calibration():
    rng = np.random.default_rng(1)
    for _ in range(50):
        rewards = rng.normal(size=(6, 3))
        chosen, rejected = chosen_and_rejected(rewards, "pareto", rng)
        assert rewards[chosen].mean() > rewards[rejected].mean()
        calibrated = np.stack([expected_win_rates(rewards[:, [m]]) for m in range(3)], axis=1)
        assert [side.tolist() for side in fronts(calibrated)] == [side.tolist() for side in fronts(rewards)]
    assert chosen_and_rejected([[1.0, 2.0], [2.0, 1.0]], "pareto", rng) is None


# --- reward models of several outputs ---------------------------------------------------------------------------------


def test_scores_over_the_policys_other_samples_are_what_gpo_regresses_on(made):
    plan, results = made
    pairs = parent(plan, trial_of(plan, "gpo"), "round1", "advantages")
    assert pairs.spec["kind"] == "general_preference"
    drawn = read_table(results / parent(plan, pairs, "samples").ref / "samples.parquet")
    model = load_reward_model(results / parent(plan, pairs, "reward0").ref / "weights", members=2, device="cpu")
    table = read_table(results / pairs.ref / "pairs.parquet", split="train").iloc[0]
    own = drawn[drawn["prompt_id"] == table["prompt_id"]]
    columns = ([ids.tolist() for ids in own[name]] for name in ("prompt_ids", "response_ids"))
    with torch.no_grad():
        vectors = reward_scores(model, *columns).double().numpy()
    over = [sum(scores(vectors)[i, j] for j in range(3) if j != i) / 2 for i in range(3)]
    tokenizer = load_tokenizer(results / parent(plan, pairs, "tokens").ref / "tokenizer")
    by_text = dict(zip(response_texts(tokenizer, own["response_ids"].tolist()), over, strict=True))
    found = read_table(results / pairs.ref / "advantages.parquet").set_index("pair_id").loc[table["pair_id"]]
    for side in ("chosen", "rejected"):
        assert found[f"{side}_advantage"] == pytest.approx(by_text[table[side]], rel=1e-4, abs=1e-6)


def test_the_spread_of_predicted_ratings_is_dispersion(made):
    plan, results = made
    dispersion = parent(plan, trial_of(plan, "dprm"), "dispersion")
    assert "ratings" not in dispersion.spec
    ratings = parent(plan, dispersion, "ratings")
    assert parent(plan, ratings, "reward").spec["prior_votes"] == 1.0
    assert parent(plan, ratings, "reward", "pairs").stage == "pairs"
    spreads = read_table(results / ratings.ref / "scores.parquet").set_index("pair_id")
    table = read_table(results / dispersion.ref / "dispersion.parquet").set_index("pair_id")
    mean = (spreads["chosen_spread"] + spreads["rejected_spread"]).loc[table.index] / 2
    np.testing.assert_allclose(table["normalised_entropy"], mean)
    train = (table["split"] == "train").to_numpy()
    expected = -np.log(mean) / np.mean(-np.log(mean[train]))
    np.testing.assert_allclose(table["dispersion_weight"], expected, rtol=1e-9)


def test_a_spread_needs_a_model_of_ratings(tmp_path):
    for ratings, message in (("two", "of kind distributional"), (None, "of kind distributional")):
        arm = {**ARMS["dprm"], "dispersion": {"estimator": "rating_spread", "ratings": ratings}}
        with pytest.raises(BadInput, match=message):
            planned(tmp_path, arms={"dprm": arm})
    arm = {**ARMS["dprm"], "dispersion": {"ratings": "rated"}}
    with pytest.raises(BadInput, match="'ratings' is about the estimator"):
        planned(tmp_path, arms={"dprm": arm})
