"""Our decoding beside transformers' own ``generate`` with the same seeds: the same tokens."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import tiny
from prefopt.engine import decoding, drawing
from prefopt.engine.decoding import decode, decodes, plain
from prefopt.engine.drawing import Drawer, nucleus
from prefopt.engine.kv_cache import Cache
from prefopt.engine.lean import is_plain_llama
from prefopt.engine.precision import set_precision
from prefopt.errors import BadInput
from prefopt.generation import generate
from prefopt.specs import SamplingSpec

SIZES = {
    "vocab_size": tiny.WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}
PROMPTS = [[tiny.BOS, *row] for row in tiny.token_rows(24, 1, 40, seed=2)]
PROMPTS += PROMPTS[:5]


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings)).eval()


def scaled_llama():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    return llama(rope_parameters={"rope_type": "llama3", "rope_theta": 10_000.0, **scaling})


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.WORDS, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, eos_token_id=tiny.EOS)).eval()


def qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()


def mistral_unwindowed():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()


def gemma():
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)).eval()


def gemma2():
    """Its layers have sliding windows in turn, and its logits are capped."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)).eval()


def neox():
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=tiny.WORDS, hidden_size=32, n_layer=2, n_head=4)).eval()


def ended_often(model):
    """The model with ten end tokens of the forty, so that rows end at all lengths."""
    model.generation_config.eos_token_id = [tiny.EOS, *range(10, 19)]
    return model


def run(model, prompts=PROMPTS, **settings):
    sampling = SamplingSpec(**{"max_new_tokens": 40, "batch_size": 12, **settings})
    return generate(model, tiny.tokenizer(), prompts, sampling, progress=False)


def both(model, **settings):
    """Responses of our loop, and of transformers with the same model, prompts and seeds."""
    assert decodes(model)
    mine = run(model, **settings)
    with plain(model):
        return mine, run(model, **settings)


GREEDY, DRAWN = {"temperature": 0.0}, {"temperature": 1.4, "top_p": 0.5, "seed": 8}
OTHERS = ({"temperature": 1.0}, {"temperature": 0.6, "seed": 3}, {"top_p": 0.9})  # which logits alone are subject to


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *((make, settings) for make in (llama, scaled_llama, gpt2, qwen) for settings in (GREEDY, DRAWN)),
        *((llama, settings) for settings in OTHERS),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_tokens_are_those_of_transformers(make, settings):
    mine, theirs = both(make(), **settings)
    assert mine == theirs
    mine, theirs = both(ended_often(make()), **settings)
    assert mine == theirs
    assert len({len(row) for row in mine.response_ids}) > 3


def greedy_by_generate(model, prompt, length):
    """The library's own greedy decoding of one prompt without padding."""
    settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": tiny.PAD}
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (llama, True),
        (gpt2, True),
        (neox, True),
        (qwen, True),
        (qwen3, True),
        (gemma, True),
        (mistral_unwindowed, True),
        (mistral, False),
        (gemma2, False),
        (bloom, False),
    ],
)
def test_greedy_tokens_of_every_architecture_are_those_of_generate_alone_and_unpadded(make, known, caplog):
    model = ended_often(make())
    prompts = PROMPTS[:8]
    expected = [greedy_by_generate(model, prompt, 16) for prompt in prompts]
    with caplog.at_level(logging.WARNING):
        found = run(model, prompts=prompts, temperature=0.0, max_new_tokens=16, batch_size=8)
    assert found.response_ids == expected
    assert decodes(model) is known
    assert any("transformers' generate" in record.getMessage() for record in caplog.records) is not known


def test_the_first_of_equally_likely_tokens_is_taken_as_generate_does():
    model = llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.generation_config.eos_token_id = tiny.EOS
    assert run(model, prompts=PROMPTS[:3], temperature=0.0, max_new_tokens=5).response_ids == [[0] * 5] * 3
    assert greedy_by_generate(model, PROMPTS[0], 5) == [0] * 5


