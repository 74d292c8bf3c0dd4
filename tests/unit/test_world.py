from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from prefopt.errors import BadInput
from prefopt.world import (
    LENGTH_PREFERENCE,
    WorldParams,
    all_prompts,
    asked,
    candidates,
    generate_pairs,
    oracle_best,
    oracle_reward,
    polarity,
    reward_parts,
    vocabulary,
)

FORMS = ("fact", "sum", "open")
SMALL = WorldParams(prompts=300, pairs=300)
FOX = "what colour is the fox"
GARDEN = "tell a child about the garden in winter"


def words(pair: dict) -> tuple[int, int]:
    return len(pair["chosen"].split()), len(pair["rejected"].split())


def sampled_prompts(count: int) -> list[str]:
    rng = random.Random(5)
    return [
        rng.choice(all_prompts(domain, form)) for domain in ("home", "away") for form in FORMS for _ in range(count)
    ]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_equal_parameters_give_equal_pairs_and_another_seed_others():
    first = generate_pairs(SMALL)
    assert first == generate_pairs(SMALL)
    assert first != generate_pairs(replace(SMALL, seed=1))
    assert set(first[0]) == {"prompt", "chosen", "rejected", "domain", "kind", "phi"}


@pytest.mark.parametrize("domain", ["home", "away"])
def test_texts_are_short_and_use_known_words_separated_by_single_spaces(domain):
    known = set(vocabulary())
    assert len(known) <= 400
    pairs = generate_pairs(WorldParams(domain=domain, prompts=2000, pairs=2000))
    for pair in pairs:
        for name, limit in (("prompt", 14), ("chosen", 48), ("rejected", 48)):
            text = pair[name]
            assert 0 < len(text.split()) <= limit
            assert text == " ".join(text.split()).lower()
            assert known.issuperset(text.split())
        assert pair["chosen"] != pair["rejected"]


def test_domains_have_3000_prompts_each_and_none_in_common():
    home, away = (list(itertools.chain(*(all_prompts(domain, form) for form in FORMS))) for domain in ("home", "away"))
    assert len(set(home)) == len(home) >= 3000
    assert len(set(away)) == len(away) >= 3000
    assert not set(home) & set(away)
    assert max(len(prompt.split()) for prompt in home + away) <= 14


def test_the_away_domain_has_no_word_that_the_home_domain_does_not_teach():
    spoken = {word for form in FORMS for prompt in all_prompts("home", form) for word in prompt.split()}
    for pair in generate_pairs(WorldParams(prompts=3000, pairs=3000)):
        spoken.update(pair["chosen"].split())
    away = {word for form in FORMS for prompt in all_prompts("away", form) for word in prompt.split()}
    assert away <= spoken


@pytest.mark.parametrize("domain", ["home", "away"])
@pytest.mark.parametrize("form", FORMS)
def test_every_prompt_is_read_as_the_question_it_asks(domain, form):
    questions = [asked(prompt) for prompt in all_prompts(domain, form)]
    assert {question.form for question in questions} == {form}
    if form == "open":
        assert all(question.person for question in questions)
        assert all(bool(question.season) == (domain == "home") for question in questions)
        assert {len(question.subjects) for question in questions} == {1 if domain == "home" else 2}
    else:
        # 12 animals x 3 attributes, or 5 x 5 sums: each is asked in many prompts, so a split by prompt can be learnt.
        times = {}
        for question in questions:
            key = (question.subjects, question.attribute, question.answer)
            times[key] = times.get(key, 0) + 1
        assert len(times) == (36 if form == "fact" else 25)
        assert min(times.values()) >= 40


def test_known_answers():
    assert asked(FOX).answer == "red"
    assert asked("the home of the bear is where").answer == "den"
    assert asked("please tell me the sum of four and five").answer == "nine"
    assert asked("from one friend tell a child about the river in spring").person == "child"
    assert asked("rose rose") is None


def test_closed_fraction_is_exact_and_prompts_are_distinct_up_to_their_number():
    pairs = generate_pairs(WorldParams(prompts=400, pairs=400, closed_fraction=0.3))
    assert sum(pair["kind"] == "closed" for pair in pairs) == 120
    assert len({pair["prompt"] for pair in pairs}) == 400
    again = generate_pairs(WorldParams(prompts=100, pairs=250, closed_fraction=0.3))
    assert len({pair["prompt"] for pair in again}) == 100
    assert len(again) == 250


