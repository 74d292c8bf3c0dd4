"""A CUDA device gives the CPU's numbers within stated bands; skipped, with the reason, where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from prefopt.engine.bulk import reward_pairs, score_pairs
from prefopt.engine.precision import set_precision
from prefopt.engine.reward_models import new_reward_model
from prefopt.generation import generate
from prefopt.models import save_model
from prefopt.scoring import response_scores
from prefopt.specs import SamplingSpec, TrainSpec
from prefopt.trainer import train
from prefopt.training.policy_objective import PolicyObjective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAIRS = tiny.pairs(24, seed=1)
BAND = {"fp32": 2e-4, "bf16": 0.3}  # nats, on log-probabilities of some 30


def scores(device: str, precision: str = "fp32"):
    model = set_precision(tiny.causal_lm().to(device), precision)
    with torch.no_grad():
        return response_scores(model, PAIRS["prompt_ids"], PAIRS["chosen_ids"], entropy=True)


@pytest.mark.parametrize("precision", BAND)
def test_scores_of_the_device_are_those_of_the_cpu(precision):
    near, far = scores("cpu"), scores("cuda", precision)
    assert torch.allclose(near.logp, far.logp.cpu().float(), atol=BAND[precision], rtol=0)
    assert torch.allclose(near.entropy, far.entropy.cpu().float(), atol=BAND[precision], rtol=0)


def trained(device: str, folder, precision: str = "fp32") -> list[float]:
    model = tiny.causal_lm()
    with torch.no_grad():
        sides = [response_scores(model, PAIRS["prompt_ids"], PAIRS[f"{side}_ids"]) for side in ("chosen", "rejected")]
    signals = {f"ref_{side}_logp": at.logp.tolist() for side, at in zip(("chosen", "rejected"), sides, strict=True)}
    objective = PolicyObjective(
        **PAIRS, pair_ids=list(range(24)), loss="dpo", loss_params={"beta": 0.1}, signals=signals
    )
    spec = TrainSpec(steps=10, batch_size=8, learning_rate=1e-3, precision=precision)
    result = train(
        model,
        objective,
        spec,
        seed=0,
        state_dir=folder / device,
        micro_batch=4,
        checkpoint_steps=100,
        device=device,
        progress=False,
    )
    return [row["loss"] for row in result.metrics]


@pytest.mark.parametrize(("precision", "band"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_training_on_the_device_follows_the_cpu(tmp_path, precision, band):
    assert trained("cuda", tmp_path, precision) == pytest.approx(trained("cpu", tmp_path), abs=band)


@pytest.mark.parametrize("precision", BAND)
def test_rewards_of_the_device_are_those_of_the_cpu(tmp_path, precision):
    save_model(tiny.causal_lm(), tiny.tokenizer(), tmp_path)
    found = []
    for device, how in (("cpu", "fp32"), ("cuda", precision)):
        model = new_reward_model(tmp_path, seed=1, device=device, precision=how)
        columns = (PAIRS[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        found.append(torch.tensor(np.stack(reward_pairs(model, *columns, batch_size=8))))
    assert torch.allclose(*found, atol=BAND[precision], rtol=0)


def test_greedy_answers_of_the_device_are_those_of_the_cpu():
    sampling = SamplingSpec(max_new_tokens=12, temperature=0.0, batch_size=5)
    near, far = (
        generate(tiny.causal_lm().to(device), tiny.tokenizer(), PAIRS["prompt_ids"], sampling).response_ids
        for device in ("cpu", "cuda")
    )
    assert near == far


@pytest.mark.parametrize("batch", [1, 64])
def test_scores_of_the_device_do_not_depend_on_the_batch(batch):
    model = tiny.causal_lm().to("cuda")
    columns = [PAIRS[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    some, expected = (score_pairs(model, *columns, batch_size=size) for size in (batch, 8))
    for name, values in expected.items():
        np.testing.assert_allclose(some[name], values, rtol=0, atol=BAND["fp32"], err_msg=name)
