"""Bradley-Terry strengths: by hand, by simulation with known strengths, and on public tournaments."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from prefopt.cli import main
from prefopt.errors import BadInput
from prefopt.evaluation.bradley_terry import bradley_terry, elo, style_difference

TRUE = {"a": 1.0, "b": 0.3, "c": -0.2, "d": -1.1}  # sum 0


def table(rows, columns=("model_a", "model_b", "outcome")):
    return pd.DataFrame(rows, columns=list(columns))


def simulated(n=4000, style=0.0, shift=0.0, seed=0, prompts=400):
    """Verdicts between random pairs; the answers' style differs by ``shift`` times the difference of strengths."""
    rng = np.random.default_rng(seed)
    names = np.array(list(TRUE))
    first = rng.integers(0, len(names), n)
    pairs = np.column_stack([first, (first + rng.integers(1, len(names), n)) % len(names)])
    lead = np.array(list(TRUE.values()))[pairs] @ [1, -1]
    z = shift * lead + rng.normal(0, 1, n)
    chance = 1 / (1 + np.exp(-(lead + style * z)))
    return pd.DataFrame({"model_a": names[pairs[:, 0]], "model_b": names[pairs[:, 1]], "length": z,
                         "outcome": (rng.uniform(size=n) < chance).astype(float),
                         "prompt": rng.integers(0, prompts, n)})  # fmt: skip


def strengths(ranking):
    return dict(zip(ranking.models, ranking.strength, strict=True))


def test_two_models_by_hand():
    # 3 wins, 1 loss, 2 ties as half wins: log(4 / 2), of which each model has half
    out = bradley_terry(table([("x", "y", 1)] * 2 + [("y", "x", 0), ("x", "y", 0)] + [("x", "y", 0.5)] * 2))
    assert out.models == ("x", "y")
    assert out.strength == pytest.approx([math.log(2) / 2, -math.log(2) / 2])
    assert out.win_probabilities() == pytest.approx(np.array([[1 / 2, 2 / 3], [1 / 3, 1 / 2]]))
    # Var(theta_x - theta_y) = 1 / (n q (1 - q)); a strength is half the difference
    variance = 1 / (6 * (2 / 3) * (1 / 3))
    assert out.hessian[0, 0] == pytest.approx(variance / 4)
    residuals = (np.array([1, 1, 1, 0, 0.5, 0.5]) - 2 / 3) ** 2
    assert out.sandwich[0, 0] == pytest.approx(6 / 5 * variance**2 * residuals.sum() / 4)
    assert elo(out.strength) == pytest.approx([1000 + 200 * math.log10(2), 1000 - 200 * math.log10(2)])
    assert out.comparisons.tolist() == [6, 6]


def test_against_one_baseline_it_is_the_log_odds_of_the_win_rate():
    rng = np.random.default_rng(0)
    rates = {"m": 0.2, "n": 0.7}
    rows = [
        (name, "base", float(np.clip(p + e, 0, 1))) for name, p in rates.items() for e in rng.uniform(-0.2, 0.2, 50)
    ]
    found = strengths(bradley_terry(table(rows)))
    for name in rates:
        mean = np.mean([y for m, _, y in rows if m == name])
        assert found[name] - found["base"] == pytest.approx(math.log(mean / (1 - mean)))


def test_known_strengths_come_back():
    rows = simulated(n=20_000)
    out = bradley_terry(rows)
    assert out.models == ("a", "b", "c", "d")
    assert strengths(out) == pytest.approx(TRUE, abs=0.06)
    assert abs(out.strength.sum()) < 1e-12
    assert np.sqrt(np.diag(out.hessian)) == pytest.approx(np.sqrt(np.diag(out.sandwich)), rel=0.1)
    turned = rows.rename(columns={"model_a": "model_b", "model_b": "model_a"}).assign(outcome=1 - rows["outcome"])
    assert bradley_terry(turned).strength == pytest.approx(out.strength, abs=1e-9)


def test_style_control_removes_what_style_bought():
    rows = simulated(n=20_000, style=0.8, shift=0.5)
    plain, controlled = bradley_terry(rows), bradley_terry(rows, ["length"])
    # per unit of root mean square
    assert controlled.style["length"] == pytest.approx(0.8 * np.sqrt((rows["length"] ** 2).mean()), abs=0.06)
    assert strengths(controlled) == pytest.approx(TRUE, abs=0.08)
    assert plain.strength[0] > 1.15
    turned = rows.rename(columns={"model_a": "model_b", "model_b": "model_a"})
    turned = turned.assign(outcome=1 - rows["outcome"], length=-rows["length"])
    again = bradley_terry(turned, ["length"])
    assert (*again.strength, again.style["length"]) == pytest.approx((*controlled.strength, controlled.style["length"]))


