"""LoRA: W x + (alpha / rank) B A x, its files, and every stage that reads a model which is a base and adapters."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from artifact_builds import plan_items
from prefopt.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapters_off,
    add_adapter,
    is_adapted,
    merge_adapter,
    save_adapter,
)
from prefopt.checkpoints import trained_state
from prefopt.errors import BadInput
from prefopt.files import read_json, read_lines
from prefopt.kernels import use_liger
from prefopt.layers import layers_run
from prefopt.models import load_causal_lm, new_causal_lm, save_model
from prefopt.objectives import Moment, SftObjective
from prefopt.packing import packs
from prefopt.reward_models import load_reward_model, new_reward_model, score_head
from prefopt.scoring import response_scores, reward_scores
from prefopt.specs import AdapterSpec, EnsembleSpec, ScratchModel, SftSpec, TrainSpec
from prefopt.stages import RunOptions, trial
from prefopt.stages.weights import BASE, WEIGHTS, weights_of
from prefopt.tables import read_table
from prefopt.trainer import train
from test_plan import declare
from test_trial import DPO, OPTIONS, TRAIN, Project, answers_of, logp_by_hand

LORA = AdapterSpec(rank=4, alpha=8.0)
PAIRS = tiny.pairs(12, seed=7)
IDS = torch.tensor([[1, 5, 9, 7]])


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.WORDS, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def trained(model, spec=LORA, seed=0, **given):
    """The model with adapters whose B is no longer zero, as after training."""
    add_adapter(model, spec, seed=seed, **given)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    return model


def scores(model):
    with torch.no_grad():
        return response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"]).logp


def train_sft(model, state_dir, steps=6, **settings):
    spec = TrainSpec(steps=steps, batch_size=4, learning_rate=1e-2)
    objective = SftObjective(PAIRS["prompt_ids"], PAIRS["chosen_ids"])
    options = {"seed": 3, "micro_batch": 2, "checkpoint_steps": 2, "device": "cpu", "progress": False} | settings
    return train(model, objective, spec, state_dir=state_dir, **options)


# --- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_model", [tiny.causal_lm, gpt2])
def test_at_step_zero_an_adapted_model_is_its_base_bit_for_bit_and_rows_still_pack(new_model):
    model = new_model()
    before, state = scores(model), torch.get_rng_state()
    add_adapter(model, LORA, seed=0)
    assert torch.equal(scores(model), before)
    assert packs(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_a_and_b_take_gradients_and_their_number_is_rank_times_inputs_and_outputs():
    model = tiny.causal_lm()
    add_adapter(model, LORA, seed=0)
    attention, mlp = 4 * (32 + 32), 3 * (32 + 64)  # inputs and outputs of the linear layers of a layer
    trained_names = [name for name, part in model.named_parameters() if part.requires_grad]
    assert sum(part.numel() for part in model.parameters() if part.requires_grad) == 2 * 4 * (attention + mlp)
    assert all(".lora_" in name for name in trained_names)
    loss, _ = SftObjective(PAIRS["prompt_ids"], PAIRS["chosen_ids"]).loss(model, range(4), Moment(0, 1, 0))
    loss.backward()
    grads = {name for name, part in model.named_parameters() if part.grad is not None}
    assert grads == set(trained_names)


def test_named_targets_and_those_that_are_not_there():
    model = tiny.causal_lm()
    add_adapter(model, AdapterSpec(rank=2, targets=["v_proj", "q_proj"]), seed=0)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}
    with pytest.raises(BadInput, match="no linear layer 'q_prj' in LlamaModel; did you mean 'q_proj'"):
        add_adapter(tiny.causal_lm(), AdapterSpec(targets=["q_prj"]), seed=0)
    with pytest.raises(BadInput, match="no linear layer 'lm_head'"):
        add_adapter(tiny.causal_lm(), AdapterSpec(targets=["lm_head"]), seed=0)


def test_a_is_drawn_from_the_seed():
    first, again, other = (tiny.causal_lm() for _ in range(3))
    for model, seed in ((first, 5), (again, 5), (other, 6)):
        add_adapter(model, LORA, seed=seed)
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(("new_model", "transposed"), [(tiny.causal_lm, False), (gpt2, True)])
def test_merged_weights_are_w_plus_alpha_over_rank_b_a(new_model, transposed, tmp_path):
    base, model = new_model(), trained(new_model())
    layer = next(name for name, _ in model.named_parameters() if "lora_A" in name).split(".lora_A")[0]
    state = model.state_dict()
    delta = 8.0 / 4 * state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
    want = base.state_dict()[f"{layer}.weight"] + (delta.T if transposed else delta)
    save_model(model, tiny.tokenizer(), tmp_path / "whole")
    found = load_causal_lm(tmp_path / "whole", device="cpu")
    assert is_adapted(model)
    assert not is_adapted(found)
    torch.testing.assert_close(found.state_dict()[f"{layer}.weight"], want)
    torch.testing.assert_close(scores(found), scores(model), rtol=0, atol=1e-4)
    assert float((scores(model) - scores(base)).abs().max()) > 0.1


def test_with_adapters_off_the_model_is_its_base_and_afterwards_what_it_was():
    model = trained(tiny.causal_lm())
    before, flags = scores(model), {name: part.requires_grad for name, part in model.named_parameters()}
    with adapters_off(model) as reference:
        assert reference is model
        assert torch.equal(scores(reference), scores(tiny.causal_lm()))
    assert torch.equal(scores(model), before)
    assert {name: part.requires_grad for name, part in model.named_parameters()} == flags


def test_checkpointed_layers_give_adapters_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = trained(tiny.causal_lm())
        with layers_run(model, checkpointing=checkpointing, compiled=False):
            SftObjective(PAIRS["prompt_ids"], PAIRS["chosen_ids"]).loss(model, range(4), Moment(0, 1, 0))[0].backward()
        grads.append([part.grad for part in model.parameters() if part.grad is not None])
    assert len(grads[0]) == 28
    torch.testing.assert_close(grads[0], grads[1])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_model", [tiny.causal_lm, gpt2])
def test_a_saved_adapter_comes_back_merged_and_peft_reads_it_too(new_model, tmp_path):
    model = trained(new_model())
    for name in ("once", "twice"):
        save_adapter(model, tmp_path / name)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    assert {part.name for part in (tmp_path / "once").iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    assert all(".lora_" in name for name in load_file(tmp_path / "once" / ADAPTER_WEIGHTS))
    found = new_model()
    assert merge_adapter(found, tmp_path / "once") is False
    torch.testing.assert_close(scores(found), scores(model), rtol=0, atol=1e-4)
    assert all(part.requires_grad for part in found.parameters())  # a model like any other, to train or adapt again
    theirs = PeftModel.from_pretrained(new_model(), str(tmp_path / "once"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


def test_a_reward_models_adapter_holds_its_head(tmp_path):
    save_model(tiny.causal_lm(), tiny.tokenizer(), tmp_path / "base")
    model = new_reward_model(tmp_path / "base", 1)
    trained(model, head=score_head(model)[1])
    save_adapter(model, tmp_path / "reward")
    assert "base_model.model.score.weight" in load_file(tmp_path / "reward" / ADAPTER_WEIGHTS)
    found = load_reward_model(tmp_path / "base", adapters=[tmp_path / "reward"], device="cpu")
    rows = PAIRS["prompt_ids"], PAIRS["chosen_ids"]
    torch.testing.assert_close(reward_scores(found, *rows), reward_scores(model, *rows), rtol=0, atol=1e-4)
    with pytest.raises(BadInput, match=r"no weights for score.weight; this is no reward model"):
        load_reward_model(tmp_path / "base", device="cpu")
    save_adapter(trained(tiny.causal_lm()), tmp_path / "policy")
    with pytest.raises(BadInput, match=r"no weights for score.weight"):
        load_reward_model(tmp_path / "base", adapters=[tmp_path / "policy"], device="cpu")


def test_adapters_that_do_not_fit_are_refused_and_an_adapter_alone_is_no_model(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(trained(tiny.causal_lm()), folder)
    with pytest.raises(BadInput, match="adapter: the adapter does not fit GPT2LMHeadModel"):
        merge_adapter(gpt2(), folder)
    with pytest.raises(BadInput, match="only an adapter, no model"):
        load_causal_lm(folder, device="cpu")
    content = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content | {"target_modules": ["q_proj"]}))
    with pytest.raises(BadInput, match=r"needless weights for layers.0.mlp.down_proj.lora_A"):
        merge_adapter(tiny.causal_lm(), folder)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))
    (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-8])
    with pytest.raises(BadInput, match="the adapter cannot be read"):
        merge_adapter(tiny.causal_lm(), folder)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapters_only_and_a_resumed_run_ends_in_the_same_bits(tmp_path):
    whole, cut = tiny.causal_lm(), tiny.causal_lm()
    for model in (whole, cut):
        add_adapter(model, LORA, seed=0)
    train_sft(whole, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(metrics):
        if metrics["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train_sft(cut, tmp_path / "cut", on_metrics=stop)
    newest = max((tmp_path / "cut").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)["state"]["model"]
    assert newest.name == "step-000000004.pt"
    assert len(state) == 28
    assert all(".lora_" in name for name in state)
    again = tiny.causal_lm()
    add_adapter(again, LORA, seed=0)
    train_sft(again, tmp_path / "cut")
    for name, value in trained_state(whole).items():
        assert torch.equal(value, trained_state(again)[name]), name
    base = tiny.causal_lm()
    with adapters_off(whole):
        assert torch.equal(scores(whole), scores(base))  # training left the body as it was


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    model = tiny.causal_lm()
    add_adapter(model, LORA, seed=0)
    train_sft(model, tmp_path)
    with pytest.raises(BadInput, match=r"the checkpoint differs in .*lora_A"):
        train_sft(tiny.causal_lm(), tmp_path)


# --- declarations -----------------------------------------------------------------------------------------------------


def test_without_an_adapter_a_declaration_is_what_it_was_and_with_one_it_is_checked():
    assert "adapter" not in TrainSpec(steps=1).model_dump()
    spec = TrainSpec.model_validate({"steps": 1, "adapter": {"kind": "lora", "rank": 8}})
    want = {"kind": "lora", "rank": 8, "alpha": 32.0, "targets": "auto"}
    assert spec.model_dump()["adapter"] == want
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainSpec.model_validate({"steps": 1, "adapter": {"kind": "lora", "rnak": 8}})
    with pytest.raises(ValidationError, match="an adapter trains the body, and frozen leaves it"):
        EnsembleSpec(kind="shared_backbone", frozen=True, members=2, train=spec)


@pytest.fixture
def planned(tmp_path):
    """The reference and policies of the arm dpo, planned with a policy section (and more) of an item."""

    def plan(policy, **changes):
        arms = {"arms": {"dpo": {"loss": {"name": "dpo", "beta": 0.1}}}}
        nodes = plan_items(tmp_path, declare(policy=policy, **(arms | changes))).nodes
        return [{ref for ref in nodes if ref.startswith(f"{stage}/")} for stage in ("reference", "policy")]

    return plan


def test_an_adapter_is_another_policy_on_the_same_reference_and_nf4_is_another_reference_too(planned):
    steps = {"steps": 2}
    reference, policies = planned(steps)
    same, adapted = planned(steps | {"adapter": {"kind": "lora"}})
    other, quantized = planned(steps | {"adapter": {"kind": "lora", "quantize": "nf4"}})
    assert reference == same
    assert not (reference & other)
    assert len(policies | adapted | quantized) == 6  # two seeds each


def test_what_quantized_policies_cannot_have_is_refused(planned):
    nf4 = {"steps": 2, "adapter": {"kind": "lora", "quantize": "nf4"}}
    dpo = {"loss": {"name": "dpo", "beta": 0.1}}
    with pytest.raises(BadInput, match=r"all arms share the reference; declare 'adapter.quantize' in 'policy' as well"):
        planned({"steps": 2}, arms={"dpo": dpo | {"train": nf4}})
    with pytest.raises(BadInput, match=r"arms.dpo: samples are of the reference as it is, not quantised"):
        planned(nf4, arms={"dpo": dpo | {"regulariser": {"forward_kl": {"gamma": [0.1, 0.1]}}}})
    for kind in (SftSpec, EnsembleSpec):
        with pytest.raises(ValidationError, match="quantize is for policies"):
            kind.model_validate({"train": nf4})


# --- stages -----------------------------------------------------------------------------------------------------------

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


# --- kernels on GPUs --------------------------------------------------------------------------------------------------


def test_liger_is_for_gpus_where_it_is_installed_and_for_models_it_knows(monkeypatch, caplog):
    caplog.set_level("INFO")
    calls = []
    patching = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None}, _apply_liger_kernel_to_instance=lambda **k: calls.append(k)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(__spec__=True))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patching)
    assert not use_liger(tiny.causal_lm())  # on a CPU
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=tiny.causal_lm().config)
    assert use_liger(on_gpu)
    assert calls == [{"model": on_gpu, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert "by liger_kernel" in caplog.text
    assert not use_liger(SimpleNamespace(device=torch.device("cuda"), config=gpt2().config))
    assert "no kernels for gpt2" in caplog.text
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not use_liger(on_gpu)
