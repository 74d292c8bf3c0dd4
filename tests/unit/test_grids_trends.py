"""Grid items: frontiers along training, trends over conditions, training curves, and dispersion weights."""

from __future__ import annotations

import numpy as np
import pytest

from grid_items import PROMPTS, answers, arm, grid, judged, noise, point, trial
from prefopt.evaluation.items import DIRECTION_ONLY, NOT_REPRODUCED, NOT_RUN
from prefopt.grids.claims import between_curves, slope
from prefopt.grids.collect import collect_runs, collect_weights
from prefopt.grids.runs import Missing
from prefopt.grids.weights import QUANTITIES, Sample, value_of

BASE = noise(0)
AT = [0.0, 0.5, 1.0]


def path(kl, reward):
    """A run whose answers after every fraction have this mean KL and reward."""
    rows = zip(AT, kl, reward, strict=True)
    return trial(*(answers(BASE + r, log_ratio=k - BASE, where=("test", f, int(10 * f))) for f, k, r in rows))


def frontier(part="all", **more):
    row = {"kind": "frontier", "claim": "c", "metric": "reward", "arm": "a", "than": "b", "set": "test"}
    return row | {"conditions": None, "arm_at": "selected", "than_at": "selected", "part": part} | more


def test_frontier_difference_on_straight_lines():
    # a: reward 2 KL on [0, 4]; b: reward KL on [1, 6], unevenly sampled. Shared KL 1 .. 4, difference KL itself.
    runs = {(0, s): path([0, 1, 4], [0, 2, 8]) for s in range(3)}
    runs |= {(1, s): path([1, 5, 6], [1, 5, 6]) for s in range(3)}
    rows = [frontier(part) for part in ("all", "low", "high")]
    found = judged(grid([point("a"), point("b")], rows, at=AT), runs)
    assert [row["difference"]["mean"] for row in found] == pytest.approx([2.5, (1 + 2.5) / 2, (2.5 + 4) / 2])
    assert [row["verdict"] for row in found] == [DIRECTION_ONLY] * 3
    assert found[0]["difference"]["n_prompts"] == PROMPTS
    swapped = judged(grid([point("a"), point("b")], [frontier(arm="b", than="a")], at=AT), runs)[0]
    assert swapped["difference"]["mean"] == pytest.approx(-2.5)
    assert swapped["verdict"] == NOT_REPRODUCED


def test_frontier_interval_is_over_seeds():
    runs = {(0, s): path([0, 1, 2], [s, s, s]) for s in range(3)} | {
        (1, s): path([0, 1, 2], [0, 0, 0]) for s in range(3)
    }
    row = judged(grid([point("a"), point("b")], [frontier()], at=AT), runs)[0]
    assert (row["difference"]["mean"], row["difference"]["n_seeds"]) == (pytest.approx(1.0), 3)
    half = 4.302653 * 1 / np.sqrt(3)  # t(0.975, 2) * sd(0, 1, 2) / sqrt(3)
    assert row["difference"]["high"] == pytest.approx(1 + half)
    one = judged(grid([point("a"), point("b")], [frontier()], at=AT, seeds=[2]), runs)[0]
    assert (one["verdict"], one["difference"]["mean"]) == (NOT_RUN, pytest.approx(2.0))


def test_frontiers_without_shared_kl_or_without_kl_were_not_run():
    apart = {(0, s): path([0, 1, 2], [0, 1, 2]) for s in range(3)} | {
        (1, s): path([3, 4, 5], [0, 1, 2]) for s in range(3)
    }
    assert "share no range" in judged(grid([point("a"), point("b")], [frontier()], at=AT), apart)[0]["reason"]
    unknown = {(i, s): path([np.nan] * 3, [0, 1, 2]) for i in range(2) for s in range(3)}
    assert (
        "not scored under policy" in judged(grid([point("a"), point("b")], [frontier()], at=AT), unknown)[0]["reason"]
    )


def test_curves_may_turn_back_in_kl():
    bent = np.array([0.0, 3.0, 2.0]), np.array([0.0, 6.0, 4.0])  # reward 2 KL, out of order
    straight = np.array([0.0, 3.0]), np.array([0.0, 3.0])
    assert between_curves(bent, straight, "all") == pytest.approx(1.5)
    with pytest.raises(Missing):
        between_curves(straight, (straight[0] + 3, straight[1]), "all")