def test_intervals_cover_as_often_as_they_say():
    runs, hits = 120, np.zeros(2)
    for seed in range(runs):
        out = bradley_terry(simulated(n=400, seed=seed, prompts=10_000))
        at = out.models.index("a")
        for i, method in enumerate(("hessian", "sandwich")):  # the bootstrap's spread is the sandwich's, see below
            low, high = out.intervals(method, confidence=0.9)[at]
            hits[i] += low <= TRUE["a"] <= high
    assert np.abs(hits / runs - 0.9).max() < 4 * math.sqrt(0.09 / runs)


def test_prompts_are_the_clusters():
    rows = simulated(n=300, prompts=10_000).assign(prompt=range(300))
    copies = pd.concat([rows] * 4)  # the same verdicts four times say nothing new
    one, four = bradley_terry(rows, resamples=300), bradley_terry(copies, resamples=300)
    assert four.sandwich == pytest.approx(one.sandwich)
    assert four.draws == pytest.approx(one.draws, abs=1e-5)
    assert four.hessian == pytest.approx(one.hessian / 4)
    assert one.draws.std(axis=0) == pytest.approx(np.sqrt(np.diag(one.sandwich)), rel=0.2)


@pytest.mark.parametrize(("style", "ridge"), [([], 0.0), (["length"], 0.0), ([], 5.0)])
def test_resamples_are_maxima_of_their_own_rows(style, ridge):
    rows = simulated(n=200, style=0.5, prompts=40)
    out = bradley_terry(rows, style, ridge=ridge, resamples=3, seed=5)
    rng = np.random.default_rng(5)
    prompts = np.unique(rows["prompt"].astype(str))
    scale = np.sqrt((rows["length"] ** 2).mean())
    for draw in out.draws:
        drawn = prompts[rng.integers(len(prompts), size=len(prompts))]
        parts = pd.concat([rows[rows["prompt"].astype(str) == name] for name in drawn])
        own = bradley_terry(parts, style, ridge=ridge)
        in_our_units = {k: v * scale / np.sqrt((parts["length"] ** 2).mean()) for k, v in own.style.items()}
        found = dict(zip([*out.models, *style], draw, strict=True))
        assert found == pytest.approx(strengths(own) | in_our_units, abs=1e-5)


def test_disconnected_models_are_named():
    rows = table([("a", "b", 1), ("b", "a", 1), ("c", "d", 1), ("d", "c", 1)])
    with pytest.raises(BadInput, match=r"a, b \| c, d; rank them apart"):
        bradley_terry(rows, ridge=1.0)


def test_separation_is_named_and_a_ridge_gives_strengths():
    cycle = [("a", "b", 1), ("b", "c", 1), ("c", "a", 1)]
    bradley_terry(table(cycle))  # everyone loses to someone
    rows = table([*cycle, ("top", "a", 1), ("top", "b", 1)])
    with pytest.raises(BadInput, match="separation: top never lost"):
        bradley_terry(rows)
    out = bradley_terry(rows, ridge=0.1, resamples=20)
    assert out.models[0] == "top"
    assert 0 < out.strength[0] < 10
    # the gradient of the penalised likelihood is 0: what top won beyond expectation is ridge x strength
    p = dict(zip(out.models, out.win_probabilities()[0], strict=True))
    assert (1 - p["a"]) + (1 - p["b"]) == pytest.approx(0.1 * out.strength[0])
    tied = table([*cycle, ("top", "a", 1), ("top", "b", 0.5)])
    assert bradley_terry(tied).models[0] == "top"


def test_separation_by_style():
    rows = simulated(n=200)
    rows["outcome"] = (rows["length"] > 0).astype(float)
    bradley_terry(rows)
    with pytest.raises(BadInput, match="separation: strengths with the style length agree with every verdict"):
        bradley_terry(rows, ["length"])
    assert bradley_terry(rows, ["length"], ridge=0.1).style["length"] > 3


def test_resamples_that_cannot_be_ranked_are_counted():
    rows = table([("a", "b", 1)] * 5 + [("a", "b", 0)])
    out = bradley_terry(rows, resamples=400)
    # the loss, or all wins, missing from the resample: (5/6)^6 + (1/6)^6
    assert out.left_out / 400 == pytest.approx((5 / 6) ** 6 + (1 / 6) ** 6, abs=0.1)
    assert len(out.draws) + out.left_out == 400


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table([("a", "a", 1)]), "expected two different models"),
        (table([("a", "b", 1.2)]), "'outcome': 1.2"),
        (table([("a", "b", math.nan)]), "none of 1 rows has an outcome"),
        (table([("a", None, 1)]), "row 0 is"),
        (table([("a", "b")], ("model_a", "model_b")), "lack the column 'outcome'"),
    ],
)
def test_unusable_rows(rows, message):
    with pytest.raises(BadInput, match=message):
        bradley_terry(rows)


def test_unusable_options():
    rows = simulated(n=50)
    with pytest.raises(BadInput, match="style 'length' is 0 in every row"):
        bradley_terry(rows.assign(length=0.0), ["length"])
    with pytest.raises(BadInput, match="ridge is -1"):
        bradley_terry(rows, ridge=-1)
    out = bradley_terry(rows)
    with pytest.raises(BadInput, match="ask for resamples"):
        out.intervals("bootstrap")
    with pytest.raises(BadInput, match="no intervals 'exact'"):
        out.intervals("exact")