def test_a_rows_draws_depend_on_its_place_in_the_batch_and_not_on_the_other_prompts():
    model = llama()
    model.generation_config.eos_token_id = tiny.EOS
    mine = run(model, prompts=PROMPTS[:6], batch_size=6).response_ids
    others = run(model, prompts=[PROMPTS[0], *PROMPTS[10:14], PROMPTS[5]], batch_size=6).response_ids
    assert mine[0] == others[0]
    assert mine[5] == others[5]
    assert mine[1:5] != others[1:5]


def test_tokens_through_the_model_are_a_fraction_of_those_of_the_padded_batch():
    """What the speed comes from: no padding, equal prompts once, rows that have ended leave."""
    model, seen = ended_often(qwen()), []
    assert decodes(model)
    layer = model.model.layers[0].mlp.gate_proj
    handle = layer.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:-1].numel()))
    prompts = [[tiny.BOS, *row] for row in tiny.token_rows(8, 3, 3, seed=4)] * 4
    mine = run(model, prompts=prompts, batch_size=32)
    ours, passes = sum(seen), len(seen)
    seen.clear()
    with plain(model):
        assert run(model, prompts=prompts, batch_size=32) == mine
    handle.remove()
    longest = max(map(len, mine.response_ids))
    assert passes == len(seen) == longest  # the prompts, then a pass per token but the last
    assert sum(seen) == 32 * 4 + 32 * (longest - 1)
    most = sum(min(32, 32 - sum(len(r) <= at for r in mine.response_ids) + 4) for at in range(1, longest))
    assert ours <= 8 * 4 + most < sum(seen) / 2


def test_only_a_plain_llama_goes_by_its_weights_alone():
    assert is_plain_llama(llama())
    assert is_plain_llama(scaled_llama())
    assert not is_plain_llama(llama(attention_bias=True))
    assert not is_plain_llama(llama(hidden_act="gelu"))
    assert not is_plain_llama(set_precision(llama(), "bf16"))
    assert not any(is_plain_llama(make()) for make in (gpt2, qwen))
    mine, theirs = both(llama(attention_bias=True, hidden_act="gelu"))
    assert mine == theirs


def test_long_responses_take_the_fused_attention_and_are_the_same():
    mine, theirs = both(llama(), prompts=PROMPTS[:6], max_new_tokens=120)
    assert mine == theirs
    assert max(len(row) for row in mine.response_ids) > 64


@pytest.mark.parametrize("make", [mistral, bloom])
def test_models_that_are_not_known_say_so_once_and_are_transformers_own(make, caplog):
    model = make()
    model.generation_config.eos_token_id = tiny.EOS
    with caplog.at_level(logging.WARNING):
        first, again = run(model), run(model)
    assert sum("transformers' generate" in record.getMessage() for record in caplog.records) == 1
    assert first == again


def test_attention_and_random_state_are_left_as_they_were_even_after_an_error():
    model = llama()
    own, before = model.config._attn_implementation, torch.get_rng_state()
    run(model)
    with pytest.raises(BadInput, match="token id 10000"):
        run(model, prompts=[[10_000]])
    assert model.config._attn_implementation == own
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_stays_near_its_own_tokens():
    model = set_precision(llama(), "bf16")
    mine, theirs = both(model, temperature=1.0, max_new_tokens=1, prompts=PROMPTS * 20, batch_size=145)
    same = sum(a == b for a, b in zip(mine.response_ids, theirs.response_ids, strict=True))
    assert same > 0.95 * len(mine.response_ids)


