"""What the demo world promises to be, measured on samples of whole data sets.

The oracle's mild preference for longer responses (61 %) and the parts of its reward are measured in test_world, the
disjoint texts of the sentiment classifier in test_sentiment.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from artifact_builds import build_of, save_table
from prefopt.digests import canonical_json
from prefopt.ensemble import length_outcome, longer_wins_fraction
from prefopt.errors import BadInput
from prefopt.inputs.rendering import render_prompt
from prefopt.inputs.tokenizer_training import UNK, train_tokenizer
from prefopt.mallows import fit_mallows_phi
from prefopt.pairs import build_pairs
from prefopt.specs import DataSpec, SplitSpec, TokensSpec, WorldSource
from prefopt.stages.reward import _member_rows
from prefopt.stages.tables import token_rows
from prefopt.tokens import tokenize_pairs
from prefopt.world import (
    WorldParams,
    all_prompts,
    bounds,
    candidates,
    draw_prompts,
    generate_pairs,
    oracle_best,
    oracle_reward,
    polarity,
)
from prefopt.world.pairs import _ballots

RHOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
BIASES = (0.2, 0.4, 0.5, 0.6, 0.8)
TOKENS = TokensSpec(max_prompt_tokens=20, max_length=72)
RESPONSE_LIMIT = 50


@cache
def table(**source) -> pd.DataFrame:
    splits = SplitSpec(train=0.7, judge=0.1, validation=0.1, test=0.1)
    return build_pairs(DataSpec(source=WorldSource(kind="world", **source), splits=splits), Path())[0]


@cache
def home_tokenizer(seed: int = 0):
    """As the base stage trains it: on the prompts and the chosen responses of the train split."""
    pairs = table(seed=seed)
    train = pairs[pairs["split"] == "train"]
    texts = [message["content"] for prompt in train["prompt"] for message in prompt] + list(train["chosen"])
    return train_tokenizer(texts, "words", 512)


@cache
def tokens(**source) -> pd.DataFrame:
    accepted, refused = tokenize_pairs(table(**source), home_tokenizer(), TOKENS)
    assert refused.empty
    return accepted


# --- dispersion -------------------------------------------------------------------------------------------------------


def test_rankings_of_closed_and_open_prompts_have_the_dispersion_they_were_drawn_with():
    params = WorldParams(prompts=3000, pairs=3000, phi_closed=0.2, phi_open=0.8)
    ballots = _ballots(draw_prompts("home", 3000, 0.5, 0), params)
    for kind, phi in (("closed", 0.2), ("open", 0.8)):
        fitted = fit_mallows_phi([ballot.ranking for ballot in ballots if ballot.kind == kind], centre=range(6))
        # Four standard errors of the maximum-likelihood estimate.
        assert fitted.phi_error < 0.01
        assert abs(fitted.phi - phi) < 4 * fitted.phi_error


@pytest.mark.parametrize(("phi_closed", "phi_open"), [(0.2, 0.8), (0.5, 0.5), (0.9, 0.1)])
def test_labels_alone_show_the_dispersion_of_their_prompts(phi_closed, phi_open):
    # With two candidates the better one is chosen with probability p = 1 / (1 + phi), so phi = 1/p - 1.
    pairs = table(prompts=2000, pairs=4000, candidates=2, phi_closed=phi_closed, phi_open=phi_open)
    kinds = pairs["meta"].str.extract(r'"kind": "(\w+)"')[0]
    better = np.array(
        [
            oracle_reward(row.prompt[0]["content"], row.chosen) > oracle_reward(row.prompt[0]["content"], row.rejected)
            for row in pairs.itertuples()
        ]
    )
    for kind, phi in (("closed", phi_closed), ("open", phi_open)):
        p, count = better[kinds == kind].mean(), (kinds == kind).sum()
        # d phi = dp / p^2, dp = sqrt(p (1 - p) / n)
        assert 1 / p - 1 == pytest.approx(phi, abs=4 * np.sqrt(p * (1 - p) / count) / p**2)


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", RHOS)
def test_biased_data_sets_have_their_fraction_exactly_in_tokens(rho):
    rows = tokens(labels="oracle", prompts=700, pairs=700, rho=rho)
    lengths = rows["chosen_tokens"].to_numpy(), rows["rejected_tokens"].to_numpy()
    assert (length_outcome(*lengths) != 0).all()
    assert longer_wins_fraction(*lengths) == round(rho * 700) / 700


@pytest.mark.parametrize("rho", RHOS)
def test_biased_subsamples_have_theirs_and_read_nothing_outside_their_data_set(tmp_path, rho):
    rows = tokens(labels="oracle", prompts=700, pairs=700, rho=rho)
    save_table(tmp_path, "tokens", "tokens", rows)
    outside = rows["split"] != "train"
    mutated = rows.copy()
    for kind in ("ids", "tokens"):
        sides = [f"chosen_{kind}", f"rejected_{kind}"]
        mutated.loc[outside, sides] = rows.loc[outside, sides[::-1]].to_numpy()
    save_table(tmp_path, "mutated", "tokens", mutated)
    train = set(rows.loc[~outside, "pair_id"])
    for bias in BIASES:
        spec = {"longer_wins": bias, "subset": 1.0, "seeds": {"subset": 3}, "equal_to": list(BIASES)}
        build = build_of(tmp_path, "reward", spec, [])
        drawn, again = (_member_rows(token_rows(tmp_path / name, "train"), build) for name in ("tokens", "mutated"))
        pd.testing.assert_frame_equal(drawn, again)
        assert train.issuperset(drawn["pair_id"])
        wins = length_outcome(drawn["chosen_tokens"], drawn["rejected_tokens"]) > 0
        assert wins.sum() == np.floor(bias * len(drawn) + 0.5)


def test_responses_end_within_the_limit_and_so_do_prompts():
    for source in ({}, {"domain": "away"}, {"labels": "polarity", "closed_fraction": 0.0}):
        rows = tokens(**source)
        end = home_tokenizer().eos_token_id
        for side in ("chosen", "rejected"):
            assert rows[f"{side}_tokens"].max() <= RESPONSE_LIMIT
            assert all(ids[-1] == end and end not in ids[:-1] for ids in rows[f"{side}_ids"])
        assert rows["prompt_tokens"].max() <= TOKENS.max_prompt_tokens
        # Lengths differ a lot: a policy that ends its answers early or late shows.
        assert rows["chosen_tokens"].quantile(0.9) > 2 * rows["chosen_tokens"].quantile(0.1)


# --- domains ----------------------------------------------------------------------------------------------------------


def test_away_data_sets_share_no_prompt_with_home_ones():
    home = [set(table(seed=seed, domain="home")["prompt_id"]) for seed in (0, 1)]
    away = [set(table(seed=seed, domain="away")["prompt_id"]) for seed in (0, 1)]
    assert not (home[0] | home[1]) & (away[0] | away[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tokenizer_of_home_prompts_knows_every_word_of_the_away_domain(seed):
    tokenizer = home_tokenizer(seed)
    unknown = tokenizer.convert_tokens_to_ids(UNK)
    prompts = [prompt for form in ("fact", "sum", "open") for prompt in all_prompts("away", form)]
    responses = [text for side in ("chosen", "rejected") for text in table(domain="away")[side]]
    for ids in tokenizer(prompts + responses, add_special_tokens=False)["input_ids"]:
        assert unknown not in ids
    rendered = render_prompt(tokenizer, [{"role": "user", "content": prompts[0]}], "auto")
    assert unknown not in rendered


# --- sentiment --------------------------------------------------------------------------------------------------------


def test_polarity_labels_choose_the_more_positive_response_whatever_its_length():
    pairs = generate_pairs(WorldParams(labels="polarity", closed_fraction=0.0, prompts=1000, pairs=1000))
    assert all(polarity(pair["chosen"]) > polarity(pair["rejected"]) for pair in pairs)
    chosen, rejected = (np.array([len(pair[side].split()) for pair in pairs]) for side in ("chosen", "rejected"))
    share = (chosen > rejected).mean() / (chosen != rejected).mean()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(1000))
    with pytest.raises(BadInput, match="set closed_fraction to 0"):
        WorldParams(labels="polarity")


# --- the whole --------------------------------------------------------------------------------------------------------

SOURCES = (
    {"prompts": 150, "pairs": 200},
    {"domain": "away", "labels": "oracle", "rho": 0.3, "prompts": 150, "pairs": 150},
    {"labels": "polarity", "closed_fraction": 0.0, "prompts": 150, "pairs": 150},
)
DIGEST = "import test_world_properties as t; print(t.digest_of_all())"


def digest_of_all() -> str:
    parts = [build_pairs(DataSpec(source=WorldSource(kind="world", **source)), Path())[0] for source in SOURCES]
    return hashlib.sha256(canonical_json([part.to_dict("records") for part in parts]).encode()).hexdigest()


def test_data_sets_are_the_same_in_another_process_with_other_hashes():
    environment = os.environ | {"PYTHONHASHSEED": "17", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(
        [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert other.stdout.strip() == digest_of_all()


@pytest.mark.parametrize("domain", ["home", "away"])
def test_bounds_say_how_far_apart_chance_and_the_best_are(domain):
    prompts = draw_prompts(domain, 300, 0.5, 1)
    found = bounds(prompts)
    assert found == bounds(prompts)
    assert bounds(prompts[::-1]) == pytest.approx(found, rel=1e-12)
    assert found["random"] < 1.0 < found["written"] < found["best"] - 1.0
    # Another sample of the same writer: the standard error of both is that of 6000 rewards.
    rng = random.Random(9)
    rewards = [oracle_reward(prompt, candidates(prompt, 1, rng)[0]) for prompt in prompts for _ in range(20)]
    assert found["written"] == pytest.approx(np.mean(rewards), abs=4 * np.sqrt(2 * np.var(rewards) / len(rewards)))
    assert found["best"] == pytest.approx(np.mean([oracle_reward(prompt, oracle_best(prompt)) for prompt in prompts]))
    with pytest.raises(BadInput, match="at least one"):
        bounds([])
