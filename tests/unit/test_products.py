"""Products by oneDNN beside those of torch in float64: values, gradients, and which products take which way."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from prefopt import scoring
from prefopt.engine import fused_head, products
from prefopt.engine.bulk import score_pairs
from prefopt.engine.packed_attention import packs
from prefopt.engine.precision import set_precision
from prefopt.engine.products import (
    Linear,
    add_weight_gradient,
    is_linear,
    linear,
    multiply_by_onednn,
    product,
    product_into,
)
from prefopt.scoring import projects_linearly, response_scores

BAND = 1e-5  # of sums of a thousand fp32 products of normal numbers, against the largest of them
PAIRS = tiny.pairs(6, seed=2)
BOTH = PAIRS["chosen_ids"] + PAIRS["rejected_ids"]


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr(products, "_LEAST", 1)


class Products(TorchDispatchMode):
    """Multiplications [M, K, N] of matrices, by who computes them and in which type."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "_linear_pointwise"):
            left = args[1] if name == "addmm" else args[0]
            right = args[2] if name == "addmm" else args[1].t() if name == "_linear_pointwise" else args[1]
            by = "oneDNN" if name == "_linear_pointwise" else "torch"
            self.sizes.setdefault((by, left.dtype), []).append(left.numel() * right.shape[1])
        return func(*args, **(kwargs or {}))


def drawn(*shapes):
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=draw).requires_grad_() for shape in shapes]


def near(mine, exact):
    assert (mine.double() - exact).abs().max() <= BAND * exact.abs().max()


