"""Checkpointed and compiled layers beside plain ones: the same gradients, less memory, a word where it cannot be."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tiny
from prefopt.engine.packed_attention import packs, padded
from prefopt.engine.precision import set_precision
from prefopt.scoring import projects_linearly, response_scores
from prefopt.training import layers
from prefopt.training.layers import layers_run

PAIRS = tiny.pairs(6, seed=2)
BOTH = PAIRS["chosen_ids"] + PAIRS["rejected_ids"]


def llama(layers=3):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tiny.WORDS, num_hidden_layers=layers)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.WORDS, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).eval()


def run(model):
    """Value, gradients, bytes that autograd keeps beside the weights, and how often the first layer ran."""
    assert projects_linearly(model)  # both probes are over after this
    packs(model)
    model.zero_grad()
    calls, kept, weights = [], {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    inner = next(
        module for name, module in model.base_model.named_modules() if name.endswith(("0.self_attn", "0.attn"))
    )
    handle = inner.register_forward_hook(lambda *_: calls.append(1))

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = response_scores(model, PAIRS["prompt_ids"], BOTH).logp.logsumexp(0)
    value.backward()
    handle.remove()
    return value.item(), [p.grad.clone() for p in model.parameters()], sum(kept.values()), len(calls)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_checkpointed_layers_give_the_same_gradients_to_the_bit_and_keep_less(make, precision, rows):
    model = set_precision(make(), precision)
    assert packs(model)
    with padded(model) if rows == "padded" else layers.nullcontext():
        plain = run(model)
        with layers_run(model, checkpointing=True, compiled=False):
            mine = run(model)
    assert mine[0] == plain[0]
    assert all(torch.equal(one, other) for one, other in zip(mine[1], plain[1], strict=True))
    assert (plain[3], mine[3]) == (1, 2)  # the layer's second run is in the backward pass
    assert mine[2] < 0.5 * plain[2]


def test_layers_are_as_before_after_it_also_after_an_error():
    model = llama()
    own = model.model.layers[0].forward

    def fail():
        with layers_run(model, checkpointing=True, compiled=False):
            assert "forward" in vars(model.model.layers[0])
            response_scores(model, [[10_000]], [[1]])

    with pytest.raises(IndexError):
        fail()
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert model.model.layers[0].forward == own


def test_without_gradients_layers_run_once_and_plainly(monkeypatch):
    model = llama()
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    with layers_run(model, checkpointing=True, compiled=False), torch.no_grad():
        assert response_scores(model, PAIRS["prompt_ids"], BOTH).logp.isfinite().all()


def test_what_cannot_be_is_said_and_left_out(monkeypatch, caplog):
    model = llama()
    monkeypatch.setattr(layers, "_layers", lambda _: [])
    with caplog.at_level(logging.WARNING), layers_run(model, checkpointing=True, compiled=False):
        assert run(model)[3] == 1
    assert "layers are not checkpointed: LlamaForCausalLM has no layers that transformers names as such" in caplog.text


def test_without_a_compiler_layers_run_as_they_are_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    model = llama()
    with caplog.at_level(logging.WARNING), layers_run(model, checkpointing=True, compiled=True):
        assert run(model)[3] == 2
    assert "layers are not compiled: torch.compile needs a C++ compiler on a CPU, and there is no g++" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("PREFOPT_SLOW") != "1", reason="PREFOPT_SLOW=1 runs it: 20 CPU s of C++ compiler")
@pytest.mark.skipif(layers._why_not_compiled("cpu") is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_compiled_layers_give_the_same_gradients_for_every_shape_from_one_compilation(checkpointing):
    model = llama(layers=1)
    before, compiled = torch._dynamo.utils.counters, torch._dynamo.utils.counters["stats"]
    before.clear()
    for count in (6, 3, 4, 5, 2):
        prompts = PAIRS["prompt_ids"][:count]
        responses = [*PAIRS["chosen_ids"][:count], *PAIRS["rejected_ids"][:count]]
        found = []
        for wanted in (False, True):
            with layers_run(model, checkpointing=checkpointing, compiled=wanted):
                model.zero_grad()
                logp = response_scores(model, prompts, responses).logp
                logp.logsumexp(0).backward()
            found.append([logp.detach(), *(p.grad.clone() for p in model.parameters())])
        for plain, mine in zip(*found, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    assert compiled["unique_graphs"] <= 2 * 2  # before and after attention; once more where a size was seen as fixed