def test_closed_answers_vary_less_than_open_ones():
    """The spread of a prompt's right answers is what an entropy estimate of dispersion sees."""
    rng = random.Random(0)
    distinct = {"fact": [], "sum": [], "open": []}
    for form in FORMS:
        for prompt in rng.sample(all_prompts("home", form), 20):
            first_sentences = {rng.choice(candidates(prompt, 2, rng)).split(" . ")[0] for _ in range(60)}
            distinct[form].append(len(first_sentences))
    assert max(np.mean(distinct["fact"]), np.mean(distinct["sum"])) < 0.35 * np.mean(distinct["open"])


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_the_right_answer_decides_a_closed_question():
    right, wrong = "the fox is red .", "the fox is white ."
    assert oracle_reward(FOX, right) - oracle_reward(FOX, wrong) == pytest.approx(3.0, abs=0.3)
    both = oracle_reward(FOX, f"{right} {wrong}")
    assert oracle_reward(FOX, wrong) < both < oracle_reward(FOX, right) - 1.5
    assert oracle_reward(FOX, f"{right} that is well known .") > oracle_reward(FOX, right)
    assert oracle_reward(FOX, f"{right} that is a guess .") < oracle_reward(FOX, right)
    assert reward_parts(FOX, "the cat is red .")["answer"] == 0.0
    assert reward_parts(FOX, "red")["answer"] == pytest.approx(0.3 * 3.0)


def test_the_answer_of_a_sum_is_what_follows_is():
    prompt = "add two and three"
    assert reward_parts(prompt, "two plus three is five .")["answer"] == 3.0
    assert reward_parts(prompt, "three plus two is five .")["answer"] == 3.0
    assert reward_parts(prompt, "two plus three is six .")["answer"] == 0.0
    assert reward_parts(prompt, "one plus four is five .")["answer"] == 0.0


def test_open_answers_are_worth_their_relevance():
    on, off = "the rose is old . a child can trim the hedge .", "the kettle is old . a child can bake the plate ."
    parts = reward_parts(GARDEN, on)
    # Every named word (rose, child, trim, hedge) belongs to the garden or the prompt; three of them cover it.
    assert parts["relevance"] == pytest.approx(3.0)
    assert parts["coverage"] == pytest.approx(0.5)
    assert parts["grammar"] == 1.0
    assert parts["length"] == pytest.approx(-LENGTH_PREFERENCE * math.expm1(-12 / 15))
    # child only, one of four
    assert reward_parts(GARDEN, off)["relevance"] == pytest.approx(3.0 / 4)
    assert oracle_reward(GARDEN, on) == pytest.approx(sum(parts.values()))


def test_repeating_and_scrambling_lose_and_a_friendly_word_wins_a_little():
    text = "the rose is old . the gate is new ."
    reward = oracle_reward(GARDEN, text)
    assert oracle_reward(GARDEN, f"{text} {text}") < reward - 0.5
    assert oracle_reward(GARDEN, "rose the is old . the gate is new .") < reward - 0.5
    assert reward_parts(GARDEN, f"{text} {text}")["grammar"] == 0.5
    # two things named, one of them distinct
    assert reward_parts(GARDEN, "the rose is old . the rose is new .")["relevance"] == pytest.approx(3.0 / 2)
    friendly, unfriendly = text.replace("old", "bright"), text.replace("old", "gloomy")
    assert oracle_reward(GARDEN, friendly) - reward == pytest.approx(0.3)
    assert reward - oracle_reward(GARDEN, unfriendly) == pytest.approx(0.3)


def test_the_length_preference_is_mild_and_saturates():
    sentences = [
        f"the {thing} is old ." for thing in ("rose", "hedge", "bench", "spade", "lawn", "tulip", "gate", "snow")
    ]
    rewards = [reward_parts(GARDEN, " ".join(sentences[:n]))["length"] for n in range(1, 9)]
    gains = np.diff(rewards)
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()
    assert rewards[-1] < LENGTH_PREFERENCE
    assert reward_parts(GARDEN, sentences[0], length_preference=0.0)["length"] == 0.0


def test_polarity_counts_words():
    assert polarity("the rose is bright . the gate is broken . the lawn is lovely .") == pytest.approx(1 / 3)
    assert polarity("the rose is gloomy .") == -1.0
    assert polarity("the rose is old .") == polarity("") == 0.0


def test_nonsense_of_any_sort_is_judged_low_and_never_raises():
    rng = random.Random(2)
    junk = ["", " ", ".", ". . .", "rose " * 30, "the the the", "RED!", "\n\t<eos>", "красный", "rose rose . " * 9]
    junk += [" ".join(rng.choices(vocabulary(), k=rng.randint(1, 48))) for _ in range(200)]
    for prompt in sampled_prompts(3):
        typical = np.quantile([oracle_reward(prompt, text) for text in candidates(prompt, 30, rng)], 0.25)
        rewards = [oracle_reward(prompt, text) for text in junk]
        assert np.quantile(rewards, 0.95) < 0.3 * oracle_reward(prompt, oracle_best(prompt))
        assert np.quantile(rewards, 0.95) < typical
    assert oracle_reward("no question at all", "the rose is bright .") < 2.0
    assert oracle_reward("", "") == 0.0