def test_every_prompt_is_read_once_and_rows_leave_when_they_have_ended():
    model, seen = gpt2(), []
    handle = model.transformer.wte.register_forward_hook(lambda _m, args, _out: seen.append(tuple(args[0].shape)))
    prompts = [[5, 6, 7]] * 6 + [[8, 9, 7]] * 2
    last = [0, 1, 2, 3, 5, 5, 5, 5]  # the step at which each row writes its end
    assert decodes(model)
    seen.clear()
    asked = []

    def choose(logits, rows):
        asked.append(rows.tolist())
        return torch.tensor([tiny.EOS if last[row] == len(asked) - 1 else 7 for row in rows.tolist()])

    written = decode(model, prompts, choose=choose, ends=[tiny.EOS], max_new_tokens=40)
    handle.remove()
    assert seen == [(2, 3)] + [(left, 1) for left in (7, 6, 5, 4, 4)]  # two prompts, then one token per row
    assert [sorted(rows) for rows in asked] == [[row for row in range(8) if last[row] >= step] for step in range(6)]
    assert [row.index(tiny.EOS) for row in written[:4]] == [0, 1, 2, 3]


def test_room_for_tokens_is_made_as_they_come_and_what_stands_in_it_is_never_read(monkeypatch):
    """Room for 16 tokens at a time, of the rows that are left; prompts of 2 to 41 tokens have padding before them."""
    model, made, more = llama(), [], Cache._more
    monkeypatch.setattr(decoding, "_GROUP_TOKENS", 1)  # shorter prompts are read apart, behind slots that none fills
    mine = run(model, max_new_tokens=60, batch_size=len(PROMPTS))

    def with_garbage(cache, like, filled):
        made.append(more(cache, like, filled).fill_(float("nan")))
        return made[-1]

    monkeypatch.setattr(Cache, "_more", with_garbage)
    assert run(model, max_new_tokens=60, batch_size=len(PROMPTS)) == mine
    longest = max(map(len, PROMPTS))
    rows = [part.shape[0] for part in made if part.shape[2] > longest + 16]
    assert {part.shape[2] for part in made} == {longest + more for more in (16, 32, 48, 60)}
    assert max(rows) < len(PROMPTS)  # all had a row that ended within the first 16 tokens


def test_prompts_of_unlike_length_are_read_apart():
    model, seen = gpt2(), []
    assert decodes(model)
    handle = model.transformer.wte.register_forward_hook(lambda _m, args, _out: seen.append(tuple(args[0].shape)))
    draw = random.Random(0)
    prompts = [[draw.randrange(3, tiny.WORDS) for _ in range(length)] for length in [4] * 9 + [130] * 8 + [129] * 2]
    run(model, prompts=prompts, batch_size=19, max_new_tokens=1)
    handle.remove()
    assert seen == [(10, 130), (9, 4)]


@pytest.mark.parametrize("inverts", [True, False])
def test_draws_are_those_of_multinomial_on_the_whole_batch(inverts, monkeypatch):
    if inverts and not drawing._inverts_uniforms():
        pytest.skip("this build of torch draws exponentials its own way")
    monkeypatch.setattr(drawing, "_inverts_uniforms", lambda: inverts)
    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([49, 3, 7])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = [torch.multinomial((logits / 0.7).softmax(-1), 1)[:, 0] for _ in range(40)]
        choose = Drawer(SamplingSpec(temperature=0.7), 50, [5], torch.device("cpu"))
        found = [choose(logits, torch.arange(50)) for _ in range(20)]
        some = [choose(logits[rows], rows) for _ in range(20)]
    assert torch.equal(torch.stack(found), torch.stack(expected[:20]))
    assert torch.equal(torch.stack(some), torch.stack(expected[20:])[:, rows])


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = 4 * torch.randn(40, 500, generator=torch.Generator().manual_seed(2))
    assert torch.equal(nucleus(logits, top_p), TopPLogitsWarper(top_p)(None, logits))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopPLogitsWarper(top_p)])
    assert torch.equal(nucleus(logits / 0.5, top_p), warpers(None, logits))


def test_the_nucleus_keeps_all_tokens_that_tie_with_its_last():
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    assert nucleus(logits, 0.5).isfinite().tolist() == [[True] * 4]
    assert nucleus(logits, 0.3).isfinite().tolist() == [[True, False, False, False]]
