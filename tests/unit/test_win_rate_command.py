"""``python -m prefopt win-rate`` on annotation files."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest

from prefopt.cli import main
from prefopt.winrate import length_controlled_win_rate

N = 60
REQUIRED = {
    "win_rate", "standard_error", "discrete_win_rate", "length_controlled_win_rate", "lc_standard_error", "avg_length",
    "n_total", "n_missing",
}  # fmt: skip


@pytest.fixture
def records():
    """AlpacaEval's records; code points are not bytes, so one text has letters of several."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N):
        texts = ["ä" * int(rng.integers(50, 500)) for _ in range(2)]
        preference = None if i == 7 else round(float(rng.uniform(1, 2)), 10)
        rows.append({"instruction": f"Question {i}?", "output_1": texts[0], "generator_1": "base",
                     "output_2": texts[1], "generator_2": "mine", "annotator": "judge",
                     "preference": preference})  # fmt: skip
    return rows


def answers(records, side):
    return [{"instruction": r["instruction"], "output": r[f"output_{side}"], "generator": "g"} for r in records]


def saved(path, content):
    text = content.to_csv(index=False) if isinstance(content, pd.DataFrame) else json.dumps(content)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def run(capsys, *words):
    """Exit code, and the printed JSON or the one line of failure."""
    code = main(["win-rate", *words])
    out, err = capsys.readouterr()
    assert (len(err.splitlines()), out) == (1, "") if code else err == ""
    return code, err.strip() if code else (json.loads(out) if "--json" in words else out)


def frame_of(records):
    return pd.DataFrame({
        "preference": [math.nan if r["preference"] is None else r["preference"] for r in records],
        "len_model": [len(r["output_2"]) for r in records], "len_baseline": [len(r["output_1"]) for r in records],
        "index": range(len(records)),
    })  # fmt: skip


@pytest.fixture
def official(tmp_path):
    rng = np.random.default_rng(1)
    difficulty = pd.DataFrame({"index": np.arange(N), "instruction_difficulty": rng.normal(0, 1, N)})
    gamed = pd.DataFrame({"preference": rng.uniform(0, 1, 2 * N), "std_delta_len": rng.normal(0, 1, 2 * N)})
    gamed["instruction_difficulty"] = np.tile(difficulty["instruction_difficulty"], 2)
    paths = [saved(tmp_path / name, t) for name, t in (("difficulty.csv", difficulty), ("gamed.csv.gz", gamed))]
    return ("--difficulty", paths[0], "--gamed", paths[1]), difficulty["instruction_difficulty"].to_numpy(), gamed


def test_records_alone_give_the_minimal_variant_and_say_so(records, tmp_path, capsys):
    file = saved(tmp_path / "annotations.json", records)
    code, out = run(capsys, "--annotations", file, "--json")
    assert code == 0
    assert set(out) >= REQUIRED
    assert (out["model"], out["baseline"], out["variant"]) == ("mine", "base", "length_controlled_minimal")
    assert "no difficulty file" in out["note"]
    assert (out["n_total"], out["n_missing"]) == (N - 1, 1)
    assert out["avg_length"] == int(np.mean([len(r["output_2"]) for r in records]))
    expected = length_controlled_win_rate(frame_of(records), difficulty=None, gamed=None)
    assert {k: out[k] for k in expected} == expected
    _, text = run(capsys, "--annotations", file)
    assert f"win_rate                    {expected['win_rate']}" in text.splitlines()


def test_baseline_file_numbers_the_prompts(records, official, tmp_path, capsys):
    options, difficulty, gamed = official
    file = saved(tmp_path / "annotations.json.gz", records[::-1])
    base = saved(tmp_path / "base.json", answers(records, 1))
    _, out = run(capsys, "--annotations", file, "--baseline", base, *options, "--json")
    expected = length_controlled_win_rate(frame_of(records)[::-1], difficulty=difficulty, gamed=gamed)
    assert {k: out[k] for k in expected} == expected
    assert out["variant"] == "length_controlled_v1"
    assert "note" not in out
    code, line = run(capsys, "--annotations", file, *options)
    assert code == 2
    assert "no prompt numbers; give --baseline" in line
    _, positional = run(capsys, "--annotations", file, *options, "--by-position", "--json")
    frame = frame_of(records[::-1])
    assert positional["weights"] == length_controlled_win_rate(frame, difficulty=difficulty, gamed=gamed)["weights"]


