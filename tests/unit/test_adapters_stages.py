"""Stages that train adapters, and all that read a model which is a base and adapters."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from prefopt.engine.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_adapted,
    merge_adapter,
)
from prefopt.engine.packed_attention import packs
from prefopt.errors import BadInput
from prefopt.files import read_json, read_lines
from prefopt.models import load_causal_lm, new_causal_lm, save_model
from prefopt.scoring import response_scores
from prefopt.specs import ScratchModel
from prefopt.stages import RunOptions, trial
from prefopt.stages.weights import BASE, WEIGHTS, weights_of
from prefopt.tables import read_table
from test_adapters import LORA, PAIRS, scores, trained
from test_trial import DPO, OPTIONS, TRAIN, Project, answers_of, logp_by_hand

ADAPTED = TRAIN | {"adapter": LORA.model_dump()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def stacked(project):
    """A project whose reference is an adapter on the base, so that policies are adapters on an adapter."""
    other = object.__new__(Project)
    vars(other).update(vars(project))
    sft = {"train": ADAPTED | {"steps": 12, "learning_rate": 1e-2}, "seed": 0}
    other.model = project.make("train-sft", sft, {"tokens": project.tokens, "base": project.base})
    signals = {"tokens": project.tokens, "model": other.model}
    other.reference = project.make("score-reference", {"precision": "fp32"}, signals)
    return other


def test_a_policy_keeps_its_adapter_and_the_name_of_its_parent_and_nothing_of_the_base(stacked):
    policy, _ = stacked.chain(seed=1, train=ADAPTED)
    folder = stacked.folder(policy)
    files = {part.name for part in (folder / WEIGHTS).iterdir()}
    assert files == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE}
    assert read_json(folder / WEIGHTS / BASE)["base"] == stacked.model.ref
    found = weights_of(folder)
    assert found.folder == stacked.folder(stacked.base) / WEIGHTS
    assert found.adapters == (stacked.folder(stacked.model) / WEIGHTS, folder / WEIGHTS)
    summary = read_json(folder / "manifest.json")["summary"]
    assert summary["step_zero_margin_gap"] < 1e-5  # the policy starts at the reference
    assert summary["trained_parameters"] < summary["parameters"]
    assert str(stacked.results) not in (folder / WEIGHTS / ADAPTER_CONFIG).read_text()


def test_a_trial_is_train_policy_and_generate_with_adapters_too_and_holds_one_model(stacked, monkeypatch):
    policy, chain = stacked.chain(seed=2, train=ADAPTED)
    loads = []
    monkeypatch.setattr("prefopt.models.load_causal_lm", lambda *a, **k: loads.append(a) or load_causal_lm(*a, **k))
    table = answers_of(stacked.trial(seed=2, train=ADAPTED, at=[0.0, 1.0]))
    assert len(loads) == 1  # the reference is the policy with its adapters off
    start, end = (rows.reset_index(drop=True) for _, rows in table.groupby("step"))
    assert start["log_ratio"].tolist() == [0.0] * len(start)
    assert end["text"].tolist() == chain["text"].tolist()
    both = [weights_of(stacked.folder(node)) for node in (policy, stacked.model)]
    models = [load_causal_lm(one.folder, device="cpu", adapters=one.adapters) for one in both]
    rows = zip(chain["prompt_ids"], chain["response_ids"], strict=True)
    rows = [(prompt.tolist(), response.tolist()) for prompt, response in rows]
    ratios = [logp_by_hand(models[0], *row) - logp_by_hand(models[1], *row) for row in rows]
    np.testing.assert_allclose(end["log_ratio"], ratios, atol=1e-4)
    assert max(abs(np.array(ratios))) > 1e-2


def test_adapters_learn_as_full_fine_tuning_does(project):
    curves = []
    for train_spec in (TRAIN, ADAPTED):
        parents = {"tokens": project.tokens, "model": project.model, "reference": project.reference}
        spec = {"loss": DPO, "regulariser": None, "train": train_spec, "seed": 1}
        policy = project.make("train-policy", spec, parents)
        curves.append([row["loss"] for row in read_lines(project.folder(policy) / "metrics.jsonl")])
    assert curves[0][0] == pytest.approx(np.log(2), abs=1e-5)
    assert curves[1][0] == pytest.approx(np.log(2), abs=1e-5)
    assert all(curve[-1] < curve[0] for curve in curves)
    assert curves[0] != curves[1]


@pytest.mark.parametrize("heads", [1, 2])
def test_reward_models_score_as_they_did_when_they_were_trained(stacked, heads):
    seeds = {"init": list(range(heads)) if heads > 1 else 0, "order": 0, "subset": 0}
    spec = {"train": ADAPTED, "split": "train", "subset": 1.0, "longer_wins": None, "seeds": seeds}
    if heads > 1:
        spec |= {"kind": "shared_backbone", "frozen": False}
    reward = stacked.make("train-reward", spec, {"tokens": stacked.tokens, "model": stacked.model})
    scored = stacked.make(
        "score-rewards", {"members": heads} if heads > 1 else {}, {"tokens": stacked.tokens, "reward": reward}
    )
    table = read_table(stacked.folder(scored) / "scores.parquet", split="test")
    chosen, rejected = (np.stack(table[f"{side}_reward"]) for side in ("chosen", "rejected"))
    summary = read_json(stacked.folder(reward) / "manifest.json")["summary"]
    accuracy = summary["held_out_accuracy_of_heads"] if heads > 1 else summary["held_out_accuracy"]
    np.testing.assert_allclose((chosen > rejected).mean(axis=0), accuracy, atol=1e-6)
    state = load_file(stacked.folder(reward) / WEIGHTS / ADAPTER_WEIGHTS)
    assert state["base_model.model.score.weight"].shape == (heads, 16)


def test_an_adapter_on_a_base_that_was_made_again_is_refused(stacked, tmp_path):
    policy, _ = stacked.chain(seed=1, train=ADAPTED)
    for node in (policy, stacked.model, stacked.base):
        shutil.copytree(stacked.folder(node), tmp_path / node.ref)
    manifest = read_json(tmp_path / stacked.model.ref / "manifest.json")
    manifest["outputs"]["metrics.jsonl"]["sha256"] = "0" * 64
    (tmp_path / stacked.model.ref / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="was made again, with another result, after the adapter"):
        weights_of(tmp_path / policy.ref)


def test_an_interrupted_adapted_trial_goes_on_from_its_checkpoint(stacked, monkeypatch):
    options = RunOptions(micro_batch=4, checkpoint_steps=3, device="cpu")
    whole = answers_of(stacked.trial(seed=5, train=ADAPTED, at=[0.5, 1.0]))
    node = stacked.trial_node(seed=5, train=ADAPTED, at=[0.5, 1.0])
    shutil.rmtree(stacked.folder(node))
    visit, seen = trial._Evaluation.visit, []

    def killed(self, model, step):
        seen.append(step)
        if step == 8 and len(seen) == 2:
            raise KeyboardInterrupt
        visit(self, model, step)

    monkeypatch.setattr(trial._Evaluation, "visit", killed)
    with pytest.raises(KeyboardInterrupt):
        stacked.trial(seed=5, train=ADAPTED, at=[0.5, 1.0], options=options)
    again = answers_of(stacked.trial(seed=5, train=ADAPTED, at=[0.5, 1.0], options=OPTIONS))
    assert seen == [4, 8, 8]
    assert again.equals(whole)


NF4 = ADAPTED | {"adapter": LORA.model_copy(update={"quantize": "nf4"}).model_dump()}


def test_a_quantized_policy_without_bitsandbytes_is_refused_in_one_line(stacked):
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed here")
    with pytest.raises(BadInput, match=r"adapter.quantize nf4: bitsandbytes is not installed here; install it on a"):
        stacked.chain(seed=1, train=NF4)


def test_a_quantized_policy_starts_at_its_quantized_reference_and_stays_beside_it(project):
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes, which the lock does not have")
    own = object.__new__(Project)
    vars(own).update(vars(project))
    wide = ScratchModel(kind="scratch", layers=1, hidden=64, heads=2, intermediate=64, max_positions=96)
    own.model = own.make("prepare-model", wide.model_dump(), {"pairs": own.pairs})  # multiples of 64, as CPUs need
    signals = {"tokens": own.tokens, "model": own.model}
    scored = [own.make("score-reference", {"precision": "fp32"} | more, signals) for more in ({}, {"quantize": "nf4"})]
    own.reference = scored[1]
    plain, coarse = (read_table(own.folder(node) / "scores.parquet") for node in scored)
    assert float((plain["chosen_logp"] - coarse["chosen_logp"]).abs().max()) > 1e-2  # 4 bits are coarse
    policy, chain = own.chain(seed=1, train=NF4)
    assert read_json(own.folder(policy) / "manifest.json")["summary"]["step_zero_margin_gap"] < 1e-4
    table = answers_of(own.trial(seed=1, train=NF4, at=[0.0, 1.0]))
    start, end = (rows.reset_index(drop=True) for _, rows in table.groupby("step"))
    assert start["log_ratio"].tolist() == [0.0] * len(start)
    assert end["text"].tolist() == chain["text"].tolist()
    found = weights_of(own.folder(policy))
    model = load_causal_lm(found.folder, device="cpu", adapters=found.adapters)
    assert is_adapted(model)
    assert packs(model)
    with pytest.raises(BadInput, match="weights in 4 bits cannot be written as a whole model"):
        save_model(model, tiny.tokenizer(), own.results / "whole")
    with pytest.raises(BadInput, match="no adapter stands on weights in 4 bits"):
        merge_adapter(model, found.adapters[-1])


def test_gradients_through_four_bits_are_those_of_the_weights_that_they_stand_for(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which the lock does not have")
    wide = ScratchModel(kind="scratch", layers=2, hidden=64, heads=4, intermediate=64, max_positions=64)
    save_model(new_causal_lm(wide, tiny.tokenizer()), tiny.tokenizer(), tmp_path)
    models = [load_causal_lm(tmp_path, device="cpu", quantize=how) for how in ("nf4", None)]
    for name, layer in models[0].base_model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            whole = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            models[1].base_model.get_submodule(name).weight.data.copy_(whole)
    grads = []
    for model in models:
        scores(trained(model))  # a pass without gradients, after which they must still be there
        response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"]).logp.sum().backward()
        grads.append([part.grad for part in model.parameters() if part.grad is not None])
    assert len(grads[0]) == 28
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-2)
