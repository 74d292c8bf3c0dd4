"""LoRA: W x + (alpha / rank) B A x, its files, its training and its declarations."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from artifact_builds import plan_items
from prefopt.engine.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapters_off,
    add_adapter,
    is_adapted,
    merge_adapter,
    save_adapter,
)
from prefopt.engine.packed_attention import packs
from prefopt.engine.reward_models import load_reward_model, new_reward_model, score_head
from prefopt.errors import BadInput
from prefopt.models import load_causal_lm, save_model
from prefopt.scoring import response_scores, reward_scores
from prefopt.specs import AdapterSpec, EnsembleSpec, SftSpec, TrainSpec
from prefopt.trainer import train
from prefopt.training.checkpoints import trained_state
from prefopt.training.kernels import use_liger
from prefopt.training.layers import layers_run
from prefopt.training.objectives import Moment, SftObjective
from test_plan import declare

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
    """By the modules also of a body without adapters, which runs by its weights where nobody looks (``lean_body``)."""
    handles = [part.register_forward_hook(lambda *_: None) for part in model.modules()]
    with torch.no_grad():
        found = response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"]).logp
    for handle in handles:
        handle.remove()
    return found


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
