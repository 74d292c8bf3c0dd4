from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

import tiny
from prefopt.engine.precision import set_precision
from prefopt.engine.reward_models import new_reward_model
from prefopt.models import save_model
from prefopt.scoring import length_batches, projects_linearly, response_scores, reward_scores

ROWS = tiny.pairs(7, seed=3)
PROMPTS, RESPONSES = ROWS["prompt_ids"], ROWS["chosen_ids"]


def plain_scores(model, prompts, responses):
    """Full logits, one sequence at a time, one token at a time."""
    logp, entropy, by_token = [], [], []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        logp_all = torch.log_softmax(logits, dim=-1)
        predicting = [logp_all[len(prompt) + at - 1] for at in range(len(response))]
        by_token.append([row[token] for row, token in zip(predicting, response, strict=True)])
        logp.append(sum(by_token[-1]))
        entropy.append(sum(-(row.exp() * row).sum() for row in predicting) / len(response))
    return torch.stack(logp), torch.stack(entropy), by_token


@pytest.fixture
def model():
    return tiny.causal_lm().double()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    save_model(tiny.causal_lm(), tiny.tokenizer(), folder)
    return new_reward_model(folder, seed=5).double()


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk", [1, 5, 1024, None])
def test_equals_a_plain_loop_over_full_logits_in_values_and_gradients(model, chunk):
    logp, entropy, by_token = plain_scores(model, PROMPTS, RESPONSES)
    scores = response_scores(model, PROMPTS, RESPONSES, entropy=True, token_level=True, chunk_tokens=chunk)
    torch.testing.assert_close(scores.logp, logp, rtol=0, atol=1e-10)
    torch.testing.assert_close(scores.entropy, entropy, rtol=0, atol=1e-10)
    assert scores.tokens.tolist() == [len(r) for r in RESPONSES]
    assert scores.mask.sum(dim=1).tolist() == scores.tokens.tolist()
    for row, expected in enumerate(by_token):
        torch.testing.assert_close(scores.token_logp[row, : len(expected)], torch.stack(expected), rtol=0, atol=1e-10)
        assert not scores.token_logp[row, len(expected) :].any()

    weights = torch.linspace(-1, 2, len(logp), dtype=torch.float64)
    ours = gradients(model, (weights * scores.logp).sum() + (weights.flip(0) * scores.entropy).sum())
    theirs = gradients(model, (weights * logp).sum() + (weights.flip(0) * entropy).sum())
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)


