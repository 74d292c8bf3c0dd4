"""Reward models of several outputs: distributions of ratings and their spread, vectors of cyclic preference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tiny
from prefopt.dispersion import rating_spread
from prefopt.engine.reward_models import new_shared_reward_model
from prefopt.errors import BadInput
from prefopt.models import save_model
from prefopt.outer.general_preference import against_policy, scores
from prefopt.outer.rounds import class_moments, wasserstein
from prefopt.scoring import reward_scores
from prefopt.training.objectives import Moment, RewardObjective
from prefopt.training.reward_objectives import (
    PreferenceObjective,
    RatingObjective,
    preference,
    preference_over_others,
    rating_moments,
    rating_targets,
)

START = Moment(0, 1, 0)
PAIRS = tiny.pairs(4, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(tiny.causal_lm(), tiny.tokenizer(), path)
    return path


def test_votes_update_a_uniform_prior():
    """2 chose, 1 rejected, 1 tie, a prior of 2 votes: (1, 1, 2) + 2/3 over 6; of the rejected response mirrored."""
    found = rating_targets([2, 1], [1, 0], [1, 0], 2.0)
    np.testing.assert_allclose(found[0], np.array([[5 / 3, 5 / 3, 8 / 3], [8 / 3, 5 / 3, 5 / 3]]) / 6)
    np.testing.assert_allclose(found[1, 0], np.array([2 / 3, 2 / 3, 5 / 3]) / 3)


def test_moments_are_those_of_the_plain_functions():
    outputs = np.random.default_rng(0).normal(size=(6, 3))
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    mean, variance = rating_moments(outputs)
    expected = np.array([class_moments(one) for one in shares])
    np.testing.assert_allclose(mean, expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(variance, expected[:, 1], rtol=1e-12)


def test_ratings_are_fitted_by_transport(folder):
    """The loss of a pair is the mean W1 of its two responses."""
    model = new_shared_reward_model(folder, [1, 2, 3])
    targets = rating_targets([3, 2, 1, 0], [0, 1, 2, 3], [0, 0, 0, 0], 1.0)
    objective = RatingObjective(**PAIRS, targets=targets)
    loss, sums = objective.loss(model, [0, 1, 2, 3], START)
    expected, right = 0.0, 0
    for row in range(4):
        with torch.no_grad():
            ids = [PAIRS["chosen_ids"][row], PAIRS["rejected_ids"][row]]
            shares = reward_scores(model, [PAIRS["prompt_ids"][row]] * 2, ids).double().softmax(-1).numpy()
        expected += sum(wasserstein(shares[side], targets[row, side]) for side in (0, 1)) / 2
        right += shares[0] @ [0, 1, 2] > shares[1] @ [0, 1, 2]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert sums["accuracy"].item() == right


def test_spread_is_the_mean_variance():
    """Variances .2 and .6 have the mean .4; no spread at all stays above 0, the largest below 1."""
    found = rating_spread([0.2, 0.0, 1.0], [0.6, 0.0, 1.0])
    assert found[0] == pytest.approx(0.4)
    assert 0 < found[1] < found[0] < found[2] < 1
    with pytest.raises(BadInput, match="spread"):
        rating_spread([1.2], [0.1])


def test_preference_is_the_plain_score():
    vectors = np.random.default_rng(1).normal(size=(5, 4))
    np.testing.assert_allclose(preference(vectors[:, None], vectors[None]), scores(vectors), atol=1e-12)
    others = (np.ones((5, 5)) - np.eye(5)) / 4
    expected = [against_policy(scores(vectors), others[row])[row] for row in range(5)]
    np.testing.assert_allclose(preference_over_others(vectors), expected, atol=1e-12)
    assert preference_over_others(vectors).sum() == pytest.approx(0.0, abs=1e-12)


def test_vectors_learn_a_cycle_that_no_reward_can(folder):
    """a beats b beats c beats a on every prompt: a language model with vectors gets all three right, a reward two."""
    prompts, answers = [[1, 5], [1, 6], [1, 7]], [[10, 2], [11, 2], [12, 2]]
    columns = {
        "prompt_ids": [p for p in prompts for _ in range(3)],
        "chosen_ids": [answers[n] for _ in prompts for n in range(3)],
        "rejected_ids": [answers[(n + 1) % 3] for _ in prompts for n in range(3)],
    }
    right = {}
    for outputs, objective in (
        (1, RewardObjective(**columns)),
        (2, PreferenceObjective(**columns, temperature=1.0)),
    ):
        model = new_shared_reward_model(folder, range(outputs))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(40):
            loss, sums = objective.loss(model, range(9), START)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        right[outputs] = sums["accuracy"].item()
    assert right[1] <= 6
    assert right[2] == 9


def test_kinds_take_their_own_settings_alone():
    from prefopt.specs import EnsembleSpec

    train = {"steps": 2, "batch_size": 4}
    for given, message in (
        ({"dimension": 6}, "set 'kind: general_preference'"),
        ({"kind": "general_preference", "prior_votes": 2.0}, "set 'kind: distributional'"),
        ({"kind": "distributional", "members": 2}, "'distributional' is one model"),
        ({"kind": "general_preference", "dimension": 3}, "multiple of 2"),
        ({"kind": "distributional", "subset": 0.5}, "remove 'subset'"),
    ):
        with pytest.raises(ValueError, match=message):
            EnsembleSpec.model_validate({"train": train, **given})
    assert json.dumps(EnsembleSpec.model_validate({"train": train, "kind": "distributional"}).model_dump())
