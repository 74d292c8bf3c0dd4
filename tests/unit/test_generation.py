from __future__ import annotations

import sys

import pytest
import torch
from transformers import GenerationConfig

import tiny
from prefopt import generation
from prefopt.artifacts import Node
from prefopt.engine import decoding
from prefopt.engine.vllm_engine import request
from prefopt.errors import BadInput
from prefopt.files import read_json
from prefopt.generation import generate, generate_draws
from prefopt.specs import SamplingSpec

PROMPTS = [[tiny.BOS, *row] for row in tiny.token_rows(10, 1, 9, seed=2)]


@pytest.fixture
def model():
    """A model that is sure enough of itself to end now and then: embeddings ten times the usual size."""
    model = tiny.causal_lm()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model


def run(model, prompts=PROMPTS, state=None, **settings):
    sampling = SamplingSpec(**{"max_new_tokens": 20, "batch_size": 4, **settings})
    return generate(model, tiny.tokenizer(), prompts, sampling, state=state, progress=False)


def greedy_by_hand(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tiny.EOS:
            break
    return ids[len(prompt) :]


def test_temperature_zero_is_the_argmax_at_every_step_whatever_the_batch(model):
    expected = [greedy_by_hand(model, prompt, 20) for prompt in PROMPTS]
    for batch_size in (1, 4, 10):
        assert run(model, temperature=0.0, batch_size=batch_size).response_ids == expected


def test_responses_end_with_the_first_end_token_or_at_the_limit_and_hold_no_padding(model):
    out = run(model, prompts=PROMPTS * 20, batch_size=64)
    assert 0 < sum(out.ended) < len(out.ended)
    for response, ended in zip(out.response_ids, out.ended, strict=True):
        assert response.count(tiny.EOS) == ended
        assert (response[-1] == tiny.EOS) == ended
        assert ended or len(response) == 20


def test_the_same_seed_gives_the_same_responses_another_seed_others(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = run(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert run(model) == first
    assert run(model, seed=1) != first
    again = run(model, prompts=PROMPTS[:4] * 2)
    assert again.response_ids[:4] != again.response_ids[4:]  # every batch has a seed of its own


@pytest.mark.parametrize(("settings", "at_a_time"), [({}, 3), ({"top_p": 0.8}, 3), ({"temperature": 0.0}, 3), ({}, 1)])
def test_draws_that_share_passes_are_those_of_their_seeds_alone(model, settings, at_a_time, monkeypatch, tmp_path):
    """Keys and values of 4 prompts of at most 10 tokens and 20 new ones: 2 * layers * width * 4 bytes a token."""
    read, decode = [], decoding.decode

    def counted(model, prompts, **given):
        read.append(prompts)
        return decode(model, prompts, **given)

    alone = [run(model, seed=seed, **settings) for seed in (5, 0, 7)]
    monkeypatch.setattr(decoding, "decode", counted)
    longest = max(len(prompt) for prompt in PROMPTS[:4])
    size = 4 * (longest + 20) * 2 * model.config.num_hidden_layers * model.config.hidden_size * 4
    monkeypatch.setattr(generation, "_TOGETHER_BYTES", at_a_time * size)
    sampling = SamplingSpec(**{"max_new_tokens": 20, "batch_size": 4, "seed": 99, **settings})
    draws = generate_draws(model, tiny.tokenizer(), PROMPTS[:4], sampling, [5, 0, 7], state=tmp_path, progress=False)
    assert read == [PROMPTS[:4] * at_a_time] * (3 // at_a_time)
    assert [found.response_ids for found in draws] == [one.response_ids[:4] for one in alone]
    every = generate_draws(model, tiny.tokenizer(), PROMPTS, sampling, [5, 0, 7], progress=False)
    assert every == alone
    read.clear()
    again = generate_draws(model, tiny.tokenizer(), PROMPTS[:4], sampling, [5, 0, 7], state=tmp_path, progress=False)
    assert (again, read) == (draws, [])


def test_sampling_frequencies_are_the_tempered_probabilities(model):
    prompt, temperature, draws = PROMPTS[0], 0.7, 4000
    out = run(model, prompts=[prompt] * draws, max_new_tokens=1, temperature=temperature, batch_size=1000)
    seen = torch.bincount(torch.tensor([r[0] for r in out.response_ids]), minlength=tiny.WORDS) / draws
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, dim=-1)
    assert (seen - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_top_p_keeps_the_smallest_set_that_reaches_p(model):
    prompt, top_p = PROMPTS[1], 0.5
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
    values, order = probabilities.sort(descending=True)
    kept = order[: int((values.cumsum(0) < top_p).sum()) + 1].tolist()
    out = run(model, prompts=[prompt] * 500, max_new_tokens=1, top_p=top_p, batch_size=250)
    assert {r[0] for r in out.response_ids} == set(kept)


def test_the_models_own_decoding_defaults_are_not_used_and_are_left_in_place(model):
    plain = run(model)
    own = GenerationConfig(temperature=0.01, top_k=1, do_sample=True, repetition_penalty=9.0, eos_token_id=2)
    model.generation_config = own
    assert run(model) == plain
    assert model.generation_config is own


def test_end_tokens_of_the_generation_config_end_a_response_too(model):
    model.generation_config.eos_token_id = [tiny.EOS, 7]
    out = run(model, prompts=PROMPTS * 20, batch_size=64)
    assert any(r[-1] == 7 for r in out.response_ids)
    assert all(not {tiny.EOS, 7} & set(r[:-1]) for r in out.response_ids)


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(BadInput, match="9 tokens and max_new_tokens 56 exceed the model's 64 positions"):
        run(model, prompts=[[1] * 9], max_new_tokens=56)
    with pytest.raises(BadInput, match="prompt 1 has no tokens"):
        run(model, prompts=[[1], []])
    assert run(model, prompts=[]) == ([], [])
    sampling = SamplingSpec()
    assert generate_draws(model, tiny.tokenizer(), [], sampling, [1, 2], progress=False) == [([], []), ([], [])]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_after_its_last_whole_batch(model, tmp_path, monkeypatch):
    whole = run(model)
    drawn, decode = [], decoding.decode

    def counted(model, prompts, **settings):
        if len(drawn) == 2:
            raise Killed
        drawn.append(prompts)
        return decode(model, prompts, **settings)

    monkeypatch.setattr(decoding, "decode", counted)
    with pytest.raises(Killed):
        run(model, state=tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["batch-000000.json", "batch-000001.json"]
    assert drawn == [PROMPTS[:4], PROMPTS[4:8]]
    drawn[:] = [None]  # one more may be drawn
    assert run(model, state=tmp_path) == whole
    assert drawn == [None, PROMPTS[8:]]


def test_batches_of_other_prompts_or_another_sampling_are_drawn_again(model, tmp_path):
    first = run(model, state=tmp_path)
    kept = read_json(tmp_path / "batch-000000.json")
    assert run(model, state=tmp_path, seed=1) == run(model, seed=1) != first
    assert read_json(tmp_path / "batch-000000.json")["of"] != kept["of"]
    assert run(model, state=tmp_path, seed=1, temperature=0.0) == run(model, seed=1, temperature=0.0)
    assert run(model, state=tmp_path, prompts=PROMPTS[::-1]) == run(model, prompts=PROMPTS[::-1])


def test_the_default_engine_is_in_no_spec_so_that_ids_are_as_before_there_were_engines():
    plain = {"max_new_tokens": 32, "temperature": 1.0, "top_p": 1.0, "batch_size": 64, "seed": 0}
    assert SamplingSpec().model_dump() == plain
    assert SamplingSpec.model_validate(plain) == SamplingSpec(engine="transformers")
    other = SamplingSpec(engine="vllm").model_dump()
    assert other == {**plain, "engine": "vllm"}
    assert SamplingSpec.model_validate(other).engine == "vllm"
    spec = {"prompts": 40, "sampling": SamplingSpec().model_dump()}
    assert Node("generations", 1, "sft", spec).id == "sft-ab990ccf"


STAND_IN = """\
class SamplingParams:
    def __init__(self, **keywords):
        self.keywords = keywords


class LLM:
    def __init__(self, model, **settings):
        import json, pathlib
        self.words = json.loads((pathlib.Path(model) / "config.json").read_text())["vocab_size"]
        print("loading, loudly")

    def generate(self, prompts, chosen, use_tqdm):
        from types import SimpleNamespace
        found = []
        for prompt, one in zip(prompts, chosen):
            if prompt["prompt_token_ids"] == [9, 9, 9]:
                raise SystemExit(7)
            said = [20 + len(prompt["prompt_token_ids"]), self.words - 1, one.keywords["stop_token_ids"][0]]
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=said)]))
        return found
"""


def test_vllm_answers_from_an_environment_of_its_own(model, monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PREFOPT_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = run(model, engine="vllm")
    assert out.response_ids == [[20 + len(prompt), tiny.WORDS - 1, tiny.EOS] for prompt in PROMPTS]
    assert all(out.ended)
    with pytest.raises(BadInput, match="vLLM ended with exit status 7 before it answered"):
        run(model, engine="vllm", prompts=[[9, 9, 9]])
    assert model.device.type == "cpu"


def test_vllm_that_is_not_there_is_told_with_the_way_out(model, monkeypatch, tmp_path):
    monkeypatch.delenv("PREFOPT_VLLM_PYTHON", raising=False)
    with pytest.raises(BadInput, match=r"PREFOPT_VLLM_PYTHON is not set; install envs/vllm.txt"):
        run(model, engine="vllm")
    monkeypatch.setenv("PREFOPT_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(BadInput, match="python', which is no file"):
        run(model, engine="vllm")


def test_vllm_is_asked_for_the_declared_sampling_and_no_more():
    asked = request(SamplingSpec(temperature=0.7, top_p=0.9, max_new_tokens=5), [2, 7], seed=2**63 + 4)
    assert asked == {
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "seed": 4,
        "stop_token_ids": [2, 7],
        "ignore_eos": True,
        "detokenize": False,
    }
