"""Packed rows beside one plain forward pass per sequence."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

import tiny
from prefopt.engine import packed_attention, packing
from prefopt.engine.packed_attention import attention_for, packs, padded
from prefopt.engine.packing import pack
from prefopt.engine.precision import set_precision
from prefopt.scoring import projects_linearly, response_scores, reward_scores
from prefopt.training.objectives import Moment, RewardObjective
from prefopt.training.policy_objective import PolicyObjective
from tiny import exact

PAIRS = tiny.pairs(9, seed=4)
PROMPTS, BOTH = PAIRS["prompt_ids"], PAIRS["chosen_ids"] + PAIRS["rejected_ids"]
START = Moment(step=0, steps=1, rows_before=0)
SIZES = {
    "vocab_size": tiny.WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **settings}))


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.WORDS, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=tiny.WORDS, hidden_size=32, n_layer=2, n_head=4)).eval()


def mistral(window):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()


def reward_llama():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, initializer_range=0.2, num_labels=1, pad_token_id=0))


def plain(model, prompts, responses):
    """Log-probability of each response token, one sequence after the other, from full logits."""
    found = []
    for row, response in enumerate(responses):
        prompt = prompts[row % len(prompts)]
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        logp = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        found.append(logp[range(len(response)), response])
    return found


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(mine, theirs, bound=1e-10):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("per_prompt", [1, 2, 3])
def test_packed_rows_are_one_forward_pass_per_sequence_in_values_and_gradients(make, per_prompt):
    model = exact(make())
    assert packs(model)
    responses = (BOTH + tiny.responses(len(PROMPTS), seed=8))[: per_prompt * len(PROMPTS)]
    expected = plain(model, PROMPTS, responses)
    scores = response_scores(model, PROMPTS, responses, token_level=True)
    for row, values in enumerate(expected):
        torch.testing.assert_close(scores.token_logp[row, : len(values)], values, rtol=0, atol=1e-10)
        assert not scores.token_logp[row, len(values) :].any()
    weights = torch.linspace(-1, 2, len(responses), dtype=torch.float64)
    theirs = gradients(model, (weights * torch.stack([values.sum() for values in expected])).sum())
    assert_equal(gradients(model, (weights * scores.logp).sum()), theirs)


def test_long_rows_take_the_fused_attention_and_are_the_same():
    model = exact(llama())
    draw = random.Random(0)
    prompts = [[draw.randrange(3, tiny.WORDS) for _ in range(length)] for length in (50, 3)]
    responses = [[draw.randrange(3, tiny.WORDS) for _ in range(length)] for length in (40, 9, 110, 15)]
    expected = torch.stack([values.sum() for values in plain(model, prompts, responses)])
    logp = response_scores(model, prompts, responses).logp
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-10)
    assert_equal(gradients(model, logp.logsumexp(0)), gradients(model, expected.logsumexp(0)))


@pytest.mark.parametrize("length", [5, 256, 257, 600])
def test_explicit_attention_is_causal_at_every_length_and_block(length):
    """In bf16: 8 bits of weights that sum to 1 and of values of about 1."""
    torch.manual_seed(length)
    rough = [torch.randn(2, 3, length, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in rough]
    mine = packed_attention.causal(*rough, 8**-0.5, 0.0)
    theirs = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=0.03)
    slope = torch.randn(2, 3, length, 8)
    mine.backward(slope.bfloat16())
    theirs.backward(slope.double())
    for one, other in zip(rough, exact, strict=True):
        assert (one.grad - other.grad).norm() < 0.01 * other.grad.norm()


def test_sizes_rounded_up_change_no_value_and_no_gradient():
    model = exact(llama())
    draw = random.Random(0)
    prompts = [[draw.randrange(3, tiny.WORDS) for _ in range(length)] for length in (50, 3, 17)]
    responses = [[draw.randrange(3, tiny.WORDS) for _ in range(length)] for length in (40, 9, 110, 15, 150, 2)]
    found = []
    for multiple in (1, 32):
        rows = pack(prompts, responses, torch.device("cpu"), multiple=multiple)
        sizes = [rows.inputs["input_ids"].shape[1], *(length for _, length in rows.inputs["packing"].shapes)]
        assert all(size % multiple == 0 for size in sizes)
        with attention_for(model, rows):
            hidden = model.model(**rows.inputs, use_cache=False)[0][0]
        hidden = hidden[torch.cat([rows.before, rows.last])]
        found.append((hidden, gradients(model, hidden.sin().sum())))
    torch.testing.assert_close(*(hidden for hidden, _ in found), rtol=0, atol=1e-10)
    assert_equal(found[0][1], found[1][1])


def test_long_rows_of_unlike_length_do_not_pad_each_other():
    """Two to a call at least, others with them from nine tenths of the longest on; short rows stand eight together."""
    lengths = np.array([500, 480, 451, 449, 200, 190, 100, 90, 50, 40, 30, 30, 30, 30, 7])
    groups = [lengths[rows].tolist() for rows in packing._groups(lengths)]
    assert groups == [[500, 480, 451], [449, 200], [190, 100], [90, 50, 40, 30, 30, 30, 30, 7]]


def test_rewards_are_those_of_one_forward_pass_per_sequence():
    model = exact(reward_llama())
    assert packs(model)
    rows = [PROMPTS[row % len(PROMPTS)] + response for row, response in enumerate(BOTH)]
    expected = torch.stack([model.score(model.model(input_ids=torch.tensor([row]))[0][0, -1])[0] for row in rows])
    rewards = reward_scores(model, PROMPTS, BOTH)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-10)
    assert_equal(gradients(model, rewards.logsumexp(0)), gradients(model, expected.logsumexp(0)))


def policy(reference):
    with torch.no_grad():
        chosen, rejected = response_scores(reference, PROMPTS, BOTH).logp.chunk(2)
    signals = {"ref_chosen_logp": chosen.tolist(), "ref_rejected_logp": rejected.tolist()}
    pair_ids = range(len(PROMPTS))
    return PolicyObjective(**PAIRS, pair_ids=pair_ids, loss="dpo", loss_params={"beta": 0.3}, signals=signals)


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_objectives_compute_every_prompt_once_and_the_padded_loss(kind):
    model = exact(llama() if kind == "policy" else reward_llama())
    objective = policy(exact(gpt2())) if kind == "policy" else RewardObjective(**PAIRS)
    rows, seen = [5, 0, 7, 2], []
    handle = model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape[:2])))
    mine, sums = objective.loss(model, rows, START)
    with padded(model):
        theirs, expected = objective.loss(model, rows, START)
    handle.remove()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    once = sum(len(PAIRS[name][row]) for name in names for row in rows)
    widest = max(len(PROMPTS[row]) + max(len(PAIRS[name][row]) for name in names[1:]) for row in rows)
    assert seen[-2:] == [(1, once), (2 * len(rows), widest)]
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-10)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-10
    )
    assert_equal(gradients(model, mine), gradients(model, theirs))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_float32_stays_within_a_band_of_float64(make):
    expected = response_scores(exact(make()), PROMPTS, BOTH).logp
    scores = response_scores(make().eval(), PROMPTS, BOTH).logp
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < 1e-4


def test_bf16_attention_is_near_float32():
    model = llama(initializer_range=0.02)
    fine = response_scores(model, PROMPTS, BOTH).logp
    rough = response_scores(set_precision(model, "bf16"), PROMPTS, BOTH).logp
    assert packs(set_precision(llama(), "bf16"))  # the probe looks at the body in full precision
    assert 0 < (rough - fine).abs().max() < 0.1


def test_a_pair_does_not_depend_on_order_or_on_its_neighbours():
    model = exact(llama())
    together = response_scores(model, PROMPTS, BOTH).logp.view(2, -1)
    order = random.Random(1).sample(range(len(PROMPTS)), len(PROMPTS))
    for size in (1, 2, 4, 9):
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            responses = [PAIRS[name][row] for name in ("chosen_ids", "rejected_ids") for row in rows]
            some = response_scores(model, [PROMPTS[row] for row in rows], responses).logp.view(2, -1)
            torch.testing.assert_close(some, together[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(bloom, "hidden states differ|Error"), (lambda: mistral(4), "sliding_window|sliding_attention")],
)
def test_models_that_cannot_pack_say_so_once_and_are_padded(make, reason, caplog):
    model = make().double()
    with caplog.at_level(logging.WARNING):
        scores = response_scores(model, PROMPTS, BOTH).logp
        again = response_scores(model, PROMPTS, BOTH).logp
    said = [record.getMessage() for record in caplog.records if "rows are padded" in record.getMessage()]
    assert len(said) == 1
    assert any(word in said[0] for word in reason.split("|"))
    assert torch.equal(scores, again)
    expected = torch.stack([values.sum() for values in plain(model, PROMPTS, BOTH)])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_window_is_refused_although_a_short_probe_would_not_show_it():
    assert not packs(mistral(1000))
    assert packs(mistral(None))


def test_models_with_scaled_logits_pack_too():
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0, initializer_range=0.2)).double().eval()
    assert packs(model)
    assert not projects_linearly(model)
    expected = torch.stack([values.sum() for values in plain(model, PROMPTS, BOTH)])
    torch.testing.assert_close(response_scores(model, PROMPTS, BOTH).logp, expected, rtol=0, atol=1e-5)


def test_attention_is_the_models_own_again_after_scoring_even_after_an_error():
    model = llama()
    own = model.config._attn_implementation
    response_scores(model, PROMPTS, BOTH)
    assert model.config._attn_implementation == own
    with pytest.raises(IndexError):
        response_scores(model, [[10_000]], [[1]])
    assert model.config._attn_implementation == own


def test_attention_dropout_still_drops():
    model = llama(attention_dropout=0.5).train()
    assert packs(model.eval())
    model.train()
    first, second = (response_scores(model, PROMPTS, BOTH).logp for _ in range(2))
    assert not torch.equal(first, second)


def test_prompts_and_responses_must_match():
    with pytest.raises(ValueError, match="3 responses to 2 prompts"):
        response_scores(llama(), [[5], [6]], [[7], [8], [9]])


def test_positions_and_places_of_two_responses_to_one_prompt():
    rows = pack([[5, 6, 7]], [[8, 9], [10]], torch.device("cpu"))
    assert rows.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert rows.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert rows.before.tolist() == [2, 3, 2]  # 8 after 7, 9 after 8, 10 after 7
    assert rows.target.tolist() == [8, 9, 10]
    assert rows.last.tolist() == [4, 5]
    assert rows.inputs["packing"].token.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0]
