"""Families of published models, random and tiny: scored, trained whole and by adapter, with a reward head, sampled."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import tiny
from prefopt.engine.adapters import adapters_off, add_adapter
from prefopt.engine.packed_attention import packs, padded
from prefopt.engine.reward_models import load_reward_model, new_reward_model, score_head
from prefopt.generation import generate
from prefopt.models import load_causal_lm, save_model
from prefopt.scoring import response_scores, reward_scores
from prefopt.specs import AdapterSpec, SamplingSpec, TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import RewardObjective
from prefopt.training.policy_objective import PolicyObjective

PAIRS = tiny.pairs(8, seed=5)
PROMPTS, BOTH = PAIRS["prompt_ids"], PAIRS["chosen_ids"] + PAIRS["rejected_ids"]
TRAIN = TrainSpec(steps=4, batch_size=4, learning_rate=1e-2)
LORA = AdapterSpec(rank=4, alpha=8.0)
SIZES = {
    "vocab_size": tiny.WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}
GROUPED = SIZES | {"num_key_value_heads": 2}  # grouped-query attention
ENDS = {name: SIZES[name] for name in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "gpt2": GPT2Config(**ENDS, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "mistral": MistralConfig(**GROUPED, head_dim=8, sliding_window=None),
    "mistral, window 4": MistralConfig(**GROUPED, head_dim=8, sliding_window=4),
}
PADDED = {
    "mistral, window 4": "NotImplementedError: attention with sliding_window"
}  # whose rows are padded, and the word for why


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    folder = tmp_path_factory.mktemp("model")
    save_model(model, tiny.tokenizer(), folder)
    return folder


@pytest.fixture
def model(folder):
    return load_causal_lm(folder, device="cpu")


def logp_by_hand(model):
    """One plain forward pass per row."""
    found = []
    for at, response in enumerate(BOTH):
        prompt = PROMPTS[at % len(PROMPTS)]
        logp = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
        found.append(sum(float(logp[len(prompt) - 1 + place, token]) for place, token in enumerate(response)))
    return found


def score(model):
    with torch.no_grad():
        return response_scores(model, PROMPTS, BOTH).logp


def run(model, objective, tmp_path):
    options = {"seed": 0, "micro_batch": 4, "checkpoint_steps": 100, "device": "cpu", "progress": False}
    return train(model, objective, TRAIN, state_dir=tmp_path / "state", **options).metrics


def test_scores_are_those_of_one_plain_pass_per_row_packed_or_with_a_reason_why_not(model, name, caplog):
    caplog.set_level(logging.WARNING)
    assert packs(model) is (name not in PADDED)
    if name in PADDED:
        assert f"rows are padded, prompts are not shared ({PADDED[name]})" in caplog.text
    mine = score(model)
    with padded(model):
        torch.testing.assert_close(score(model), mine, rtol=0, atol=1e-3)
    with torch.no_grad():
        np.testing.assert_allclose(mine, logp_by_hand(model), atol=1e-3)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_dpo_starts_at_the_reference_and_learns(model, adapter, tmp_path):
    before = score(model)
    signals = dict(zip(("ref_chosen_logp", "ref_rejected_logp"), before.chunk(2), strict=True))
    pairs = PAIRS | {"pair_ids": list(range(8))}
    objective = PolicyObjective(**pairs, loss="dpo", loss_params={"beta": 0.1}, signals=signals)
    if adapter is not None:
        add_adapter(model, adapter, seed=0)
    assert objective.check_start(model, range(8), band=1e-3) < 1e-4
    metrics = run(model, objective, tmp_path)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    if adapter is not None:
        with adapters_off(model):  # by its modules, and before by its weights alone
            torch.testing.assert_close(score(model), before, rtol=1e-6, atol=1e-5)


def test_a_reward_head_learns_and_comes_back_from_its_folder(folder, tmp_path):
    model = new_reward_model(folder, 0)
    add_adapter(model, LORA, seed=0, head=score_head(model)[1])
    metrics = run(model, RewardObjective(*PAIRS.values()), tmp_path)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    save_model(model, tiny.tokenizer(), tmp_path / "reward")
    found = load_reward_model(tmp_path / "reward", device="cpu")
    with torch.no_grad():
        want, mine = (reward_scores(one, PROMPTS, BOTH) for one in (model, found))
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def test_greedy_answers_are_those_of_the_librarys_generate(model):
    drawn = generate(model, tiny.tokenizer(), PROMPTS, SamplingSpec(max_new_tokens=8, temperature=0.0), progress=False)
    for prompt, response in zip(PROMPTS, drawn.response_ids, strict=True):
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
        ids = torch.tensor([prompt])
        theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
        assert response == theirs.tolist()
