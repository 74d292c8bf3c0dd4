"""The sentiment classifier: its formula, its file, its stage, and what it knows of the demo world."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from artifact_builds import run_stage, save_table
from prefopt.errors import BadInput
from prefopt.evaluation.sentiment import Classifier, fit_classifier, load_classifier
from prefopt.pairs import build_pairs
from prefopt.specs import DataSpec, WorldSource
from prefopt.world import polarity

SMALL = Classifier(("bad", "good"), (-2.0, 1.5), 0.25)


def world_pairs(**source) -> pd.DataFrame:
    declared = {"kind": "world", "labels": "polarity", "closed_fraction": 0.0, "prompts": 1000, "pairs": 1000}
    return build_pairs(DataSpec(source=WorldSource(**declared | source)), Path())[0]


@pytest.fixture(scope="module")
def away() -> pd.DataFrame:
    return world_pairs(domain="away", seed=1000)


def test_probability_is_the_sigmoid_of_the_summed_word_weights():
    texts = ["good good bad", "good", "", "unknown words", "bad " * 1000]
    logits = [0.25 + 2 * 1.5 - 2.0, 0.25 + 1.5, 0.25, 0.25, -1999.75]
    expected = [1 / (1 + math.exp(-logit)) for logit in logits[:-1]] + [0.0]
    np.testing.assert_allclose(SMALL.positive(texts), expected, rtol=1e-14, atol=0)
    assert SMALL.positive([]).shape == (0,)


@pytest.mark.parametrize(("times", "inverse_ridge"), [(3, 1.0), (10, 0.2)])
def test_fit_is_where_the_gradient_of_the_penalised_loss_vanishes(times, inverse_ridge):
    # "good" in n positive texts, "bad" in n negative ones: by symmetry b = 0 and w_good = -w_bad = w, where
    # d/dw [w^2 / 2 + C n log(1 + exp(-w))] = 0, that is w = C n / (1 + exp(w)).
    fitted = fit_classifier(["good"] * times, ["bad"] * times, inverse_ridge=inverse_ridge)
    assert fitted.vocabulary == ("bad", "good")
    w = fitted.weights[1]
    assert w == pytest.approx(inverse_ridge * times / (1 + math.exp(w)), rel=1e-6)
    assert fitted.weights[0] == pytest.approx(-w, rel=1e-6)
    assert fitted.intercept == pytest.approx(0.0, abs=1e-6)


def test_the_file_is_plain_json_and_gives_the_same_classifier_back(tmp_path):
    fitted = fit_classifier(["a good day", "fine"], ["a bad day"])
    fitted.save(tmp_path)
    assert load_classifier(tmp_path) == fitted
    content = json.loads((tmp_path / "classifier.json").read_text())
    assert content == {
        "vocabulary": ["a", "bad", "day", "fine", "good"],
        "weights": list(fitted.weights),
        "intercept": fitted.intercept,
    }
    # Equal texts in another order of classes' rows give the same optimum.
    again = fit_classifier(["fine", "a good day"], ["a bad day"])
    np.testing.assert_allclose(again.weights, fitted.weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[1]", "no classifier"),
        ('{"vocabulary": ["a"], "weights": [], "intercept": 0}', "1 words, 0 weights"),
        ('{"vocabulary": ["a"], "weights": ["x"], "intercept": 0}', "no classifier"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "classifier.json").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_classifier(tmp_path)
    assert "classifier.json" in str(caught.value)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [([], ["bad"], "no positive texts"), (["good"], [], "no negative texts"), ([" "], [""], "all 2 texts are empty")],
)
def test_nothing_to_fit_on_is_refused(positive, negative, message):
    with pytest.raises(BadInput, match=message):
        fit_classifier(positive, negative)


# --- the stage and the demo world -------------------------------------------------------------------------------------


def test_the_stage_fits_one_split_and_reports_another(tmp_path, away):
    save_table(tmp_path, "pairs", "pairs", away)
    build = run_stage(tmp_path, "train-classifier", {"split": "train"}, ["pairs"])
    train, test = (away[away["split"] == split] for split in ("train", "test"))
    assert load_classifier(build.work) == fit_classifier(train["chosen"].tolist(), train["rejected"].tolist())
    assert build.summary["pairs"] == len(train)
    chosen, rejected = (load_classifier(build.work).positive(test[side]) for side in ("chosen", "rejected"))
    assert build.summary["held_out_accuracy"] == round(np.mean([*(chosen > 0.5), *(rejected < 0.5)]), 6)
    assert build.summary["held_out_order"] == round(np.mean(chosen > rejected), 6)
    assert build.summary["held_out_order"] > 0.95

    save_table(tmp_path, "pairs", "pairs", train)
    assert "held_out_order" not in run_stage(tmp_path, "train-classifier", {"split": "train"}, ["pairs"]).summary
    with pytest.raises(BadInput, match="no pair in the split 'judge'"):
        run_stage(tmp_path, "train-classifier", {"split": "judge"}, ["pairs"])


def test_it_judges_answers_to_prompts_that_it_never_saw_by_their_polarity(away):
    home = world_pairs()
    classifier = fit_classifier(away["chosen"].tolist(), away["rejected"].tolist())
    chosen, rejected = (classifier.positive(home[side].tolist()) for side in ("chosen", "rejected"))
    assert np.mean(chosen > rejected) > 0.95
    clear = np.abs([polarity(text) for text in home["chosen"]]) == 1.0
    sign = np.sign([polarity(text) for text in home["chosen"]])
    assert np.mean((chosen[clear] > 0.5) == (sign[clear] > 0)) > 0.98


def test_it_shares_no_prompt_and_no_pair_with_what_policies_learn_from(away):
    for policies in (world_pairs(), world_pairs(labels="mallows", closed_fraction=0.5), world_pairs(labels="oracle")):
        assert not set(away["prompt_id"]) & set(policies["prompt_id"])
        assert not set(away["pair_id"]) & set(policies["pair_id"])
    # Another seed in the same domain keeps pairs apart, but not prompts: there are only so many.
    home, other = world_pairs(), world_pairs(seed=1000)
    assert not set(home["pair_id"]) & set(other["pair_id"])
    assert set(home["prompt_id"]) & set(other["prompt_id"])