def test_lengths_come_from_the_answers_where_the_annotations_have_no_texts(records, tmp_path, capsys):
    whole = saved(tmp_path / "whole.json", records)
    bare = [{k: r[k] for k in ("instruction", "preference", "generator_2")} for r in records]
    file = saved(tmp_path / "bare.json", bare)
    mine = saved(tmp_path / "mine.json", [*answers(records, 2), {"instruction": "not judged", "output": "x" * 9000}])
    base = saved(tmp_path / "base.json", answers(records, 1))
    _, expected = run(capsys, "--annotations", whole, "--json")
    _, out = run(capsys, "--annotations", file, "--outputs", mine, "--baseline", base, "--json")
    name = "length_controlled_win_rate"
    assert out[name] == expected[name]
    # the average is over the file of outputs, as published
    assert out["avg_length"] == int((sum(len(r["output_2"]) for r in records) + 9000) / (N + 1))
    code, line = run(capsys, "--annotations", file, "--baseline", base)
    assert code == 2
    assert "neither 'output_2' nor 'len_model' is there; give --outputs" in line


def test_several_models_in_one_table(records, official, tmp_path, capsys):
    options, difficulty, gamed = official
    one = frame_of(records).assign(model="a")
    two = one.assign(model="b", preference=3 - one["preference"])
    _, out = run(capsys, "--annotations", saved(tmp_path / "two.csv.gz", pd.concat([one, two])), *options, "--json")
    assert list(out["models"]) == ["a", "b"]
    for name, part in (("a", one), ("b", two)):
        expected = length_controlled_win_rate(part, difficulty=difficulty, gamed=gamed)
        got = out["models"][name]
        assert got["length_controlled_win_rate"] == pytest.approx(expected["length_controlled_win_rate"], abs=1e-8)
        assert got["model"] == name


def test_a_model_against_itself_is_50(records, tmp_path, capsys):
    same = [r | {"generator_1": "mine", "preference": 1.5} for r in records]
    _, out = run(capsys, "--annotations", saved(tmp_path / "same.json", same), "--json")
    assert out["length_controlled_win_rate"] == out["win_rate"] == 50


def change(**fields):
    return lambda records: [r | (fields if i == 3 else {}) for i, r in enumerate(records)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(preference="good"), "'preference' of row 3 is 'good', not a number"),
        (change(preference=7), "annotations.json: preference: row 3 is 7.0"),
        (change(output_2=5), "'output_2' of row 3 is not a text but 5"),
        (change(generator_2=None), "row 3 has no 'generator_2'"),
        (lambda records: [], "no rows with 'preference'"),
        (lambda records: answers(records, 1), "no rows with 'preference'; columns there: instruction, output"),
        (lambda records: "text", "annotations.json: str, expected a list of objects"),
    ],
)
def test_unusable_annotations(content, message, records, tmp_path, capsys):
    code, line = run(capsys, "--annotations", saved(tmp_path / "annotations.json", content(records)))
    assert code == 2
    assert message in line


def test_unusable_answers(records, tmp_path, capsys):
    file = saved(tmp_path / "annotations.json", records)
    others = {
        "short": (answers(records, 1)[:-1], f"no answer for row {N - 1} of {file}: 'Question {N - 1}?'"),
        "other": (answers(records, 2), "row 0 has"),
        "twice": (answers(records, 1) * 2, f"row {N} repeats 'Question 0?'"),
    }
    for name, (content, message) in others.items():
        code, line = run(capsys, "--annotations", file, "--baseline", saved(tmp_path / f"{name}.json", content))
        assert code == 2
        assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --spec"),
        (["--spec", "a.json", "--annotations", "b.json"], "give either --spec"),
        (["--spec", "a.json", "--json"], "--json goes with --annotations"),
        (["--spec", "a.json", "--by-position"], "--by-position goes with --annotations"),
        (["--annotations", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--annotations", "b.json", "--by-position"], "give --difficulty with it"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    code = main(["win-rate", *words])
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_published_extract(shared_data, tmp_path, capsys):
    folder = shared_data / "alpaca_eval"
    rows = pd.read_csv(folder / "annotations.csv.gz")
    model = rows["model"].iloc[0]
    words = ("--difficulty", str(folder / "instruction_difficulty.csv"), "--gamed",
             str(folder / "df_gamed_surrogate.csv"), "--baseline", str(folder / "eval_set.json.gz"))  # fmt: skip
    file = saved(tmp_path / "one.csv.gz", rows[rows["model"] == model])
    _, out = run(capsys, "--annotations", file, *words, "--json")
    board = pd.read_csv(folder / "leaderboard.csv", index_col=0).loc[model]
    assert out["length_controlled_win_rate"] == pytest.approx(board["exact_lc_cv_mod5_folds"], abs=1e-6)
    assert out["avg_length"] == board["avg_length"]
