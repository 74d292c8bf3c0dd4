"""Scores do not depend on the order of rows, the side of padding, or how many rows go through the model at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import tiny
from prefopt.engine.bulk import reward_pairs, score_pairs
from prefopt.engine.packed_attention import padded
from prefopt.engine.precision import set_precision
from prefopt.engine.reward_models import new_reward_model
from prefopt.generation import generate
from prefopt.models import save_model
from prefopt.specs import SamplingSpec

ROWS = 24
PAIRS = tiny.pairs(ROWS, seed=3)
ORDER = random.Random(5).sample(range(ROWS), ROWS)
BAND = {"fp32": 2e-5, "bf16": 0.25}
"""Nats of a log-probability summed over a response, nats per token of an entropy, units of a reward."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model") / "model"
    save_model(tiny.causal_lm(), tiny.tokenizer(), found)
    return found


def shuffled(values):
    return [values[row] for row in ORDER]


def reference(batch: int, rows=lambda values: values, precision: str = "fp32") -> np.ndarray:
    """Log-probabilities and entropies of both responses [4, N]."""
    model = set_precision(tiny.causal_lm(), precision)
    columns = (rows(PAIRS[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    found = score_pairs(model, *columns, batch_size=batch)
    return np.stack([found[f"{side}_{what}"] for side in ("chosen", "rejected") for what in ("logp", "entropy")])


def rewards(folder, batch: int, rows=lambda values: values, precision: str = "fp32") -> np.ndarray:
    """Rewards of both responses [2, N]."""
    model = set_precision(new_reward_model(folder, seed=1), precision)
    columns = (rows(PAIRS[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return np.stack(reward_pairs(model, *columns, batch_size=batch))


@pytest.mark.parametrize("precision", BAND)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_reference_scores_do_not_depend_on_order_or_batch(batch, precision):
    expected = reference(8, precision=precision)
    found = reference(batch, shuffled, precision)
    np.testing.assert_allclose(found, expected[:, ORDER], rtol=0, atol=BAND[precision])
    assert np.abs(expected[:, ORDER] - expected).max() > 4 * BAND[precision]  # rows do differ


@pytest.mark.parametrize("precision", BAND)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_rewards_do_not_depend_on_order_or_batch(folder, batch, precision):
    expected = rewards(folder, 8, precision=precision)
    found = rewards(folder, batch, shuffled, precision)
    np.testing.assert_allclose(found, expected[:, ORDER], rtol=0, atol=BAND[precision])


def left_padded(prompts: list[list[int]], responses: list[list[int]]) -> dict[str, torch.Tensor]:
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([[tiny.PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_padding_on_the_left_on_the_right_and_none_give_the_same_log_probabilities_and_entropies():
    model, prompts, responses = tiny.causal_lm(), PAIRS["prompt_ids"], PAIRS["chosen_ids"]
    packed = reference(64)[:2]
    with padded(model):
        right = score_pairs(model, prompts, responses, PAIRS["rejected_ids"], batch_size=64)
    with torch.no_grad():
        logp = model(**left_padded(prompts, responses)).logits.log_softmax(-1)
    left = []
    for row, response in zip(logp, responses, strict=True):
        before = row[-len(response) - 1 : -1]  # the predictions of the response's tokens
        entropy = -(before.exp() * before).sum(-1).mean()
        left.append((before.gather(1, torch.tensor(response)[:, None]).sum().item(), entropy.item()))
    for found in (np.array(left).T, np.stack([right["chosen_logp"], right["chosen_entropy"]])):
        np.testing.assert_allclose(found, packed, rtol=0, atol=BAND["fp32"])


def test_padding_on_the_left_gives_the_same_rewards(folder):
    model = new_reward_model(folder, seed=1)
    with torch.no_grad():
        body = model.base_model(**left_padded(PAIRS["prompt_ids"], PAIRS["chosen_ids"]))[0]
        left = model.score(body[:, -1])[:, 0].numpy()
    np.testing.assert_allclose(left, rewards(folder, 64)[0], rtol=0, atol=BAND["fp32"])


def answers(batch: int, prompts: list[list[int]]) -> list[list[int]]:
    sampling = SamplingSpec(max_new_tokens=12, temperature=0.0, batch_size=batch)
    return generate(tiny.causal_lm(), tiny.tokenizer(), prompts, sampling).response_ids


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_greedy_answers_do_not_depend_on_order_or_batch(batch):
    expected = answers(8, PAIRS["prompt_ids"])
    assert answers(batch, shuffled(PAIRS["prompt_ids"])) == shuffled(expected)
    assert len({tuple(answer) for answer in expected}) > ROWS / 2


def test_greedy_answers_are_those_of_left_padded_generation():
    prompts = PAIRS["prompt_ids"]
    given = left_padded(prompts, [[] for _ in prompts])
    model, longest = tiny.causal_lm(), given["input_ids"].shape[1]
    stop = {"eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD, "do_sample": False, "max_new_tokens": 12}
    with torch.no_grad():
        rows = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **stop)[:, longest:].tolist()
    whole = [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in rows]
    assert answers(8, prompts) == whole
