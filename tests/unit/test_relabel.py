"""Pairs labelled again by a reward model: who is chosen, how long the chosen are, and what is left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from artifact_builds import run_stage, save_table
from prefopt.ensemble import longer_wins_fraction
from prefopt.errors import BadInput
from prefopt.pairs import PAIR_COLUMNS, digest63

PAIRS = 400


def prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"prompt {number}"}]


@pytest.fixture
def results(tmp_path):
    """Pairs, token counts and rewards; pair 0 was not tokenised, pair 1 has equal rewards."""
    rng = np.random.default_rng(5)
    pairs = pd.DataFrame(
        {
            "pair_id": [digest63([prompt(n), f"a{n}", f"b{n}"]) for n in range(PAIRS)],
            "prompt_id": [digest63(prompt(n)) for n in range(PAIRS)],
            "prompt": [prompt(n) for n in range(PAIRS)],
            "chosen": [f"a{n}" for n in range(PAIRS)],
            "rejected": [f"b{n}" for n in range(PAIRS)],
            "split": np.where(np.arange(PAIRS) < 300, "train", "test"),
            "source": "made",
            "source_row": range(PAIRS),
            "meta": "{}",
        }
    )[list(PAIR_COLUMNS)]
    lengths = rng.integers(10, 40, (2, PAIRS))
    rewards = rng.normal(size=(2, PAIRS))
    rewards[1, 1] = rewards[0, 1]
    sides = ("chosen", "rejected")
    tokens = pairs[["pair_id"]].assign(**{f"{s}_tokens": row for s, row in zip(sides, lengths, strict=True)})
    scores = pairs[["pair_id"]].assign(**{f"{s}_reward": row for s, row in zip(sides, rewards, strict=True)})
    save_table(tmp_path, "pairs", "pairs", pairs)
    save_table(tmp_path, "tokens", "tokens", tokens[1:])
    save_table(tmp_path, "rewards", "scores", scores[1:].sample(frac=1, random_state=0))
    return tmp_path, lengths, rewards


def relabelled(results, **spec):
    folder, lengths, rewards = results
    build = run_stage(
        folder, "relabel-pairs", {"rho": None, "size": None, "seed": 0, **spec}, ["pairs", "tokens", "rewards"]
    )
    tables = (pd.read_parquet(build.work / f"{name}.parquet") for name in ("pairs", "refused"))
    return *tables, build, lengths, rewards


def test_the_response_of_higher_reward_is_chosen(results):
    pairs, refused, build, _, rewards = relabelled(results)
    assert refused.set_index("source_row")["reason"].to_dict() == {0: "not tokenised", 1: "tie"}
    for row in pairs.to_dict("records"):
        number = row["source_row"]
        better = f"a{number}" if rewards[0, number] > rewards[1, number] else f"b{number}"
        assert (row["chosen"], {row["chosen"], row["rejected"]}) == (better, {f"a{number}", f"b{number}"})
        assert row["pair_id"] == digest63([prompt(number), row["chosen"], row["rejected"]])
        assert row["split"] == ("train" if number < 300 else "test")
    turned = (rewards[0] < rewards[1])[2:].mean()
    assert build.summary["flipped"] == pytest.approx(turned, abs=1e-6)


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_the_longer_response_is_chosen_in_the_declared_share_of_train_pairs(results, rho):
    pairs, refused, _, lengths, rewards = relabelled(results, rho=rho, size=100)
    train = pairs[pairs["split"] == "train"]["source_row"].to_numpy()
    turned = rewards[0, train] < rewards[1, train]
    chosen = np.where(turned, lengths[1, train], lengths[0, train])
    rejected = np.where(turned, lengths[0, train], lengths[1, train])
    assert longer_wins_fraction(chosen, rejected) == pytest.approx(rho)
    assert len(train) == 100
    assert (pairs["split"] == "test").sum() == 100, "other splits are kept whole"
    assert set(refused["reason"]) == {"not tokenised", "tie", "no room in the share of longer winners"}
    assert len(pairs) + len(refused) == PAIRS


def test_a_share_that_the_pairs_cannot_give_is_told(results):
    with pytest.raises(BadInput, match=r"no way to draw 290 pairs with longer-wins fraction 0\.2"):
        relabelled(results, rho=0.2, size=290)