def test_the_items_frontier_has_a_row_per_point_and_fraction():
    runs = {(0, s): path([0, 1 + s, 4], [0, 2, 8]) for s in range(3)}
    item = collect_runs(grid([point("a", beta=0.1)], at=AT), runs, {})
    assert item["points"][0]["sets"]["test"]["reward"]["mean"] == pytest.approx(8)  # after the whole run
    rows = item["frontier"]
    assert [(row["fraction"], row["step"], row["settings"]) for row in rows] == [
        (f, int(10 * f), {"beta": 0.1}) for f in AT
    ]
    assert [row["kl"]["mean"] for row in rows] == pytest.approx([0, 2, 4], abs=1e-12)
    assert rows[2]["reward"]["mean"] == pytest.approx(8)
    assert rows[2]["score_positive"]["mean"] == 1


def trend(quantity, sign="falls", arm="a", than=None):
    return {"kind": "trend", "claim": "c", "quantity": quantity, "arm": arm, "than": than, "set": "test", "sign": sign}


RHO = {"r2": 0.2, "r4": 0.4, "r8": 0.8}
CONDITIONS = {name: {"value": value, "label": name} for name, value in RHO.items()}


def test_slope_of_a_straight_line_and_of_a_constant():
    x = np.array([0.2, 0.4, 0.8])
    assert slope(x, 3 - 2 * x) == pytest.approx(-2)
    assert slope(x, np.full(3, 0.1)) == 0


def test_gap_trend_is_the_slope_of_the_reward_difference():
    # a - b = 3 - 2 rho in every seed, plus a small slope of the seed's own.
    points = [point(name, c) for c in RHO for name in ("a", "b")]
    runs = {}
    for number, declared in enumerate(points):
        rho = RHO[declared["condition"]]
        for s in range(3):
            level = 3 - (2 + 0.01 * (s - 1)) * rho if declared["arm"] == "a" else 0.0
            runs[number, s] = trial(answers(BASE + level))
    rows = [trend("gap", than="b"), trend("gap", "rises", than="b"), trend("gap", than="reference")]
    falls, rises, reference = judged(
        grid(points, rows, conditions=CONDITIONS), runs, {s: trial(answers(BASE + 7)) for s in range(3)}
    )
    assert falls["difference"]["mean"] == pytest.approx(-2)
    assert reference["difference"]["mean"] == pytest.approx(-2)
    half = 4.302653 * 0.01 / np.sqrt(3)
    assert falls["difference"]["low"] == pytest.approx(-2 - half)
    assert (falls["verdict"], rises["verdict"]) == (DIRECTION_ONLY, NOT_REPRODUCED)
    assert "opposite" in rises["reason"]


def test_selected_setting_trend_selects_with_each_seeds_own_validation():
    # Seed s prefers beta = e^{-k} in the condition number k, but seed 2 always beta 1.
    betas = [1.0, np.exp(-1), np.exp(-2)]
    points = [point("a", c, beta=beta) for c in RHO for beta in betas]
    runs = {}
    for number in range(9):
        condition, beta = divmod(number, 3)
        for s in range(3):
            best = 0 if s == 2 else condition
            runs[number, s] = trial(answers(BASE + (beta == best)))
    spec = grid(points, [trend("selected.beta")], conditions=CONDITIONS, select={"set": "test", "metric": "reward"})
    row = judged(spec, runs)[0]
    per_seed = slope(np.array(list(RHO.values())), np.array([0.0, -1.0, -2.0]))
    assert row["difference"]["mean"] == pytest.approx(2 * per_seed / 3)
    assert (row["difference"]["n_seeds"], row["verdict"]) == (3, NOT_REPRODUCED)  # one seed of three disagrees
    two = judged(spec | {"grid": spec["grid"] | {"seeds": [0, 1]}}, runs)[0]
    assert (two["difference"]["high"], two["verdict"]) == (pytest.approx(per_seed), DIRECTION_ONLY)


def test_member_bias_trend_reads_the_first_tenth_of_training():
    # First 2 of 20 steps: share rho with the member of bias .8, the rest with the one of bias .2.
    points = [point("a", c) for c in RHO]
    runs = {}
    for number, rho in enumerate(RHO.values()):
        start = [{"member_0": 1 - rho, "member_1": rho}] * 2
        for s in range(3):
            runs[number, s] = trial(answers(BASE), curve=start + [{"member_0": 1.0, "member_1": 0.0}] * 18)
    spec = grid(points, [trend("member_bias", "rises")], conditions=CONDITIONS, arms={"a": arm(member_bias=[0.2, 0.8])})
    row = judged(spec, runs)[0]
    assert row["difference"]["mean"] == pytest.approx(0.8 - 0.2)
    assert row["verdict"] == DIRECTION_ONLY
    spec["grid"]["arms"]["a"]["member_bias"] = [0.2, 0.5, 0.8]
    assert "not recorded" in judged(spec, runs)[0]["reason"]