def test_the_best_response_is_above_the_95th_percentile_of_the_candidates():
    rng = random.Random(3)
    for prompt in sampled_prompts(5):
        best = oracle_best(prompt)
        assert len(best.split()) <= 48
        assert set(vocabulary()).issuperset(best.split())
        rewards = [oracle_reward(prompt, text) for _ in range(20) for text in candidates(prompt, 5, rng)]
        assert oracle_reward(prompt, best) >= np.quantile(rewards, 0.95)
    with pytest.raises(BadInput, match="asks for nothing"):
        oracle_best("rose rose")


# --- labels and lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["home", "away"])
def test_the_oracle_prefers_the_longer_response_in_61_percent(domain):
    """2405.19316: after relabelling, the response with >= 10 % more tokens is preferred in 61 % of pairs."""
    wins = []
    for seed in range(20, 25):
        params = WorldParams(seed=seed, domain=domain, prompts=3000, pairs=3000, labels="oracle")
        lengths = np.array([words(pair) for pair in generate_pairs(params)])
        gap = lengths.max(axis=1) >= 1.1 * lengths.min(axis=1)
        assert gap.mean() > 0.75
        wins.append(lengths[gap, 0] > lengths[gap, 1])
    wins = np.concatenate(wins)
    assert len(wins) >= 5000
    assert wins.mean() == pytest.approx(0.61, abs=0.01)


def agreement(pairs: list[dict], kind: str) -> tuple[float, int]:
    agrees = [
        oracle_reward(pair["prompt"], pair["chosen"]) > oracle_reward(pair["prompt"], pair["rejected"])
        for pair in pairs
        if pair["kind"] == kind
    ]
    return float(np.mean(agrees)), len(agrees)


def test_two_neighbours_in_rank_are_ordered_with_probability_one_over_one_plus_phi():
    """MallowsPO, Corollary 3 at distance one: of two candidates, the better is chosen with 1 / (1 + phi)."""
    pairs = generate_pairs(WorldParams(prompts=3000, pairs=12000, candidates=2, phi_closed=0.2, phi_open=0.8))
    for kind, phi in (("closed", 0.2), ("open", 0.8)):
        share, count = agreement(pairs, kind)
        expected = 1 / (1 + phi)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
        assert {pair["phi"] for pair in pairs if pair["kind"] == kind} == {phi}


def test_raters_agree_more_on_closed_prompts_and_always_with_the_oracle_as_rater():
    pairs = generate_pairs(WorldParams(prompts=2000, pairs=2000))
    assert agreement(pairs, "closed")[0] > agreement(pairs, "open")[0] + 0.15
    oracle = generate_pairs(WorldParams(prompts=2000, pairs=2000, labels="oracle"))
    assert agreement(oracle, "closed")[0] == agreement(oracle, "open")[0] == 1.0
    # Labels change which of the two is chosen, never which two are shown.
    for rated, relabelled in zip(pairs, oracle, strict=True):
        assert rated["prompt"] == relabelled["prompt"]
        assert {rated["chosen"], rated["rejected"]} == {relabelled["chosen"], relabelled["rejected"]}


@pytest.mark.parametrize("labels", ["oracle", "mallows"])
@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_the_longer_response_wins_in_exactly_the_fraction_rho(rho, labels):
    pairs = generate_pairs(WorldParams(prompts=1000, pairs=1000, rho=rho, labels=labels))
    lengths = np.array([words(pair) for pair in pairs])
    for end_token in (0, 1):
        tokens = lengths + end_token
        assert (tokens.max(axis=1) >= 1.1 * tokens.min(axis=1)).all()
        assert (tokens[:, 0] > tokens[:, 1]).sum() == round(rho * 1000)


def test_data_sets_that_differ_in_rho_share_their_prompts():
    low, high = (generate_pairs(replace(SMALL, rho=rho, labels="oracle")) for rho in (0.2, 0.8))
    assert [pair["prompt"] for pair in low] == [pair["prompt"] for pair in high]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "homes"}, "did you mean 'home'"),
        ({"labels": "oracles"}, "did you mean 'oracle'"),
        ({"phi_open": 0.0}, "phi_open"),
        ({"closed_fraction": 1.5}, "closed_fraction"),
        ({"candidates": 1}, "candidates"),
        ({"rho": -0.1}, "rho"),
    ],
)
def test_bad_parameters_are_named(change, message):
    with pytest.raises(BadInput, match=message):
        WorldParams(**change)


def test_more_than_the_world_holds_is_refused_with_the_way_out():
    with pytest.raises(BadInput, match="lower `prompts`"):
        generate_pairs(WorldParams(prompts=50_000, pairs=50_000))
    with pytest.raises(BadInput, match="raise `candidates`"):
        generate_pairs(replace(SMALL, rho=1.0, candidates=2))