@pytest.mark.parametrize("sizes", [(300, 20, 70), (300, 70, 20)])  # wide and narrow results: the two ways of a gradient
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_float64(every_size, sizes, biased):
    rows, inner, outer = sizes
    values, weight, bias, slope = drawn((3, rows // 3, inner), (outer, inner), (outer,), (3, rows // 3, outer))
    leaves = [values, weight, bias] if biased else [values, weight]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with Products() as seen:
        found = linear(*leaves)
        grads = torch.autograd.grad(found, leaves, slope)
    exact = F.linear(*exact_leaves)
    near(found, exact)
    for mine, theirs in zip(grads, torch.autograd.grad(exact, exact_leaves, slope.double()), strict=True):
        assert mine.shape == theirs.shape
        near(mine, theirs)
    assert seen.sizes == {("oneDNN", torch.float32): 3 * [rows * inner * outer]}


def test_only_what_needs_a_gradient_is_computed(every_size):
    values, weight = drawn((40, 8), (6, 8))
    with Products() as seen:
        linear(values.detach(), weight).sum().backward()
    assert values.grad is None
    assert len(seen.sizes["oneDNN", torch.float32]) == 2
    with Products() as seen:
        linear(values.detach(), weight.detach())
    assert len(seen.sizes["oneDNN", torch.float32]) == 1


def test_a_second_derivative_is_refused_rather_than_wrong(every_size):
    values, weight = drawn((40, 8), (6, 8))
    (first,) = torch.autograd.grad(linear(values, weight).pow(2).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_matrices_with_gaps_are_multiplied_right(every_size):
    """Columns of a wider matrix, as whole weights' transposes are and their slices are not, both ways round."""
    wide, tall = drawn((30, 50), (50, 30))
    for left, right in ((wide[:, :20], tall[10:30]), (wide[:, :20], tall[:20, 5:25]), (tall[:20].t(), wide[:20, ::2])):
        with torch.no_grad():
            near(product(left, right), left.double() @ right.double())


def test_products_into_memory_are_the_same_block_by_block(every_size, monkeypatch):
    left, right = (x.detach() for x in drawn((7, 20), (20, 33)))
    monkeypatch.setattr(products, "_BLOCK", 70)  # 10 columns of 7 rows: 10 + 10 + 10 + 3
    out = torch.full((7, 33), torch.nan)
    with Products() as seen:
        product_into(out, left, right)
    near(out, left.double() @ right.double())
    assert seen.sizes["oneDNN", torch.float32] == [7 * 20 * columns for columns in (10, 10, 10, 3)]


@pytest.mark.parametrize(("rows", "largest", "by"), [(40, 6 * 8, "oneDNN"), (39, 6 * 8, "torch"), (40, 47, "torch")])
def test_gradients_are_added_up_beside_the_sum_only_where_it_is_small_and_rows_are_many(
    every_size, monkeypatch, rows, largest, by
):
    monkeypatch.setattr(products, "_MANY", 40)
    monkeypatch.setattr(products, "_SMALL_TOTAL", largest)
    total, grad, values = (x.detach() for x in drawn((6, 8), (rows, 6), (rows, 8)))
    exact = total.double() + grad.double().t() @ values.double()
    with Products() as seen:
        add_weight_gradient(total, grad, values)
    near(total, exact)
    assert [who for who, _ in seen.sizes] == ([by] if by == "oneDNN" else [])  # torch's is addmm_, in place


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the switch, which sets more than is asked for
@pytest.mark.parametrize(
    "case", ["small", "float64", "bfloat16", "autocast", "switched off", "a subclass of tensor", "compiled"]
)
def test_everything_else_is_the_librarys_own_to_the_bit(case, monkeypatch):
    values, weight = (x.detach() for x in drawn((64, 32), (16, 32)))
    monkeypatch.setattr(products, "_LEAST", 64 * 32 * 16 + (case == "small"))
    if case in ("float64", "bfloat16"):
        values, weight = (x.to(getattr(torch, case)) for x in (values, weight))
    if case == "a subclass of tensor":
        weight = weight.as_subclass(type("Other", (torch.Tensor,), {}))
    if case == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    off = torch.backends.mkldnn.flags(enabled=False) if case == "switched off" else nullcontext()
    with off, torch.autocast("cpu", enabled=case == "autocast"):
        with Products() as seen:
            found = linear(values, weight)
        assert torch.equal(found, F.linear(values, weight))
    assert [by for by, _ in seen.sizes] == ["torch"]


def test_layers_of_a_model_change_their_product_and_nothing_else(tmp_path):
    model = tiny.causal_lm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = model.model.layers[0].mlp.up_proj
    adapted.__class__ = type("Adapted", (nn.Linear,), {})
    multiply_by_onednn(model)
    multiply_by_onednn(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) > 4
    assert [layer for layer in layers if type(layer) is not Linear] == [adapted]
    assert all(is_linear(layer) for layer in layers if layer is not adapted)
    assert not is_linear(adapted)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.zero_()
    assert model.lm_head.weight.any()
    assert not twin.lm_head(torch.ones(1, model.config.hidden_size)).any()


# Products of 3 * codes numbers of rows, and of the first again; how much memory the last third took.
PRODUCTS_OF_MANY_SIZES = """
import ctypes, sys
import torch
from prefopt.engine.products import linear, multiply_by_onednn

class Heap(ctypes.Structure):
    _fields_ = [(str(at), ctypes.c_size_t) for at in range(10)]

allocator = ctypes.CDLL(None)
allocator.mallinfo2.restype = Heap
used = lambda: getattr(allocator.mallinfo2(), "7")
codes = int(sys.argv[1])
multiply_by_onednn(torch.nn.Linear(2, 2))
values, weight = torch.ones(3 * codes, 64), torch.ones(64, 64)
for rows in range(3 * codes):
    before = used() if rows == 2 * codes else 0 if rows < 2 * codes else before
    linear(values[: 1 + rows], weight, least=1)
print("heap", used() - before)
linear(values[:1], weight, least=1)
"""


def test_code_of_sizes_that_were_long_ago_is_made_again_and_takes_no_memory():
    """Unbounded, the last product would find its code, and either cache would grow by 0.3 MB a size."""
    codes = products._CODES
    environment = {name: value for name, value in os.environ.items() if name not in products._CODE_CACHES}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS_OF_MANY_SIZES, str(codes)],
        env={**environment, "ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert sum("create:cache_miss" in line for line in lines) == 3 * codes + 1
    (growth,) = (int(line.split()[1]) for line in lines if line.startswith("heap"))
    assert growth < codes * 30_000


@pytest.mark.parametrize(("parameters", "codes"), [(1 << 22, 256), ((1 << 22) + 1, 48)])
def test_larger_models_keep_less_code_and_bounds_that_the_user_has_set_stay(monkeypatch, parameters, codes):
    model = nn.Linear(parameters, 1, bias=False, device="meta")
    first, second = products._CODE_CACHES
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "")
    monkeypatch.delenv(second)
    multiply_by_onednn(model)
    assert (os.environ[first], os.environ[second]) == ("7", str(codes))


def test_between_a_power_of_two_and_the_next_rows_have_eight_sizes_sixty_four_apart_at_least():
    sizes = sorted({rows + products.rows_to_add(rows) for rows in range(256, 4097)})
    assert sizes == [*range(256, 1024, 64), *range(1024, 2048, 128), *range(2048, 4097, 256)]
    assert [products.rows_to_add(rows) for rows in (0, 1, 255)] == [0, 0, 0]
    added = [products.rows_to_add(rows) / rows for rows in range(1024, 4096)]
    assert max(added) < 1 / 8
    assert sum(added) / len(added) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pass_leaves_no_fp32_product_to_torch(every_size, monkeypatch, precision):
    """Those of a Llama's layer and the head's; in bf16 the body's are torch's, which gives them to oneDNN itself.

    By its weights a layer has 5, queries, keys and values being one; by its modules, as in bf16, it has 7.
    """
    monkeypatch.setattr(scoring, "_SMALL_LOGITS", 0)
    model = set_precision(tiny.causal_lm(), precision)
    assert packs(model)
    assert projects_linearly(model)
    with Products() as seen:
        found = score_pairs(model, **PAIRS, batch_size=12)
    layers = model.config.num_hidden_layers
    body = ("oneDNN", torch.float32) if precision == "fp32" else ("torch", torch.bfloat16)
    expected = {("oneDNN", torch.float32): 1}
    expected[body] = expected.get(body, 0) + (5 if precision == "fp32" else 7) * layers
    assert {who: len(sizes) for who, sizes in seen.sizes.items()} == expected
    monkeypatch.setattr(products, "_LEAST", 1 << 60)
    plain = score_pairs(model, **PAIRS, batch_size=12)
    for name, values in plain.items():
        assert abs(found[name] - values).max() <= 1e-5 * abs(values).max()


def test_gradients_of_a_model_are_those_without_it(every_size, monkeypatch):
    monkeypatch.setattr(scoring, "_SMALL_LOGITS", 0)
    monkeypatch.setattr(fused_head, "_KEPT_BYTES", 0)
    model = set_precision(tiny.causal_lm(), "fp32")
    found = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(products, "_LEAST", least)
        model.zero_grad()
        response_scores(model, PAIRS["prompt_ids"], BOTH).logp.logsumexp(0).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        near(mine, theirs.double())
