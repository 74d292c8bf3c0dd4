"""Several answers per prompt: which axis the interval is over, and what item.json says of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from prefopt.errors import FailedCheck
from prefopt.evaluation.items import collect_item, markdown, table, two_way_interval

PROMPTS = 40


def rows_of(outcomes: np.ndarray, **more) -> pd.DataFrame:
    """[draws, prompts] as the rows of one run."""
    tables = [
        pd.DataFrame(
            {"prompt_id": range(PROMPTS), "outcome": outcome, "tokens_model": 5, "tokens_baseline": 6, "draw": draw}
        )
        for draw, outcome in enumerate(outcomes)
    ]
    return pd.concat(tables, ignore_index=True).assign(**more)


def collected(runs: dict[int, np.ndarray], draws: int, **more) -> dict:
    spec = {
        "item": {"paper": "own", "name": "x", "title": "X", "scale": "demo"},
        "arms": {"dpo": {"name": "dpo"}},
        "seeds": list(runs),
        "against": "outputs",
        "expect": [],
        "draws": draws,
    }
    results = {
        ("dpo", seed): {"policy": "p", "metrics_ref": "m", "metrics": {}, "prompts": rows_of(outcomes, **more)}
        for seed, outcomes in runs.items()
    }
    return collect_item(spec, results)


def test_with_one_training_seed_the_draws_are_the_seeds():
    outcomes = np.random.default_rng(0).uniform(size=(3, PROMPTS))
    found = collected({0: outcomes}, 3)["arms"]["dpo"]["summary"]["win_rate"]
    low, high = two_way_interval(100 * outcomes)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((100 * outcomes.mean(), low, high))
    assert (found["n_seeds"], found["n_prompts"]) == (3, PROMPTS)


def test_with_several_training_seeds_draws_are_averaged_within_them():
    rng = np.random.default_rng(1)
    runs = {seed: rng.uniform(size=(2, PROMPTS)) for seed in (0, 1, 2)}
    found = collected(runs, 2)["arms"]["dpo"]["summary"]["win_rate"]
    low, high = two_way_interval(np.array([100 * outcomes.mean(axis=0) for outcomes in runs.values()]))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["n_seeds"] == 3


def test_draws_that_differ_as_a_whole_widen_the_interval():
    """Prompts alike, draws far apart: an interval over prompts alone would be a point."""
    outcomes = np.repeat([[0.2], [0.5], [0.8]], PROMPTS, axis=1)
    found = collected({0: outcomes}, 3)["arms"]["dpo"]["summary"]["win_rate"]
    assert found["high"] - found["low"] > 25


def test_length_controlled_rates_stand_beside_the_plain_ones_where_they_were_measured():
    outcomes = np.full((2, PROMPTS), 0.6)
    assert "length-controlled %" not in table(collected({0: outcomes}, 2))
    item = collected({0: outcomes}, 2, length_controlled=55.0)
    assert table(item)["length-controlled %"][0].startswith("55.0")
    assert "averaged over 2 answers per prompt" in markdown(item)


def test_a_prompt_twice_in_one_draw_is_told():
    outcomes = np.full((2, PROMPTS), 0.6)
    with pytest.raises(FailedCheck, match="prompt_id 0 stands in more than one row"):
        collected({0: outcomes}, 2, prompt_id=0)
