"""Heads on a shared body, members scored together, and the reference pass that no second run repeats: real stages."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaConfig, LlamaForSequenceClassification

import tiny
from prefopt.artifacts import MANIFEST
from prefopt.cli import main
from prefopt.engine.bulk import reward_pairs, score_draws, score_pairs, score_responses
from prefopt.engine.reward_models import load_reward_model, new_reward_model, new_shared_reward_model
from prefopt.ensemble import diagnostics, reward_margins
from prefopt.errors import BadInput
from prefopt.files import read_lines
from prefopt.models import save_model
from prefopt.plan import load_plan
from prefopt.specs import EnsembleSpec
from prefopt.stages import STAGES
from prefopt.tables import read_table
from prefopt.training.objectives import Moment, RewardObjective, SharedRewardObjective

TRAIN = {"steps": 3, "batch_size": 8}
MOMENT = Moment(0, 1, 0)


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    save_model(tiny.causal_lm(seed=3), tiny.tokenizer(), folder)
    return folder


# The declaration.


def test_a_declared_ensemble_is_of_independent_members_and_says_nothing_of_kinds():
    assert EnsembleSpec(members=2, train=TRAIN).kind == "independent"
    assert not {"kind", "frozen"} & set(EnsembleSpec(members=2, train=TRAIN).model_dump())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frozen": True, "members": 2}, "frozen is about another kind of reward model; set .kind: shared_backbone"),
        ({"kind": "shared_backbone"}, "at least two heads"),
        ({"kind": "shared_backbone", "members": 2, "subset": 0.5}, "sees one set of pairs; remove 'subset'"),
        ({"kind": "shared_backbone", "members": 2, "longer_wins": [0.2, 0.8]}, "remove 'longer_wins'"),
    ],
)
def test_shared_backbones_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EnsembleSpec(train=TRAIN, **fields)


# Heads on one body.


def test_heads_start_as_those_of_independent_members_do(causal_folder):
    shared = new_shared_reward_model(causal_folder, [7, 8])
    alone = [new_reward_model(causal_folder, seed) for seed in (7, 8)]
    assert torch.equal(shared.score.weight, torch.cat([model.score.weight for model in alone]))
    for name, weight in shared.base_model.named_parameters():
        assert torch.equal(weight, dict(alone[0].base_model.named_parameters())[name])


def test_gradients_of_heads_are_those_of_separate_heads_on_the_same_features(causal_folder):
    seeds, rows = [4, 5, 6], list(range(6))
    pairs = tiny.pairs(6, seed=11)
    shared = new_shared_reward_model(causal_folder, seeds).double()
    loss, sums = SharedRewardObjective(**pairs).loss(shared, rows, MOMENT)
    loss.backward()
    body, losses = 0.0, []
    for row, seed in enumerate(seeds):
        alone = new_reward_model(causal_folder, seed).double()
        with torch.no_grad():
            alone.score.weight.copy_(shared.score.weight[row : row + 1])
        one, _ = RewardObjective(**pairs).loss(alone, rows, MOMENT)
        one.backward()
        losses.append(one.item())
        torch.testing.assert_close(shared.score.weight.grad[row : row + 1], alone.score.weight.grad, rtol=0, atol=1e-12)
        body = body + alone.model.layers[0].mlp.up_proj.weight.grad
    scale = float(body.abs().max())  # Llama's norm passes gradients on in fp32, so that sums are rounded
    torch.testing.assert_close(shared.model.layers[0].mlp.up_proj.weight.grad, body, rtol=0, atol=1e-6 * scale)
    assert loss.item() == pytest.approx(sum(losses), abs=1e-12)
    assert float(sums["loss"]) == pytest.approx(sum(losses) / 3, abs=1e-12)


def test_a_frozen_body_takes_no_gradient(causal_folder):
    model = new_shared_reward_model(causal_folder, [1, 2], frozen=True)
    SharedRewardObjective(**tiny.pairs(4, seed=1)).loss(model, [0, 1, 2, 3], MOMENT)[0].backward()
    assert model.score.weight.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


def test_a_reward_model_is_loaded_with_as_many_heads_as_it_has(causal_folder, tmp_path):
    model = new_shared_reward_model(causal_folder, [1, 2, 3])
    save_model(model, tiny.tokenizer(), tmp_path)
    pairs = tiny.pairs(7, seed=2)
    found = reward_pairs(load_reward_model(tmp_path, members=3, device="cpu"), **pairs, batch_size=4)
    assert found[0].shape == found[1].shape == (7, 3)
    with pytest.raises(BadInput):
        load_reward_model(tmp_path, device="cpu")


# Diversity, by hand.


def test_diversity_of_three_members_on_four_pairs():
    # Margins of members a, b, c: signs differ between a and b on 1 of 4 pairs, a and c on 4, b and c on 3: 8 of 12.
    margins = np.array([[1.0, 2.0, -1.0], [2.0, 1.0, -2.0], [3.0, -1.0, -3.0], [-2.0, -2.0, 2.0]])
    table = pd.DataFrame({"pair_id": range(4), "chosen_reward": list(margins), "rejected_reward": list(0 * margins)})
    found = diagnostics(table)
    assert found["disagreement"] == pytest.approx(8 / 12)
    # c = -a: correlation -1; a centred is (0, 1, 2, -3), b centred is (2, 1, -1, -2): (0 + 1 - 2 + 6) / sqrt(14 * 10).
    between = 5 / np.sqrt(14 * 10)
    assert found["mean_correlation"] == pytest.approx((between - 1 - between) / 3)
    assert found["accuracy"] == pytest.approx([3 / 4, 2 / 4, 1 / 4])


def test_a_tie_is_half_a_disagreement_and_one_member_has_none():
    rewards = pd.DataFrame({"pair_id": [0], "chosen_reward": [[1.0, 0.0]], "rejected_reward": [[0.0, 0.0]]})
    assert diagnostics(rewards.map(lambda x: np.array(x) if isinstance(x, list) else x))["disagreement"] == 0.5
    alone = pd.DataFrame({"pair_id": [0], "chosen_reward": [np.ones(1)], "rejected_reward": [np.zeros(1)]})
    assert diagnostics(alone)["disagreement"] is None


# One pass over both responses.


def test_both_responses_of_a_pair_are_scored_in_one_pass_as_each_is_alone():
    model, pairs = tiny.causal_lm().double(), tiny.pairs(9, seed=5)
    with reading() as seen:
        together = score_pairs(model, **pairs, batch_size=6)
    for side in ("chosen", "rejected"):
        alone = score_responses(model, pairs["prompt_ids"], pairs[f"{side}_ids"], batch_size=4)
        for name, values in alone.items():
            np.testing.assert_allclose(together[f"{side}_{name}"], values, rtol=0, atol=1e-12)
    # After the probe's one forward pass: 9 pairs, 3 at a time, every prompt once.
    assert [tokens for _, tokens in seen[-3:]] == sorted((tokens for _, tokens in seen[-3:]), reverse=True)
    assert sum(tokens for _, tokens in seen[-3:]) == sum(len(row) for column in pairs.values() for row in column)


def test_log_probabilities_of_draws_are_those_of_their_responses_with_each_prompt_read_once_and_no_entropies():
    model, pairs = tiny.causal_lm(), tiny.pairs(9, seed=5)
    prompts, draws = pairs["prompt_ids"], [pairs["chosen_ids"], pairs["rejected_ids"]]
    alone = [score_responses(model, prompts, answers, batch_size=4) for answers in draws]
    np.testing.assert_array_equal(score_draws(model, prompts, draws[:1], batch_size=4)[:, 0], alone[0]["logp"])
    with reading() as seen:
        together = score_draws(model, prompts, draws, batch_size=4)
    assert sum(tokens for _, tokens in seen) == sum(map(len, [*prompts, *draws[0], *draws[1]]))
    for found, one in zip(together.T, alone, strict=True):
        np.testing.assert_allclose(found, one["logp"], rtol=1e-6)


def test_a_pass_on_a_cpu_has_a_budget_of_tokens():
    rows = {name: [[1] * 200 for _ in range(8)] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = LlamaForSequenceClassification(config).eval()
    reward_pairs(model, **rows, batch_size=2)
    with reading() as seen:
        reward_pairs(model, **rows, batch_size=100)
    assert [tokens for _, tokens in seen] == [1800, 1800, 1200]  # 600 a pair, at most 2048


@contextmanager
def reading():
    """(table of embeddings, tokens) of every pass over token ids, whichever model reads them and whoever runs it."""
    seen = []

    def hook(module, args, _output):
        if isinstance(module, nn.Embedding):
            seen.append((id(module), args[0].numel()))

    handle = register_module_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


# Planned and made by the real stages.

ITEM = {
    "item": {"paper": "own", "name": "x", "title": "t"},
    "data": {
        "source": {"kind": "world", "prompts": 40, "pairs": 48},
        "splits": {"train": 0.6, "judge": 0.2, "test": 0.2},
    },
    "model": {"kind": "scratch", "layers": 1, "hidden": 16, "heads": 2, "intermediate": 32},
    "tokens": {},
    "rewards": {
        "single": {"members": 1, "train": TRAIN},
        "three": {"members": 3, "train": TRAIN},
        "two": {"members": 2, "seeds": [5, 6], "train": TRAIN},
        "heads": {"kind": "shared_backbone", "members": 3, "train": TRAIN},
        "frozen": {"kind": "shared_backbone", "frozen": True, "members": 2, "seeds": [5, 6], "train": TRAIN},
    },
    "policy": TRAIN,
    "evaluate": {"judge": "oracle"},
}
DISTILL = {"name": "distill_ensemble", "beta": 0.1}
ENSEMBLES = {name: {"loss": DISTILL, "rewards": name} for name in ITEM["rewards"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tmp_path_factory.mktemp("project")


def planned(project, arms, seeds=(0,)):
    path = project / "config" / "experiments" / "own" / "x.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(ITEM | {"arms": arms, "seeds": list(seeds)}))
    config = {"items": ["*/*"], "results": str(project / "results")}
    (project / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    plan = load_plan(project / "config" / "config.yaml")
    plan.write_specs(project / "results")
    return plan


def make(project, plan, *nodes, but=()):
    """Run the stages that these nodes still need, but for some of the nodes."""
    results = project / "results"
    verbs = {stage.folder: stage.verb for stage in STAGES.values()}
    for node in plan.reachable(nodes):
        if node not in but and not (results / node.ref / MANIFEST).is_file():
            run(project, verbs[node.stage], node)


def run(project, verb, *nodes):
    assert main([verb, "--spec", *(str(project / "results" / "specs" / f"{node.ref}.json") for node in nodes)]) == 0


def of_stage(plan, stage):
    return [node for node in plan.nodes.values() if node.stage == stage]


def test_members_of_one_ensemble_are_scored_together_and_no_others(project):
    plan = planned(project, ENSEMBLES)
    groups = {tuple(node.name for node in group) for group in plan.scored_together()}
    # Member 0 of the three is the single one, which can be wanted without the others.
    assert groups == {
        ("train-s0",),
        ("train-s1", "train-s2"),
        ("train-s5", "train-s6"),
        ("train-shared-k3",),
        ("train-frozen-k2",),
    }
    assert {node.name for node in of_stage(plan, "ensemble")} == {
        "seeds-k1",
        "seeds-k3",
        "seeds-k2",
        "shared-k3",
        "frozen-k2",
    }


def test_a_judge_is_no_head_among_others(project, monkeypatch):
    judge = {"kind": "shared_backbone", "members": 2, "split": "judge", "train": TRAIN}
    monkeypatch.setitem(ITEM, "evaluate", {"judge": judge})
    with pytest.raises(BadInput, match="can be used one by one, and 'shared_backbone' is one model with heads"):
        planned(project, ENSEMBLES)


def test_scoring_two_members_reads_the_pairs_once(project, monkeypatch):
    plan = planned(project, ENSEMBLES)
    group = next(g for g in plan.scored_together() if len(g) == 2 and g[0].name == "train-s5")
    make(project, plan, *group, but=group)
    reads = Counter()
    for module in ("tables", "reward"):
        monkeypatch.setattr(
            f"prefopt.stages.{module}.read_table",
            lambda path, *more: (reads.update([path.name]), read_table(path, *more))[1],
        )
    run(project, "score-rewards", *group)
    assert reads == {"tokens.parquet": 1}
    together = [scores_of(project, node) for node in group]
    for node in group:
        run(project, "score-rewards", node)
    for before, node in zip(together, group, strict=True):
        pd.testing.assert_frame_equal(before, scores_of(project, node), check_exact=True)
    assert not together[0]["chosen_reward"].equals(together[1]["chosen_reward"])


def scores_of(project, node):
    return pd.read_parquet(project / "results" / node.ref / "scores.parquet")


@pytest.mark.parametrize(("name", "frozen", "heads"), [("shared-k3", False, 3), ("frozen-k2", True, 2)])
def test_heads_on_one_body_are_trained_scored_and_named_as_such(project, name, frozen, heads):
    plan = planned(project, ENSEMBLES)
    ensemble = next(node for node in of_stage(plan, "ensemble") if node.name == name)
    make(project, plan, ensemble)
    results = project / "results"
    found = json.loads((results / ensemble.ref / "diagnostics.json").read_text())
    assert (found["kind"], found["frozen"]) == ("shared_backbone", frozen)
    assert found["members"] == [f"head{k}" for k in range(heads)]
    assert len(found["held_out"]["accuracy"]) == heads
    assert 0 <= found["held_out"]["disagreement"] <= 1
    rows = pd.read_parquet(results / ensemble.parents["tokens"] / "tokens.parquet")
    assert reward_margins(scores_of(project, ensemble)).shape == (len(rows), heads)
    body = plan.nodes[plan.nodes[ensemble.parents["heads"]].parents["reward"]]
    start = tensors(results / body.parents["model"])
    trained = tensors(results / body.ref)
    moved = {key for key, value in trained.items() if key in start and not torch.equal(value, start[key])}
    assert (not moved) == frozen


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "weights" / "model.safetensors")


def test_losses_that_need_rewards_take_the_heads(project):
    plan = planned(project, {"heads": ENSEMBLES["heads"]})
    (policy,) = of_stage(plan, "policy")
    make(project, plan, policy)
    lines = read_lines(project / "results" / policy.ref / "metrics.jsonl")
    assert len(lines) == TRAIN["steps"]
    # Every pair is matched to one of the three heads.
    assert sum(lines[0].get(f"member_{k}", 0) for k in range(3)) == pytest.approx(1)


# One more loss, beta or seed.


def test_one_more_loss_beta_or_seed_runs_no_reference(project):
    first = planned(project, {"dpo": {"loss": {"name": "dpo", "beta": 0.1}}})
    (policy,) = of_stage(first, "policy")
    make(project, first, policy)
    more = {
        "dpo": {"loss": {"name": "dpo", "beta": 0.1}},
        "beta": {"loss": {"name": "dpo", "beta": 0.5}},
        "loss": {"loss": {"name": "ipo", "beta": 0.1}},
    }
    second = planned(project, more, seeds=(0, 1))
    new = [node for node in second.nodes.values() if node.ref not in first.nodes and node.stage in _TRAINED]
    assert {node.stage for node in new} == {"policy"}
    assert len(new) == 5
    (reference,) = of_stage(second, "reference")
    assert reference.ref in first.nodes
    tokens = pd.read_parquet(project / "results" / policy.parents["tokens"] / "tokens.parquet")
    for node in new[:3]:
        with reading() as seen:
            make(project, second, node)
        assert len({module for module, _ in seen}) == 1  # one model, the policy
        assert sum(count for _, count in seen) == _policy_tokens(tokens, node) + _PROBE_TOKENS


_TRAINED = {"pairs", "base", "tokens", "sft", "reference", "samples", "dispersion", "reward", "rewards", "policy"}
_PROBE_TOKENS = 2 * 4 + 4 * 5 + 12  # whether logits are head(body), and whether packed rows are those of padded ones


def _policy_tokens(tokens, node):
    """Tokens of the check at step 0 and of the steps, every prompt once."""
    from prefopt.training.objectives import rows_of_stream

    rows = tokens[tokens["split"] == "train"].reset_index(drop=True)
    size = rows["prompt_ids"].map(len) + rows["chosen_ids"].map(len) + rows["rejected_ids"].map(len)
    steps = rows_of_stream(len(rows), node.spec["seed"], 0, TRAIN["steps"] * TRAIN["batch_size"])
    return size[:32].sum() + size[steps].sum()