def test_trends_need_two_conditions_and_two_seeds():
    points = [point("a", c) for c in RHO]
    runs = {(i, 0): trial(answers(BASE + i)) for i in range(3)}
    reference = {0: trial(answers(BASE))}
    row = judged(grid(points, [trend("gap", than="reference")], conditions=CONDITIONS), runs, reference)[0]
    assert (row["verdict"], row["reason"]) == (NOT_RUN, "one seed: no interval over seeds")
    quick = grid(points[:1], [trend("gap", than="reference")], conditions={"r2": CONDITIONS["r2"]})
    assert judged(quick, runs, reference)[0]["reason"] == "fewer than two conditions with a value ran"


def test_training_curves_are_binned_means_over_seeds():
    # 100 steps in 25 bins of 4: step t (from 0) has the margin t + 10 s.
    runs = {
        (0, s): trial(answers(BASE), curve=[{"margin": t + 10.0 * s, "member_0": 0.25, "step": t} for t in range(100)])
        for s in (0, 1)
    }
    curve = collect_runs(grid([point("a")], seeds=[0, 1]), runs, {})["points"][0]["curve"]
    assert set(curve) == {"margin", "members"}
    assert len(curve["margin"]) == 25
    fraction, mean, low, high = curve["margin"][1]
    assert (fraction, mean) == pytest.approx((6 / 100, 5.5 + 5))
    assert high - low == pytest.approx(2 * 12.7062 * 5, rel=1e-3)  # t(0.975, 1) * sd / sqrt(2), sd = 10 / sqrt(2)
    assert curve["members"][0] == [0.02, 0.25]
    single = collect_runs(grid([point("a")], seeds=[0]), runs, {})["points"][0]["curve"]["margin"]
    assert single[0] == [0.02, 1.5, None, None]
    short = {(0, 0): trial(answers(BASE), curve=[{"loss": 1.0}, {"loss": 0.5}])}
    assert collect_runs(grid([point("a")], seeds=[0]), short, {})["points"][0]["curve"]["loss"] == [
        [0.25, 1.0, None, None],
        [0.75, 0.5, None, None],
    ]


def sample(weight, kind=None, prompts=None):
    weight = np.asarray(weight, dtype=float)
    n = len(weight)
    kinds = np.array(kind if kind is not None else [None] * n, dtype=object)
    ids = np.arange(n) if prompts is None else np.asarray(prompts)
    return Sample(0.3, weight, ids, kinds, np.array([f"prompt {i}" for i in ids], dtype=object))


def weights_spec(*rows, conditions=("home", "film")):
    head = {"paper": "p", "name": "n", "arxiv": None, "title": "T", "scale": "demo", "note": ""}
    declared = {name: {"value": None, "label": name} for name in conditions}
    return {
        "item": head,
        "grid": {"tier": "quick", "layout": "histogram", "conditions": declared},
        "expect": [{"kind": "weights", "claim": "c", "source": "figure 7", **row} for row in rows],
    }


def test_weight_quantities_by_arithmetic():
    found = sample([0.5, 0.5, 1.0, 2.0], ["open", "open", "closed", "closed"])
    spread = np.sqrt((2 * 0.5**2 + 0 + 1) / 4)
    assert value_of(found, "sd") == pytest.approx(spread)
    assert value_of(found, "skewness") == pytest.approx((2 * -(0.5**3) + 1) / 4 / spread**3)
    assert value_of(found, "closed_minus_open") == pytest.approx(1.5 - 0.5)
    assert value_of(found, "auroc_closed") == 1
    mixed = sample([1.0, 2.0, 2.0, 3.0], ["open", "open", "closed", "closed"])
    assert value_of(mixed, "auroc_closed") == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert value_of(sample([1.0, 1.0]), "skewness") == 0