def test_entropy_of_a_uniform_model_is_log_vocabulary(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # tied: every hidden state and logit is zero
        scores = response_scores(model, PROMPTS, RESPONSES, entropy=True)
    log_v = torch.log(torch.tensor(float(tiny.WORDS), dtype=torch.float64))
    torch.testing.assert_close(scores.entropy, log_v.expand(len(RESPONSES)))
    torch.testing.assert_close(scores.logp, -log_v * scores.tokens)


def test_a_row_does_not_depend_on_its_neighbours_or_on_the_pad_token(model):
    together = response_scores(model, PROMPTS, RESPONSES).logp
    alone = [response_scores(model, [p], [r]).logp for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    model.config.pad_token_id = tiny.EOS
    torch.testing.assert_close(response_scores(model, PROMPTS, RESPONSES).logp, together, rtol=0, atol=0)
    order = [3, 0, 6]
    some = response_scores(model, [PROMPTS[i] for i in order], [RESPONSES[i] for i in order]).logp
    torch.testing.assert_close(some, together[order], rtol=0, atol=1e-12)


class Adapted(nn.Linear):
    """A head that is more than its weight, as adapters make it."""


def test_a_head_that_is_more_than_its_weight_is_called_chunk_by_chunk(model):
    model.get_output_embeddings().__class__ = Adapted
    expected = plain_scores(model, PROMPTS, RESPONSES)[0]
    scores = response_scores(model, PROMPTS, RESPONSES, chunk_tokens=4)  # the probes are over after this
    torch.testing.assert_close(scores.logp, expected, rtol=0, atol=1e-10)
    chunk, shapes, inputs = 4, [], []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, out: shapes.append(out.shape))
    model.register_forward_hook(lambda *_: inputs.append("full forward"))
    response_scores(model, PROMPTS, RESPONSES, entropy=True, chunk_tokens=chunk).logp.sum().backward()
    rows = sum(len(r) for r in RESPONSES)
    chunks = -(-rows // chunk)
    assert len(shapes) == 2 * chunks  # once forward, once again in the backward pass
    assert sum(shape[0] for shape in shapes) == 2 * rows
    assert all(len(shape) == 2 and shape[0] <= chunk for shape in shapes)
    assert not inputs


class Heads(TorchDispatchMode):
    """Rows of every product with as many columns as there are words."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.mkldnn._linear_pointwise, torch.ops.aten.mm):
            self.rows += [out.shape[0]] if out.shape[1] == tiny.WORDS else []
        return out


@pytest.mark.parametrize(("copies", "rows"), [(1, None), (16, 64)])
def test_a_small_vocabularys_head_has_few_sizes_where_there_are_many_tokens(model, copies, rows):
    model = tiny.exact(model)
    prompts, responses = PROMPTS * copies, RESPONSES * copies
    tokens = sum(map(len, responses))
    assert (tokens >= 256) == (rows is not None)
    assert tokens % 64
    assert projects_linearly(model)  # seen once by a run of its own
    with Heads() as heads:
        scores = response_scores(model, prompts, responses, entropy=True)
    assert heads.rows == [tokens if rows is None else -(-tokens // rows) * rows]
    logp, entropy, _ = plain_scores(model, PROMPTS, RESPONSES)
    torch.testing.assert_close(scores.logp, logp.repeat(copies), rtol=0, atol=1e-10)
    torch.testing.assert_close(scores.entropy, entropy.repeat(copies), rtol=0, atol=1e-10)
    weights = torch.linspace(-1, 2, len(prompts), dtype=torch.float64)
    ours = gradients(model, (weights * scores.logp).sum())
    theirs = gradients(model, (weights.view(copies, -1).sum(dim=0) * logp).sum())
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)


def test_what_autograd_keeps_does_not_grow_with_the_vocabulary(model):
    response_scores(model, PROMPTS, RESPONSES)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        response_scores(model, PROMPTS, RESPONSES, entropy=True, chunk_tokens=8)
    embeddings = model.get_output_embeddings().weight.shape
    assert all(tiny.WORDS not in t.shape[1:] for t in kept if t.shape != embeddings)


def test_empty_prompts_and_responses_are_refused(model):
    with pytest.raises(ValueError, match="row 1: 2 prompt and 0 response tokens"):
        response_scores(model, [[5], [5, 6]], [[7], []])
    with pytest.raises(ValueError, match="row 0"):
        response_scores(model, [[]], [[7]])


def test_models_whose_logits_are_more_than_head_of_body_take_the_full_path(caplog):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**sizes, intermediate_size=64, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0)
    )
    gemma = gemma.double().eval()
    with caplog.at_level(logging.WARNING):
        assert not projects_linearly(gemma)
    assert "full logits" in caplog.text
    logp, entropy, _ = plain_scores(gemma, PROMPTS, RESPONSES)  # its softmax rounds to fp32 inside
    scores = response_scores(gemma, PROMPTS, RESPONSES, entropy=True)
    torch.testing.assert_close(scores.logp, logp, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.entropy, entropy, rtol=0, atol=1e-6)


def test_learned_positions_and_projected_bodies_score_the_same():
    config = OPTConfig(
        vocab_size=40, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4
    )
    opt = OPTForCausalLM(config).double().eval()
    assert projects_linearly(opt)
    logp, _, _ = plain_scores(opt, PROMPTS, RESPONSES)
    torch.testing.assert_close(response_scores(opt, PROMPTS, RESPONSES).logp, logp, rtol=0, atol=1e-10)


def test_bf16_runs_the_body_in_bf16_and_the_head_in_fp32():
    model = tiny.causal_lm()
    exact = response_scores(model, PROMPTS, RESPONSES).logp
    set_precision(model, "bf16")
    kinds = {"body": set(), "head": set()}
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _a, out: kinds["body"].add(out.dtype))
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: kinds["head"].add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):  # an outer autocast must not reach the head
        rough = response_scores(model, PROMPTS, RESPONSES).logp
    assert kinds == {"body": {torch.bfloat16}, "head": {torch.float32}}
    assert 0 < (rough - exact).abs().max() < 0.1
    set_precision(model, "fp32")
    assert torch.equal(response_scores(model, PROMPTS, RESPONSES).logp, exact)


def test_reward_is_the_score_head_at_the_last_token_even_where_pad_is_the_end_token(reward_model):
    expected = torch.stack(
        [
            reward_model.score(reward_model.model(input_ids=torch.tensor([p + r]))[0][0, -1])[0]
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    for pad in (tiny.PAD, tiny.EOS, None):
        reward_model.config.pad_token_id = pad
        torch.testing.assert_close(reward_scores(reward_model, PROMPTS, RESPONSES), expected, rtol=0, atol=1e-12)
        half = reward_scores(reward_model, PROMPTS[3:], RESPONSES[3:])
        torch.testing.assert_close(half, expected[3:], rtol=0, atol=1e-12)


def test_reward_head_must_be_one_linear_output(reward_model):
    reward_model.score = nn.Linear(32, 2)
    with pytest.raises(Exception, match="no linear score head"):
        reward_scores(reward_model, PROMPTS, RESPONSES)


def test_length_batches_cover_every_row_once_longest_first():
    lengths = [3, 9, 1, 9, 4]
    assert list(length_batches(lengths, 2)) == [[1, 3], [4, 0], [2]]