def test_style_difference():
    assert style_difference([3, 0, 0], [1, 5, 0]).tolist() == [0.5, -1, 0]
    with pytest.raises(BadInput, match=r"row 1 has -1\.0 and 2\.0"):
        style_difference([1, -1], [1, 2])


# --- public tournaments ---------------------------------------------------------------------------------------------


def test_mt_bench_votes(shared_data):
    votes = pd.read_json(shared_data / "mt_bench_human" / "human.jsonl.gz", lines=True)
    outcome = votes["winner"].map({"model_a": 1.0, "model_b": 0.0, "tie": 0.5})
    out = bradley_terry(votes.assign(outcome=outcome, prompt=votes["question_id"]), resamples=200)
    expected = ("gpt-4", "claude-v1", "gpt-3.5-turbo", "vicuna-13b-v1.2", "alpaca-13b", "llama-13b")
    assert out.models == expected
    # votes on one question agree more than independent ones would
    assert (np.diag(out.sandwich) > np.diag(out.hessian)).all()
    assert out.draws.std(axis=0) == pytest.approx(np.sqrt(np.diag(out.sandwich)), rel=0.2)


def test_qlora_tournament_with_and_without_length(shared_data):
    folder = shared_data / "qlora_gpt4_tournament"
    games = pd.read_csv(folder / "vicuna_pairwise_gpt4.csv.gz")
    answers = pd.read_json(folder / "vicuna_responses.jsonl.gz", lines=True)
    length = answers.set_index(["system", "question_id"])["response"].str.len()
    first, second = (
        length.loc[list(zip(games[side], games["question_id"], strict=True))].to_numpy()
        for side in ("system_first", "system_second")
    )
    rows = pd.DataFrame({"model_a": games["system_first"], "model_b": games["system_second"],
                         "outcome": games["score"].map({1: 1.0, 2: 0.0, 3: 0.5}), "prompt": games["question_id"],
                         "length": style_difference(first, second)})  # fmt: skip
    plain, controlled = bradley_terry(rows), bradley_terry(rows, ["length"])
    assert plain.models[:3] == ("gpt4", "65b-guanaco", "30b-guanaco")
    assert plain.models[-1] == controlled.models[-1] == "7b-guanaco"
    low, high = controlled.intervals()[-1]
    assert 0.5 < low < controlled.style["length"] < high < 1.2
    # the shortest answers of all were held back by it, the longest helped
    mean = length.groupby("system").mean()[list(plain.models)]
    gain = {name: strengths(controlled)[name] - strengths(plain)[name] for name in plain.models}
    assert gain[mean.idxmin()] > 0.3
    assert gain[mean.idxmax()] < 0


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    files, rows = [], []
    for name, rate in (("strong", 0.7), ("weak", 0.3)):
        records = [
            {"instruction": f"Question {i}?", "generator_1": "base", "generator_2": name,
             "output_1": "x" * int(rng.integers(1, 99)), "output_2": "y" * int(rng.integers(1, 99)),
             "preference": 1.0 + float(rng.uniform() < rate)} for i in range(80)
        ]  # fmt: skip
        records[4]["preference"] = None
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(records), encoding="utf-8")
        rows += records
    frame = pd.DataFrame(rows)
    frame = frame.assign(model_a=frame["generator_2"], model_b="base", outcome=frame["preference"] - 1,
                         prompt=frame["instruction"])  # fmt: skip
    frame["length"] = style_difference(frame["output_2"].str.len(), frame["output_1"].str.len())
    words = ["rank", "--annotations", *map(str, files)]
    for extra, style in (([], None), (["--style", "length"], ["length"])):
        assert main([*words, *extra, "--json"]) == 0
        out = json.loads(capsys.readouterr().out)
        expected = bradley_terry(frame, style)
        assert [row["model"] for row in out["models"]] == list(expected.models) == ["strong", "base", "weak"]
        assert [row["strength"] for row in out["models"]] == pytest.approx(expected.strength)
        limits = [[row["low"], row["high"]] for row in out["models"]] + [
            [fitted["low"], fitted["high"]] for fitted in out["style"].values()
        ]
        assert np.array(limits) == pytest.approx(expected.intervals())
        assert out["models"][0]["elo"] == pytest.approx(elo(expected.strength[0]))
        assert out["models"][0]["wins_against"]["strong"] == 0.5
        assert out["n_missing"] == 2
    assert main([*words, "--resamples", "50"]) == 0
    text = capsys.readouterr().out
    assert "95 % bootstrap, prompts as clusters" in text
    assert text.splitlines()[1].startswith("strong ")
    assert main([*words, "--resamples", "1"]) == 2
    assert "give 2 or more" in capsys.readouterr().err
