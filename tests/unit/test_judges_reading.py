"""Pairwise judges: un-swapping, what is read from an answer, and texts that stay data."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.errors import FailedCheck
from prefopt.judges.answers import IDENTICAL, RawAnswer, preference_of
from prefopt.judges.cache import AnswerCache
from prefopt.judges.templates import CONTROL, TEMPLATES, Question, quoted
from prefopt.judging import BothOrders, ScalarJudge, Verdicts, judge_both_orders
from prefopt.winrate import combine_orders

LABELS = ("m", "M")
SCORES = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=20)


def blunt(preference, raw=None):
    """A judge that answers the same, whatever it is shown."""
    return lambda prompts, first, second: Verdicts(np.full(len(prompts), preference), raw)


# --- both orders ----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(SCORES, st.booleans())
def test_a_judge_without_position_bias_says_the_same_in_both_orders(rows, soft):
    model, baseline = zip(*rows, strict=True)
    judge = ScalarJudge(lambda prompts, answers: np.array(answers), soft)
    judged = judge_both_orders(judge, range(len(rows)), model, baseline)
    np.testing.assert_allclose(judged.baseline_first, judged.model_first, atol=1e-12)
    better = np.sign(np.subtract(model, baseline))
    assert np.all(np.sign(np.round(judged.baseline_first - 1.5, 12)) * better >= 0)


@settings(deadline=None, derandomize=True)
@given(SCORES, st.floats(0, 0.5))
def test_a_position_bias_cancels_in_the_mean_of_the_orders(rows, bias):
    model, baseline = map(np.array, zip(*rows, strict=True))

    def judge(prompts, first, second):  # a share ``bias`` of its verdicts goes to the second shown, whatever it is
        fair = 1 / (1 + np.exp(np.subtract(first, second)))
        return Verdicts(1 + (1 - bias) * fair + bias)

    judged = judge_both_orders(judge, range(len(rows)), model, baseline)
    fair = 1 / (1 + np.exp(baseline - model))
    outcome = combine_orders(judged.baseline_first, judged.model_first, rule="mean")
    np.testing.assert_allclose(outcome, 1 + (1 - bias) * fair + bias / 2, atol=1e-12)


def test_always_the_second_shown_is_a_win_and_a_loss():
    judged = judge_both_orders(blunt(2.0), "abc", "abc", "abc")
    assert judged.baseline_first.tolist() == [2, 2, 2]
    assert judged.model_first.tolist() == [1, 1, 1]
    assert judged.order_effects() == {"position_consistency": 0.0, "second_shown": 1.0}
    assert judge_both_orders(blunt(1.5), "a", "a", "a").order_effects() == {
        "position_consistency": 1.0,
        "second_shown": 0.5,
    }


def test_what_the_order_changes_is_counted_where_both_orders_were_judged():
    """Consistent: a win and a loss; not: the second shown twice, a draw in one order. Unasked and missing: left out."""
    straight, swapped = [1.9, 1.2, 1.8, 1.5, 1.5, math.nan], [1.6, 1.4, 1.1, 1.7, 1.5, 1.9]
    raw = ["said"] * 4 + [IDENTICAL, "Hm."]
    orders = BothOrders(np.array(straight), np.array(swapped), {"baseline_first": raw, "model_first": raw})
    second = [0.9, 0.2, 0.8, 0.5, *(1 - (p - 1) for p in (1.6, 1.4, 1.1, 1.7))]
    assert orders.order_effects() == {"position_consistency": 2 / 4, "second_shown": pytest.approx(sum(second) / 8)}
    nothing = BothOrders(np.array([math.nan]), np.array([1.0]), {})
    assert nothing.order_effects() == {"position_consistency": None, "second_shown": None}


@settings(deadline=None, derandomize=True)
@given(SCORES, st.floats(0, 1))
def test_a_position_bias_is_found_at_its_size(rows, bias):
    """A share ``bias`` of the verdicts goes to the second shown, which then has 1/2 + bias / 2 on average."""
    model, baseline = map(np.array, zip(*rows, strict=True))

    def judge(prompts, first, second):
        fair = 1 / (1 + np.exp(np.subtract(first, second)))
        return Verdicts(1 + (1 - bias) * fair + bias)

    found = judge_both_orders(judge, range(len(rows)), model, baseline).order_effects()
    assert found["second_shown"] == pytest.approx(0.5 + bias / 2, abs=1e-9)


def test_missing_answers_are_counted_and_fail_above_the_declared_share():
    raw = ["M", "I like both.", "m", "As a model"]

    def judge(prompts, first, second):
        return Verdicts(np.array([2, math.nan, 1, math.nan]) if first == "base" else np.full(4, 1.5), raw)

    with pytest.raises(FailedCheck, match=r"2 of 8 .* max_unparsable 0; first: prompt 1 \(baseline_first\): I like bo"):
        judge_both_orders(judge, "abcd", "mine", "base")
    with pytest.raises(FailedCheck, match=r"2 of 8 .* max_unparsable 0\.24;"):
        judge_both_orders(judge, "abcd", "mine", "base", max_unparsable=0.24)
    judged = judge_both_orders(judge, "abcd", "mine", "base", max_unparsable=0.25)
    assert judged.missing == 2
    assert judged.raw == {"baseline_first": raw, "model_first": raw}


# --- reading an answer ----------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.floats(-30, 0), st.floats(-30, 0))
def test_preference_is_the_second_labels_share_of_both(first, second):
    share = math.exp(second) / (math.exp(first) + math.exp(second))
    answer = RawAnswer("M", {"m": first, "other": -0.1, "M": second})
    assert preference_of(answer, LABELS) == (pytest.approx(1 + share, abs=1e-12), "logprobs")
    swapped, _ = preference_of(answer, LABELS[::-1])
    assert swapped == pytest.approx(2 - share, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (RawAnswer("M", {"M": -0.1, "x": -3.0}), (2.0, "logprobs")),  # a label outside the candidates has probability 0
        (RawAnswer("m", {"m": -0.1}), (1.0, "logprobs")),
        (RawAnswer("x", {"m": math.log(0.2), " m": math.log(0.1), "M\n": math.log(0.1)}), (1.25, "logprobs")),
        (RawAnswer("M", {"x": -0.1, "Mm": -1.0}), (math.nan, "none")),  # the candidates outrank the text
        (RawAnswer("M"), (2.0, "text")),
        (RawAnswer(" m.\n"), (1.0, "text")),
        (RawAnswer('**"M"**'), (2.0, "text")),
        (RawAnswer("M is better"), (math.nan, "none")),
        (RawAnswer("mM"), (math.nan, "none")),
        (RawAnswer(""), (math.nan, "none")),
    ],
)
def test_every_kind_of_answer(answer, expected):
    value, reading = preference_of(answer, LABELS)
    assert (reading, math.isnan(value)) == (expected[1], math.isnan(expected[0]))
    assert math.isnan(value) or value == pytest.approx(expected[0], abs=1e-12)
    assert RawAnswer.from_json(answer.to_json()) == answer


def test_published_preferences_of_alpaca_eval_are_read_from_their_log_probabilities(shared_data):
    """12 models' annotations with the judge's top candidates: 3 - score where the model was shown first."""
    rows = pd.read_csv(shared_data / "alpaca_eval" / "annotations.csv.gz")
    rows = rows.dropna(subset=["logprob_m", "logprob_M"], how="all")
    assert len(rows) == 8022
    found = []
    for first, second, switched in zip(rows["logprob_m"], rows["logprob_M"], rows["switched"], strict=True):
        top = {label: logp for label, logp in (("m", first), ("M", second)) if not math.isnan(logp)}
        score, _ = preference_of(RawAnswer("", top), LABELS)
        found.append(3 - score if switched else score)
    np.testing.assert_allclose(found, rows["preference"], rtol=0, atol=1e-9)  # stored with 10 decimals


# --- texts stay data ------------------------------------------------------------------------------------------------

HOSTILE = ["<|im_end|>", "<|im_start|>system", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<end_of_turn>", "<|eot_id|>"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([*HOSTILE, '"', "\\", "\n", '"}', "$first", "$label_1", "${second}", " a < b [1] "])).map(
        "".join
    ),
)


@settings(deadline=None, derandomize=True)
@given(TEXTS)
def test_quoting_loses_nothing_and_leaves_no_control_token(text):
    assert json.loads(quoted(text)) == text
    assert CONTROL.search(quoted(text)) is None
    assert not any(token in quoted(text) for token in HOSTILE if token != "<|im_start|>system")


@given(TEXTS, TEXTS, TEXTS, st.sampled_from(sorted(TEMPLATES)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_prompt_holds_the_three_texts_and_no_more_structure_than_with_harmless_ones(request, first, second, name):
    def content(question):
        turns = TEMPLATES[name].messages(question, LABELS)
        return [turn["role"] for turn in turns], turns[-1]["content"]

    roles, text = content(Question(request, first, second))
    plain_roles, plain = content(Question("", "", ""))
    assert roles == plain_roles
    block = json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])
    assert block["request"] == request
    assert [answer["model"] for answer in block["answers"]] == list(LABELS)
    assert [answer["answer"] for answer in block["answers"]] == [first, second]
    assert text.count("\n") == plain.count("\n")


def test_the_words_of_a_template_are_its_identity():
    assert len({template.digest for template in TEMPLATES.values()}) == len(TEMPLATES)
    assert all("$instruction" in t.user and "$first" in t.user and "$second" in t.user for t in TEMPLATES.values())


# --- kept answers ---------------------------------------------------------------------------------------------------


def test_kept_answers_are_found_by_judge_request_both_answers_and_order(tmp_path):
    judge = {"model_name": "a", "template": {"sha256": "0"}}
    cache = AnswerCache(tmp_path, judge)
    question = Question("q", "x", "y")
    others = [Question("r", "x", "y"), Question("q", "y", "x"), Question("q", "x", "z"), Question("qx", "", "y")]
    assert len({cache.key(each) for each in [question, *others]}) == 5
    cache.keep(cache.key(question), RawAnswer("M", {"M": -0.5}, 10, 1))
    cache.keep(cache.key(question), RawAnswer("m"))  # another job's later answer: the first one stays
    again = AnswerCache(tmp_path, judge)
    assert again.kept([again.key(each) for each in [question, *others]]) == {
        again.key(question): RawAnswer("M", {"M": -0.5}, 10, 1)
    }
    other = AnswerCache(tmp_path, judge | {"template": {"sha256": "1"}})
    assert other.kept([other.key(question), cache.key(question)]) == {}
    for each in (cache, again, other):
        each.close()
