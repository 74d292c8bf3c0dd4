"""A Llama's layers by their weights, beside the library's modules in float64, and what they compute, counted."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from prefopt.engine import lean_body
from prefopt.engine.adapters import add_adapter
from prefopt.engine.lean_body import lean_states, runs_lean
from prefopt.engine.packed_attention import attention_for
from prefopt.engine.packing import pack, pad
from prefopt.engine.precision import set_precision
from prefopt.specs import AdapterSpec
from prefopt.training.layers import layers_run

WIDTH, INNER = 32, 48


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "vocab_size": tiny.WORDS, "initializer_range": 0.3, **settings})
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)  # weights of 1 would hide where they are left out
    return model


def rows_of(prompts, responses, longest):
    """Packed rows of random tokens; every prompt has ``responses`` responses."""
    draw = random.Random(7)

    def text():
        return [draw.randrange(tiny.WORDS) for _ in range(draw.randint(1, longest))]

    return pack([text() for _ in range(prompts)], [text() for _ in range(prompts * responses)], torch.device("cpu"))


def by_modules(model, rows, places):
    with attention_for(model, rows):
        return F.embedding(places, model.base_model(**rows.inputs, use_cache=False)[0][0])


def value_and_gradients(states, model, rows, places):
    """The states, and gradients of a sum in which every number counts differently."""
    model.zero_grad()
    found = states(model, rows, places)
    torch.manual_seed(1)
    (found * torch.randn(found.shape, dtype=torch.float64).to(found.dtype)).sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found.detach().double(), gradients


@pytest.mark.parametrize(
    ("settings", "prompts", "responses", "longest"),
    [
        ({}, 3, 2, 9),
        ({"num_key_value_heads": 2}, 3, 3, 9),
        ({"num_key_value_heads": 1, "num_hidden_layers": 1, "head_dim": 6}, 2, 1, 9),
        ({"tie_word_embeddings": True}, 4, 2, 90),  # attention of long rows is the fused one
        ({}, 40, 2, 12),  # so many tokens that sizes are rounded up
    ],
)
def test_states_and_gradients_are_those_of_the_modules(settings, prompts, responses, longest):
    model, rows = llama(**settings).double(), rows_of(prompts, responses, longest)
    other = tiny.exact(copy.deepcopy(model))
    for places in (rows.before, rows.last):
        mine, gradients = value_and_gradients(lean_states, model, rows, places)
        theirs, expected = value_and_gradients(by_modules, other, rows, places)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10, msg=name)


def test_float32_is_float64_rounded():
    """24 bits: 6e-8 a step; states are about 1, gradients are sums over 600 tokens."""
    model, rows = llama(), rows_of(40, 2, 12)
    mine, gradients = value_and_gradients(lean_states, model, rows, rows.before)
    theirs, expected = value_and_gradients(by_modules, tiny.exact(copy.deepcopy(model)), rows, rows.before)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


class Products(TorchDispatchMode):
    """Rows, inner size and columns of every product of matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.mkldnn._linear_pointwise, torch.ops.aten.mm):
            self.seen.append((*args[0].shape, out.shape[1]))
        return out


def rounded(size):
    """Between 1024 and 2048 there are eight sizes."""
    return -(-size // 128) * 128


def test_products_have_few_sizes_and_the_last_layer_goes_on_with_the_wanted_tokens():
    model, rows = llama(), rows_of(80, 2, 12)
    tokens, wanted = (rounded(size) for size in (rows.inputs["input_ids"].numel(), len(rows.before)))
    assert 1024 <= wanted < tokens <= 2048
    with torch.no_grad(), Products() as products:
        assert lean_states(model, rows, rows.before).shape == (len(rows.before), WIDTH)
    after = [(WIDTH, WIDTH), (WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]  # out, gate, up, down
    assert products.seen == [
        (tokens, WIDTH, 3 * WIDTH),
        *((tokens, *sizes) for sizes in after),
        (tokens, WIDTH, 3 * WIDTH),
        *((wanted, *sizes) for sizes in after),
    ]


class Kept:
    """Bytes of what autograd keeps for the backward pass, parameters and what attention keeps left out."""

    def __init__(self, model, monkeypatch):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held, self.counting = {}, True
        attention = lean_body.attention

        def uncounted(*args):
            self.counting = False
            found = attention(*args)
            self.counting = True
            return found

        monkeypatch.setattr(lean_body, "attention", uncounted)

    def keep(self, value):
        storage = value.untyped_storage()
        if self.counting and storage.data_ptr() not in self.parameters:
            self.held[storage.data_ptr()] = storage  # held, so that no other gets its address
        return value

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.held.values())


def test_a_layer_keeps_its_norms_inputs_and_roots_its_gates_and_what_attention_gave_and_repeats_no_product(monkeypatch):
    """The difference of three layers and two: one layer that goes on with all tokens."""
    rows = rows_of(80, 2, 12)
    tokens = rounded(rows.inputs["input_ids"].numel())
    kept, repeated = [], []
    for layers in (2, 3):
        model = llama(num_hidden_layers=layers)
        with monkeypatch.context() as patch, Products() as products:
            memory = Kept(model, patch)
            with torch.autograd.graph.saved_tensors_hooks(memory.keep, lambda value: value):
                states = lean_states(model, rows, rows.before)
            states.sum().backward()
        kept.append(memory.bytes)
        repeated.append(len(products.seen))
    numbers = 2 * (WIDTH + 1) + 2 * INNER + WIDTH  # of a token: two norms; gate and up; attention's output
    weights = 3 * WIDTH * WIDTH  # of queries, keys and values, side by side
    assert kept[1] - kept[0] == 4 * (tokens * numbers + weights)
    assert repeated == [3 * 5 * 2, 3 * 5 * 3]  # forward, for the inputs, for the weights


def changed(model, how):
    """The model after a change that its weights alone do not show."""
    if how == "hook":
        model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    elif how == "bf16":
        set_precision(model, "bf16")
    elif how == "adapter":
        add_adapter(model, AdapterSpec(kind="lora", rank=2), seed=0)
    elif how == "norm":
        tiny.exact(model).float()
    elif how == "bias":
        model.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(INNER))
    else:
        model.train()
    return model


@pytest.mark.parametrize("how", ["hook", "bf16", "adapter", "norm", "bias", "training"])
def test_a_body_that_is_more_than_its_weights_runs_by_its_modules(how):
    rows = rows_of(2, 2, 5)
    assert runs_lean(llama(), rows)
    assert not runs_lean(changed(llama(), how), rows)


def test_padded_rows_and_layers_that_are_run_another_way_take_the_modules():
    model, rows = llama(), rows_of(2, 2, 5)
    with layers_run(model, checkpointing=True, compiled=False):
        assert not runs_lean(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_lean(model, rows)
    assert runs_lean(model, rows)
    assert not runs_lean(model, pad([[1]], [[2]], torch.device("cpu")))
