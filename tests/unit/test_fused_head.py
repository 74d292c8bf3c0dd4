"""The fused head beside log-softmax of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.engine import fused_head
from prefopt.engine.fused_head import token_logp

POSITIONS, WIDTH, WORDS = 23, 6, 31


def drawn(dtype=torch.float64, bias=True):
    draw = torch.Generator().manual_seed(0)
    hidden, weight, shift = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((POSITIONS, WIDTH), (WORDS, WIDTH), (WORDS,))
    )
    target = torch.randint(WORDS, (POSITIONS,), generator=draw)
    return hidden, weight, shift if bias else None, target


def whole(hidden, weight, bias, target):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logp = torch.log_softmax(logits, dim=-1)
    return logp[range(len(target)), target], -(logp.exp() * logp).sum(dim=-1)


def gradients(value, *leaves):
    return torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None], retain_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, POSITIONS, None])
def test_values_and_gradients_are_those_of_whole_logits(chunk, bias):
    leaves = drawn(bias=bias)
    logp, none = token_logp(*leaves, chunk_tokens=chunk)
    same, entropy = token_logp(*leaves, entropy=True, chunk_tokens=chunk)
    expected = whole(*leaves)
    assert none is None
    for mine, theirs in ((logp, expected[0]), (same, expected[0]), (entropy, expected[1])):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    slope = torch.linspace(-1, 2, POSITIONS, dtype=torch.float64)
    for mine, theirs in (
        ((slope * logp).sum(), (slope * expected[0]).sum()),
        ((slope * entropy).sum(), (slope * expected[1]).sum()),
        ((slope * (same + 3 * entropy)).sum(), (slope * (expected[0] + 3 * expected[1])).sum()),
    ):
        for one, other in zip(gradients(mine, *leaves[:3]), gradients(theirs, *leaves[:3]), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("entropy", [True, False])
def test_gradients_are_finite_differences(entropy):
    hidden, weight, bias, target = drawn()

    def value(h, w, b):
        logp, nats = token_logp(h, w, b, target[:5], entropy=entropy, chunk_tokens=2)
        return logp + nats.sin() if entropy else logp

    assert torch.autograd.gradcheck(value, (hidden[:5].detach().requires_grad_(), weight, bias))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, _, target = drawn()
    logp, _ = token_logp(hidden, weight.detach(), None, target)
    (mine,) = gradients(logp.sum(), hidden)
    torch.testing.assert_close(mine, gradients(whole(hidden, weight, None, target)[0].sum(), hidden)[0])
    with torch.no_grad():
        assert not token_logp(hidden, weight, None, target)[0].requires_grad


def test_kept_and_recomputed_probabilities_give_the_same_gradients(monkeypatch):
    leaves = drawn()
    kept = gradients(token_logp(*leaves, chunk_tokens=4)[0].logsumexp(0), *leaves[:3])
    monkeypatch.setattr(fused_head, "_KEPT_BYTES", POSITIONS * WORDS * 8 - 1)
    again = gradients(token_logp(*leaves, chunk_tokens=4)[0].logsumexp(0), *leaves[:3])
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_tokens_that_a_model_rules_out_have_probability_zero_and_no_gradient():
    hidden, weight, bias, target = drawn()
    ruled_out = (torch.arange(WORDS) % 5 == 4) & ~torch.isin(torch.arange(WORDS), target)
    bias = torch.where(ruled_out, -torch.inf, bias.detach()).requires_grad_()
    logp, entropy = token_logp(hidden, weight, bias, target, entropy=True)
    short = whole(hidden, weight[~ruled_out], bias[~ruled_out], (~ruled_out).cumsum(0)[target] - 1)
    torch.testing.assert_close(logp, short[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, short[1], rtol=0, atol=1e-12)
    grad = gradients((logp + entropy).sum(), weight)[0]
    assert grad.isfinite().all()
    assert not grad[ruled_out].any()


def test_large_logits_neither_overflow_nor_vanish():
    weight = torch.tensor([[1000.0], [0.0], [-1000.0]])
    logp, entropy = token_logp(torch.ones(3, 1), weight, None, torch.arange(3), entropy=True)
    assert logp.tolist() == [0.0, -1000.0, -2000.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0]


def test_float32_and_bf16_bands():
    """Values are of fp32 products in both; bf16 gradients: inputs and results of 8 bits, so 2^-8 = 0.4 % each."""
    exact = drawn()
    value = whole(*exact)[0]
    expected = gradients(value.logsumexp(0), *exact[:3])
    for low, bound in ((None, 1e-6), (torch.bfloat16, 1.5e-2)):
        leaves = drawn(torch.float32)
        logp, _ = token_logp(*leaves, low=low, chunk_tokens=7)
        assert logp.dtype == torch.float32
        torch.testing.assert_close(logp.double(), value, rtol=0, atol=2e-6)
        found = gradients(logp.logsumexp(0), *leaves[:3])
        assert all(grad.dtype == torch.float32 for grad in found)
        errors = [(one - other).norm() / other.norm() for one, other in zip(found, expected, strict=True)]
        assert max(errors) < bound
        assert low is None or max(errors) > 1e-4  # it is rounded indeed


def test_weights_in_bf16_get_gradients_in_bf16_and_values_in_fp32():
    hidden, weight, _, target = drawn(torch.bfloat16)
    logp, entropy = token_logp(hidden, weight, None, target, entropy=True)
    assert (logp.dtype, entropy.dtype) == (torch.float32, torch.float32)
    grads = gradients(logp.sum(), hidden, weight)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    expected = whole(hidden.double(), weight.double(), None, target)[0]
    assert (logp - expected).abs().max() < 0.1


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("keeps", [True, False])
def test_logits_of_all_positions_exist_at_most_once_and_only_where_they_are_small(monkeypatch, keeps):
    """Backward chunks of kept probabilities are 4 x 2 tokens; without them no tensor is larger than one chunk."""
    hidden, weight, bias, target = drawn()
    if not keeps:
        monkeypatch.setattr(fused_head, "_KEPT_BYTES", 0)
    with Largest() as seen:
        token_logp(hidden, weight, bias, target, chunk_tokens=2)[0].sum().backward()
    assert seen.elements == (POSITIONS * WORDS if keeps else max(2 * WORDS, WORDS * WIDTH))


class Fresh(TorchDispatchMode):
    """How many tensors of at least ``size`` elements got memory of their own."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        known = {value.untyped_storage().data_ptr() for value in given}
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.count += value.numel() >= self.size
        return out


def test_more_chunks_take_no_more_memory_than_one(monkeypatch):
    monkeypatch.setattr(fused_head, "_KEPT_BYTES", 0)
    hidden, weight, bias, target = drawn()
    counts = []
    for rows in (2, 22):
        with Fresh(2 * WORDS) as seen:
            token_logp(hidden[:rows], weight, bias, target[:rows], chunk_tokens=2)[0].sum().backward()
        weight.grad = bias.grad = hidden.grad = None
        counts.append(seen.count)
    assert counts[0] > 0
    assert counts[1] - counts[0] <= 4  # hidden states, gradients: as large as all rows together, whatever the chunks