def test_a_resampled_quantity_is_that_of_the_repeated_rows():
    rng = np.random.default_rng(3)
    kinds = np.array(["open", "closed"])[rng.integers(2, size=30)]
    first = sample(np.round(rng.gamma(3, size=30), 1), kinds, prompts=np.arange(30) // 2)
    counts = next(first.counts(0))[:3]
    assert (counts.sum(axis=1) == 30).all()
    assert (counts[:, ::2] == counts[:, 1::2]).all()  # both pairs of a prompt together
    for quantity, statistic in QUANTITIES.items():
        for row, value in zip(counts.astype(int), statistic(first, counts), strict=True):
            repeated = sample(np.repeat(first.weight, row), np.repeat(first.kind, row))
            assert value == pytest.approx(value_of(repeated, quantity)), quantity


def test_weights_claims_and_their_verdicts():
    rng = np.random.default_rng(0)
    kind = np.repeat(["closed", "open"], 150)
    samples = {
        "home": sample(1 + rng.normal(0, 0.3, 300) + np.where(kind == "closed", 0.2, -0.2), kind),
        "film": sample(1 + rng.normal(0, 0.1, 300)),
    }
    rows = [
        {"quantity": "sd", "condition": "home", "than": "film", "sign": "above"},
        {"quantity": "sd", "condition": "film", "than": "home", "sign": "above"},
        {"quantity": "sd", "condition": "film", "than": 0.2, "sign": "below"},
        {"quantity": "auroc_closed", "condition": "home", "than": 0.5, "sign": "above"},
        {"quantity": "skewness", "condition": "film", "than": 0.0, "sign": "above"},
        {"quantity": "closed_minus_open", "condition": "film", "than": 0.0, "sign": "above"},
        {"quantity": "sd", "condition": "gone", "than": 0.0, "sign": "above"},
    ]
    item = collect_weights(weights_spec(*rows), samples)
    verdicts = [DIRECTION_ONLY, NOT_REPRODUCED, DIRECTION_ONLY, DIRECTION_ONLY, NOT_REPRODUCED, NOT_RUN, NOT_RUN]
    assert [row["verdict"] for row in item["expect"]] == verdicts
    first = item["expect"][0]
    assert first["difference"]["mean"] == pytest.approx(samples["home"].weight.std() - samples["film"].weight.std())
    assert first["difference"]["low"] < first["difference"]["mean"] < first["difference"]["high"]
    assert first["p"] < 0.01 < item["expect"][4]["p"]
    assert item["expect"][5]["reason"] == "no pair says that its prompt is closed"
    assert item["expect"][6]["reason"] == "not run: gone"


def test_two_conditions_are_resampled_independently():
    same = sample(np.random.default_rng(2).normal(1, 0.3, 200))
    row = {"quantity": "sd", "condition": "home", "than": "film", "sign": "above"}
    found = collect_weights(weights_spec(row), {"home": same, "film": same})["expect"][0]
    assert (found["difference"]["mean"], found["verdict"]) == (0, NOT_REPRODUCED)
    assert found["difference"]["high"] > 0.02


def test_weights_interval_of_sd_has_the_width_of_its_normal_theory():
    # sd of a normal sample has the standard error sigma / sqrt(2 n).
    row = {"quantity": "sd", "condition": "home", "than": 0.0, "sign": "above"}
    samples = {"home": sample(np.random.default_rng(1).normal(1, 0.3, 800))}
    found = collect_weights(weights_spec(row), samples)["expect"][0]["difference"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(1600), rel=0.15)


def test_weights_of_the_item_share_bins_and_list_prompts_once():
    samples = {
        "home": sample([0.0, 0.1, 0.2, 3.0, 4.0, 4.0], ["open"] * 3 + ["closed"] * 3, prompts=[0, 1, 2, 3, 4, 4]),
        "film": sample([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0]),
    }
    found = collect_weights(weights_spec(), samples)["weights"]
    home, film = found["home"], found["film"]
    assert home["histogram"]["edges"] == film["histogram"]["edges"]
    assert (home["histogram"]["edges"][0], home["histogram"]["edges"][-1]) == (0.0, 8.0)
    shares = [sum(home["histogram"][kind]) for kind in ("closed", "open", "other")]
    assert shares == pytest.approx([0.5, 0.5, 0.0])
    assert sum(film["histogram"]["other"]) == pytest.approx(1)
    assert [row["prompt"] for row in home["highest"]] == [f"prompt {i}" for i in (4, 3, 2, 1, 0)]
    assert home["lowest"][0] == {"prompt": "prompt 0", "weight": 0.0, "kind": "open"}
    assert (home["mean"], home["closed_minus_open"]) == pytest.approx((11.3 / 6, 11 / 3 - 0.1))
    assert film["closed_minus_open"] is None


def test_with_one_setting_there_is_nothing_to_select():
    points = [point("a", c, beta=0.1) for c in RHO]
    runs = {(i, s): trial(answers(BASE)) for i in range(3) for s in range(3)}
    row = judged(grid(points, [trend("selected.beta")], conditions=CONDITIONS), runs)[0]
    assert (row["verdict"], row["reason"]) == (NOT_RUN, "a ran at one setting: there is nothing to select")
