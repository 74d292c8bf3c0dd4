"""Arms whose answers measure the same on every prompt are told; arms that differ in one value are not."""

import pandas as pd
import pytest

from prefopt.evaluation.alike import arms_alike


def run(outcome, reward, tokens, prompts=(3, 1, 2)):
    return {
        "policy": "policy/p-00000000",
        "prompts": pd.DataFrame(
            {"prompt_id": prompts, "outcome": outcome, "reward_model": reward, "tokens_model": tokens}
        ),
    }


def table(**changed):
    return run(**({"outcome": [0.5, 1.0, 0.0], "reward": [0.25, 2.0, -1.0], "tokens": [4, 5, 6]} | changed))


def reversed_rows(one):
    return one | {"prompts": one["prompts"].iloc[::-1].reset_index(drop=True)}


def test_arms_with_the_same_values_in_every_seed_are_one_group_whatever_the_order_of_their_rows():
    results = {("dpo", 0): table(), ("ipo", 0): reversed_rows(table()), ("other", 0): table(tokens=[4, 5, 7])}
    (sentence,) = arms_alike(results)
    assert sentence.startswith("dpo, ipo: the same measurements on every prompt")


@pytest.mark.parametrize(
    "changed",
    [{"outcome": [0.5, 1.0, 0.5]}, {"reward": [0.25, 2.0, -1.5]}, {"tokens": [4, 5, 7]}, {"prompts": (3, 1, 4)}],
)
def test_one_value_tells_two_arms_apart(changed):
    assert arms_alike({("dpo", 0): table(), ("ipo", 0): table(**changed)}) == []


def test_one_seed_or_one_draw_tells_two_arms_apart():
    same, other = table(), table(tokens=[4, 5, 7])
    assert arms_alike({("dpo", 0): same, ("dpo", 1): same, ("ipo", 0): same, ("ipo", 1): other}) == []
    assert arms_alike({("dpo", 0): same, ("dpo", 1): same, ("ipo", 0): same}) == []
    drawn = [pd.concat([same["prompts"].assign(draw=0), one["prompts"].assign(draw=1)]) for one in (same, other)]
    assert arms_alike({("dpo", 0): {"prompts": drawn[0]}, ("ipo", 0): {"prompts": drawn[1]}}) == []


def test_the_arm_judged_against_and_runs_not_made_are_left_out():
    assert arms_alike({("reference", 0): {"policy": "sft/s-00000000"}, ("dpo", 0): table()}) == []


def test_two_groups_are_two_sentences():
    a, b = table(), table(tokens=[7, 7, 7])
    results = {("dpo", 0): a, ("x", 0): b, ("ipo", 0): a, ("y", 0): b}
    assert [sentence.split(":")[0] for sentence in arms_alike(results)] == ["dpo, ipo", "x, y"]
