"""Paired comparisons of two policies: by hand, by scipy, and by the rate of false alarms."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from prefopt.cli import main
from prefopt.errors import BadInput
from prefopt.evaluation.comparison import EXACT_BELOW, compare_policies, mcnemar

WIN, TIE, LOSS = 2.0, 1.5, 1.0
NONE = math.nan


def test_by_hand():
    # p: A 1 1 .5 0 | B 0 1 0 .75 on the four prompts that both have
    out = compare_policies([WIN, WIN, 0, LOSS, NONE, WIN, NONE], [LOSS, WIN, LOSS, 1.75, WIN, NONE, NONE])
    assert (out["n_prompts"], out["n_missing_a"], out["n_missing_b"], out["n_missing_both"]) == (4, 1, 1, 1)
    assert out["win_rate_a"] == pytest.approx(100 * 2.5 / 4)
    assert out["win_rate_b"] == pytest.approx(100 * 1.75 / 4)
    assert out["difference"] == pytest.approx(100 * 0.75 / 4)
    d = np.array([1, 0, 0.5, -0.75])
    assert out["paired_t"]["d_z"] == pytest.approx(d.mean() / d.std(ddof=1))
    test = stats.ttest_1samp(d, 0)
    assert (out["paired_t"]["t"], out["paired_t"]["p"]) == pytest.approx((test.statistic, test.pvalue))
    # the tie of A leaves three: both win, only A, only B
    table = {"both_win": 1, "only_a": 1, "only_b": 1, "both_lose": 0, "n_ties": 1}
    assert {name: out["mcnemar"][name] for name in table} == table
    assert out["welch"] is None  # one generation a side


def test_exact_and_approximate_mcnemar():
    def sides(only_a, only_b, both=5):
        pairs = [(1, 0)] * only_a + [(0, 1)] * only_b + [(1, 1), (0, 0)] * both
        return np.array(pairs, dtype=float).T

    few = mcnemar(*sides(6, 1))
    # 2 (C(7,0) + C(7,1)) / 2^7
    assert few["method"] == "exact binomial"
    assert few["p"] == pytest.approx(2 * (1 + 7) / 128)
    assert few["odds_ratio"] == 6
    many = mcnemar(*sides(30, 14))
    assert many["statistic"] == pytest.approx((30 - 14 - 1) ** 2 / 44)
    assert many["p"] == pytest.approx(stats.chi2.sf(225 / 44, 1))
    edge = [mcnemar(*sides(EXACT_BELOW - 10 - k, 10))["statistic"] is None for k in (0, 1)]
    assert edge == [False, True]
    assert mcnemar(*sides(20, 20))["p"] == 1  # not chi-square of (0 - 1)^2
    nothing = mcnemar(*sides(0, 0))
    assert (nothing["p"], nothing["odds_ratio"]) == (1, None)


def test_exchanging_the_policies_changes_signs_only():
    rng = np.random.default_rng(0)
    a, b = (1 + rng.choice([0, 0.5, 1, 0.3], 200) for _ in range(2))
    here, there = compare_policies(a, b), compare_policies(b, a)
    assert here["difference"] == -there["difference"]
    assert (here["low"], here["high"]) == pytest.approx((-there["high"], -there["low"]), abs=2)
    assert here["mcnemar"]["p"] == there["mcnemar"]["p"]
    assert here["paired_t"]["t"] == pytest.approx(-there["paired_t"]["t"])


def test_pairing_is_worth_it_where_prompts_differ():
    rng = np.random.default_rng(1)
    easy = rng.normal(0, 3, 400)
    a, b = (1 + 1 / (1 + np.exp(-(easy + shift))) for shift in (0.3, 0.0))
    out = compare_policies(a, b)
    assert 0 < out["low"] < out["difference"] < out["high"]
    assert stats.ttest_ind(a, b).pvalue > 0.1
    assert out["paired_t"]["p"] < 1e-6


def test_false_alarms_are_as_rare_as_they_should_be():
    rng = np.random.default_rng(2)
    alarms = np.zeros(3)
    runs = 300
    for _ in range(runs):
        chance = rng.uniform(0.1, 0.9, 120)
        a, b = (1.0 + (rng.uniform(size=120) < chance) for _ in range(2))
        out = compare_policies(a, b, resamples=200)
        alarms += [out["paired_t"]["p"] < 0.05, out["mcnemar"]["p"] < 0.05, not out["low"] <= 0 <= out["high"]]
    margin = 4 * math.sqrt(0.05 * 0.95 / runs)
    assert (alarms / runs < 0.05 + margin).all()  # McNemar's may be rarer: it is conservative
    assert alarms[0] / runs > 0.05 - margin


def test_generation_seeds():
    rng = np.random.default_rng(3)
    chance = rng.uniform(0, 1, 300)
    a, b = (1.0 + (rng.uniform(size=(seeds, 300)) < chance + lift) for seeds, lift in ((5, 0.1), (4, 0.0)))
    a[2, 7] = NONE  # this prompt's value is the mean of the other four seeds
    out = compare_policies(a, b)
    assert (out["n_seeds_a"], out["n_seeds_b"], out["n_prompts"]) == (5, 4, 300)
    assert out["win_rate_a"] == pytest.approx(100 * np.nanmean(a - 1, axis=0).mean())
    rates = [100 * np.nanmean(side - 1, axis=1) for side in (a, b)]
    expected = stats.ttest_ind(*rates, equal_var=False)
    assert (out["welch"]["t"], out["welch"]["p"]) == pytest.approx((expected.statistic, expected.pvalue))
    pooled = math.sqrt((4 * rates[0].var(ddof=1) + 3 * rates[1].var(ddof=1)) / 7)
    assert out["welch"]["g"] == pytest.approx((1 - 3 / 27) * (rates[0].mean() - rates[1].mean()) / pooled)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1, 2, 2], "2 prompts against 3"),
        ([1, NONE], [NONE, 2], "none of 2 prompts has a preference on both sides"),
        ([[1, 2], [1, 7]], [1, 2], "first policy, generation 1: preference: row 1 is 7.0"),
        (np.ones((2, 2, 2)), [1, 2], "first policy has 3 axes"),
    ],
)
def test_unusable_preferences(a, b, message):
    with pytest.raises(BadInput, match=message):
        compare_policies(a, b)


def test_equal_policies_have_nothing_to_test():
    out = compare_policies([1, 2, 2], [1, 2, 2])
    assert (out["difference"], out["paired_t"], out["welch"]) == (0, None, None)


# --- the command ----------------------------------------------------------------------------------------------------


def saved(path, preferences, model, prompts=None, baseline="base"):
    prompts = range(len(preferences)) if prompts is None else prompts
    rows = [{"instruction": f"Question {i}?", "generator_1": baseline, "generator_2": model, "preference": p}
            for i, p in zip(prompts, preferences, strict=True)]  # fmt: skip
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def run(capsys, *words):
    code = main(["compare-policies", *words])
    out, err = capsys.readouterr()
    return code, err.strip() if code else (json.loads(out) if "--json" in words else out)


def test_command_pairs_by_instruction(tmp_path, capsys):
    a = saved(tmp_path / "a.json", [2, 2, 1, 1.5], "mine")
    b = saved(tmp_path / "b.json", [2, None, 1, 1], "other", prompts=[2, 1, 0, 9])
    _, out = run(capsys, "--annotations", a, b, "--json")
    assert (out["policy_a"], out["policy_b"]) == ("mine", "other")
    # common: question 0 (A wins, B loses) and 2 (A loses, B wins); 1 and 3 B lacks, 9 A lacks
    expected = compare_policies([2, 2, 1, 1.5, NONE], [1, NONE, 2, NONE, 1])
    assert {name: out[name] for name in expected} == expected
    assert (out["n_prompts"], out["n_missing_a"], out["n_missing_b"]) == (2, 1, 2)
    _, text = run(capsys, "--annotations", a, b)
    assert "difference        0.0" in text.splitlines()


def test_command_with_generation_seeds(tmp_path, capsys):
    rng = np.random.default_rng(4)
    sides = [1.0 + rng.integers(0, 2, (3, 30)) for _ in range(2)]
    files = [[saved(tmp_path / f"{s}{i}.json", row.tolist(), f"{s}-{i}") for i, row in enumerate(side)]
             for s, side in zip("ab", sides, strict=True)]  # fmt: skip
    _, out = run(capsys, "--annotations", *files[0], "--against", *files[1], "--json")
    expected = compare_policies(*sides)
    assert out["difference"] == pytest.approx(expected["difference"])
    assert out["welch"] == pytest.approx(expected["welch"])
    assert out["policy_a"] == "a-0, a-1, a-2"


def test_command_refuses_what_is_not_one_pair(tmp_path, capsys):
    a = saved(tmp_path / "a.json", [1, 2], "mine")
    b = saved(tmp_path / "b.json", [1, 2], "other", baseline="another")
    twice = saved(tmp_path / "twice.json", [1, 2], "mine", prompts=[0, 0])
    extract = tmp_path / "extract.csv"
    pd.DataFrame({"model": ["x", "y"], "index": [0, 0], "preference": [1, 2]}).to_csv(extract, index=False)
    for words, message in (
        ((a,), "--annotations names 1 files; give two"),
        ((a, b), "several baselines: another, base"),
        ((a, twice), "prompt 'Question 0?' is in one file twice"),
        ((str(extract), str(extract)), "one file has 2 models"),
        ((a, str(extract)), "extract.csv: no 'generator_1', which the other files have"),
    ):
        code, line = run(capsys, "--annotations", *words)
        assert code == 2
        assert message in line


def test_published_models(shared_data):
    rows = pd.read_csv(shared_data / "alpaca_eval" / "annotations.csv.gz")
    table = rows.pivot(index="index", columns="model", values="preference")
    out = compare_policies(table["claude-2.1"], table["alpaca-7b_verbose"])
    assert (out["n_prompts"], out["n_missing_b"]) == (802, 3)
    assert out["low"] > 0
    assert out["mcnemar"]["p"] < 1e-6
    near = compare_policies(table["claude-2.1"], table["claude"])
    # published win rates 15.7335 and 16.9853
    assert near["difference"] == pytest.approx(15.7335 - 16.9853, abs=1e-4)
    assert near["low"] < 0 < near["high"]
