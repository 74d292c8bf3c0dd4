"""Any annotation file becomes metrics within their ranges, or one line that names the file and the row."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from fuzzing import damaged, fuzzed, mutated, outcome, told
from hypothesis import strategies as st

from prefopt.errors import BadInput, FailedCheck
from prefopt.stages import annotated
from prefopt.stages.shown import evaluations_of
from prefopt.verbs.rankings import compare_files, fit_files, rank_files

PREFERENCES = (1.0, 2.0, 1.2, 1.8, 1.5, None, 1.4)


def record(row: int, model: str = "mine", shift: int = 0) -> dict:
    return {
        "instruction": f"Question {row}?",
        "output_1": "b" * (10 + row),
        "output_2": "m" * (8 + 3 * (row % 3)),
        "generator_1": "base",
        "generator_2": model,
        "dataset": "places",
        "preference": PREFERENCES[(row + shift) % len(PREFERENCES)],
    }


RECORDS = [record(row) for row in range(7)]
NUMBERED = [
    {
        "index": row,
        "len_model": 10 + row % 3,
        "len_baseline": 12,
        "preference": 1.5 + (row % 3 - 1) / 3,
        "model": "mine",
    }
    for row in range(7)
]
OTHERS = [record(row, "other", shift=1) for row in range(7)]
MODEL_OUTPUTS = [{"instruction": r["instruction"], "output": r["output_2"], "generator": "mine"} for r in RECORDS]
BASELINE = [{"instruction": r["instruction"], "output": r["output_1"], "generator": "base"} for r in RECORDS]
DIFFICULTY = [{"index": row, "instruction_difficulty": row / 7 - 0.5} for row in range(7)]
GAMED = [
    {"preference": p, "std_delta_len": d, "instruction_difficulty": 0.1} for p, d in ((0.9, -1.0), (0.1, 1.0), (0.4, 0))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotations")
    for name, rows in {"others": OTHERS, "base": BASELINE, "outputs": MODEL_OUTPUTS, "difficulty": DIFFICULTY}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def told_or(call, *named):
    """As ``outcome``; a fit that does not converge on drawn rows may say so."""
    try:
        return outcome(call, *named)
    except FailedCheck as error:
        found = error
    assert "no convergence" in str(found)
    return found


def assert_rates(found) -> None:
    if isinstance(found, Exception):
        return
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    for metrics in found.get("models", {None: found}).values():
        for name in ("win_rate", "length_controlled_win_rate", "discrete_win_rate"):
            assert 0 <= metrics[name] <= 100
        assert metrics["n_wins"] + metrics["n_wins_base"] + metrics["n_draws"] == metrics["n_total"] > 0
        assert metrics["avg_length"] >= 0
        assert metrics.get("model", "x").strip()


def written(path, content: bytes):
    path.write_bytes(content)
    return path


@fuzzed(4_000, rows=mutated(RECORDS) | mutated(NUMBERED))
def test_any_records_are_rates_or_told(folder, rows):
    path = written(folder / "records.json", json.dumps(rows).encode())
    assert_rates(told_or(lambda: annotated.win_rates_of(path), str(path)))


@st.composite
def files_beside(draw):
    role = draw(st.sampled_from(["outputs", "baseline", "difficulty", "gamed"]))
    rows = {"outputs": MODEL_OUTPUTS, "baseline": BASELINE, "difficulty": DIFFICULTY, "gamed": GAMED}[role]
    return role, draw(mutated(rows))


@fuzzed(2_000, case=files_beside())
def test_any_file_beside_the_annotations_is_used_or_told(folder, case):
    role, rows = case
    path = written(folder / "beside.json", json.dumps(rows).encode())
    annotations = written(folder / "good.json", json.dumps(RECORDS).encode())
    options = {"baseline": folder / "base.json", "difficulty": folder / "difficulty.json"}
    used = {role: path} if role in ("outputs", "baseline") else {**options, role: path}
    assert_rates(told_or(lambda: annotated.win_rates_of(annotations, **used), ".json"))


def as_csv(rows: list[dict]) -> bytes:
    lines = [list(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    return "".join(",".join("" if v is None else str(v) for v in line) + "\n" for line in lines).encode()


@st.composite
def annotation_files(draw):
    kind = draw(st.sampled_from(["json", "json.gz", "csv", "csv.gz"]))
    rows = draw(st.sampled_from([RECORDS, NUMBERED]))
    content = draw(damaged(st.just(json.dumps(rows).encode() if kind.startswith("json") else as_csv(rows))))
    if kind.endswith(".gz"):
        content = draw(damaged(st.just(gzip.compress(content, 1, mtime=0))))
    return kind, content


@fuzzed(4_000, case=annotation_files())
def test_any_bytes_are_rates_or_told(folder, case):
    kind, content = case
    path = written(folder / f"bytes.{kind}", content)
    assert_rates(told_or(lambda: annotated.win_rates_of(path), str(path)))


@fuzzed(2_000, rows=mutated(RECORDS))
def test_any_records_are_ranked_or_told(folder, rows):
    path = written(folder / "ranked.json", json.dumps(rows).encode())
    found = told_or(lambda: rank_files([path, folder / "others.json"], ridge=0.1))
    if not isinstance(found, Exception):
        assert len(found["models"]) >= 2
        assert all(math.isfinite(model["strength"]) for model in found["models"])
        json.dumps(found).encode()


@fuzzed(1_500, rows=mutated(RECORDS))
def test_any_two_files_are_compared_or_told(folder, rows):
    path = written(folder / "compared.json", json.dumps(rows).encode())
    found = told_or(lambda: compare_files([path, folder / "others.json"]))
    if not isinstance(found, Exception):
        assert -100 <= found["low"] <= found["difference"] <= found["high"] <= 100 or found["n_prompts"] == 1
        assert 0 <= found["win_rate_a"] <= 100


@fuzzed(500, rows=mutated(RECORDS))
def test_any_files_give_difficulties_or_are_told(folder, rows):
    path = written(folder / "fitted.json", json.dumps(rows).encode())
    (folder / "made.csv").unlink(missing_ok=True)
    files = [path, folder / "others.json"]
    found = told_or(lambda: fit_files(files, folder / "made.csv", folder / "base.json", 1.0))
    assert (folder / "made.csv").exists() != isinstance(found, Exception)
    if not isinstance(found, Exception):
        assert np.isfinite(annotated.difficulties_of(folder / "made.csv")).any()


@fuzzed(500, rows=mutated(RECORDS))
def test_any_records_are_shown_or_told(folder, rows):
    from prefopt.reporting.evaluation_page import page_data

    path = written(folder / "shown.json", json.dumps(rows).encode())
    found = told_or(lambda: evaluations_of([path], baseline=folder / "base.json"))
    if not isinstance(found, Exception):
        shown = json.dumps(page_data(found), ensure_ascii=False, allow_nan=False)
        shown.encode()


# --- explicit examples ------------------------------------------------------------------------------------------------


def changed(**values: object) -> bytes:
    return json.dumps([*RECORDS[:3], RECORDS[3] | values, *RECORDS[4:]]).encode()


def numbered(**values: object) -> bytes:
    return json.dumps([*NUMBERED[:3], NUMBERED[3] | values, *NUMBERED[4:]]).encode()


TEXT = json.dumps(RECORDS)
CASES = {
    "truncated gzip": ("a.json.gz", gzip.compress(TEXT.encode(), mtime=0)[:-9], r"a\.json\.gz: cannot be read"),
    "damaged gzip": ("a.json.gz", gzip.compress(TEXT.encode(), mtime=0)[:12] + b"\xff" * 40, "cannot be read"),
    "latin-1": ("a.json", TEXT.replace("Question 3", "Frage caf\xe9").encode("latin-1"), "not a JSON file .*utf-8"),
    "NUL bytes": ("a.csv", as_csv(NUMBERED).replace(b"12", b"1\x002"), "line 2: a byte 0x00"),
    "preference is a truth value": ("a.json", changed(preference=True), "'preference' of row 3 is True, not a number"),
    "preference over 2": ("a.json", changed(preference=2.1), r"preference: row 3 is 2\.1; expected 1"),
    "infinite preference": ("a.json", changed(preference=float("inf")), "preference: row 3 is inf"),
    "huge preference": ("a.json", changed(preference=10**400), "'preference' of row 3 is 1000.* not a number"),
    "preference is a list": ("a.json", changed(preference=[1]), r"'preference' of row 3 is \[1\], not a number"),
    "a name that is a number": ("a.json", changed(generator_2=5), "'generator_2' of row 3 is not a text but 5"),
    "a name that is empty": ("a.json", changed(generator_2=" "), "row 3 has no 'generator_2'"),
    "a name that is an object": ("a.json", changed(generator_1={"a": 1}), "'generator_1' of row 3 is not a text"),
    "several baselines": ("a.json", changed(generator_1="b2"), "several baselines: b2, base"),
    "lone surrogate": ("a.json", changed(output_2="a\ud800"), "row 4: 'output_2' has a lone surrogate"),
    "duplicate keys": ("a.json", TEXT.replace('"preference": 1.0', '"preference": 1.0, "preference": 2.0').encode(),
                       "not a JSON file .*'preference' stands twice"),
    "duplicate columns": ("a.csv", b"preference,len_model,preference\n1,2,3\n", "column 'preference' stands twice"),
    "more fields than columns": ("a.csv", b"preference,len_model,len_baseline\n9,1,20,30\n", "line 2: 4 fields"),
    "fewer fields than columns": ("a.csv", b"preference,len_model,len_baseline\n1,20\n", "line 2: 2 fields"),
    "columns, not records": ("a.json", b'{"preference": [1, 2], "len_model": [1, 2]}', "dict, expected a list"),
    "no objects": ("a.json", b"[1, 2]", "row 1: int where an object with keys is expected"),
    "deeply nested": ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested more than 100 levels deep"),
    "a negative length": ("a.json", numbered(len_model=-1), "row 3 has no output length: 'len_model' is -1"),
    "a length that is missing": ("a.json", numbered(len_model=None, model="mine"), "row 3 has no output length"),
    "a length of 1e308": ("a.json", numbered(len_model=1e308), r"row 3 has no output length: 'len_model' is 1e\+308"),
    "half an index": ("a.json", numbered(index=1.5), r"'index' of row 3 is 1\.5, expected a prompt's number"),
    "no index": ("a.json", numbered(index=None), "'index' of row 3 is nan, expected a prompt's number"),
    "a huge index": ("a.json", numbered(index=1e15), r"'index' of row 3 is 1e\+15, expected a prompt's number"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_told_in_one_line(tmp_path, case):
    name, content, expected = CASES[case]
    told(lambda: annotated.win_rates_of(written(tmp_path / name, content)), rf"{name}: ".replace(".", r"\."), expected)


def test_a_model_that_is_its_own_baseline_needs_its_lengths_too(tmp_path):
    rows = [row | {"generator_1": "same", "model": "same", "len_model": None} for row in NUMBERED]
    path = written(tmp_path / "a.json", json.dumps(rows).encode())
    told(lambda: annotated.win_rates_of(path), "row 0 has no output length")


@pytest.mark.parametrize(
    ("index", "expected"),
    [(0.5, "row 6 is 0.5"), (float("nan"), "row 6 is nan"), (1e13, "row 6 is 1e[+]13"), (0, "every prompt's number")],
)
def test_difficulties_belong_to_whole_numbers(tmp_path, index, expected):
    rows = [*DIFFICULTY[:6], {"index": index, "instruction_difficulty": 1.0}]
    path = written(tmp_path / "difficulty.json", json.dumps(rows).encode())
    told(lambda: annotated.difficulties_of(path), r"difficulty\.json: ", expected)


def test_difficulties_are_log_odds(tmp_path):
    """One of 1e308 made every coefficient of the fit NaN."""
    path = written(
        tmp_path / "d.json", json.dumps([*DIFFICULTY[:6], DIFFICULTY[6] | {"instruction_difficulty": 1e308}]).encode()
    )
    told(lambda: annotated.difficulties_of(path), r"d\.json: 'instruction_difficulty' of row 6 is 1e\+308")


def test_gamed_rows_are_numbers(tmp_path):
    path = written(tmp_path / "gamed.json", json.dumps([*GAMED, GAMED[0] | {"std_delta_len": "far"}]).encode())
    told(lambda: annotated.gamed_of(path), "gamed.json: 'std_delta_len' of row 3 is 'far', not a number")


def test_an_answer_of_a_table_stays_a_text_whatever_it_looks_like(tmp_path):
    rows = [record(row) | {"output_1": text} for row, text in enumerate(["42", "NA", "", "nan", "1e5", "None", "true"])]
    written(tmp_path / "a.json", json.dumps(rows).encode())
    written(tmp_path / "a.csv", b"\xef\xbb\xbf" + as_csv(rows).replace(b"\n", b"\r\n"))
    assert annotated.win_rates_of(tmp_path / "a.csv") == annotated.win_rates_of(tmp_path / "a.json")


@pytest.mark.parametrize("ridge", [float("nan"), float("inf"), -1.0])
def test_a_penalty_is_a_number(tmp_path, ridge):
    files = [written(tmp_path / f"{n}.json", json.dumps(rows).encode()) for n, rows in enumerate([RECORDS, OTHERS])]
    told(lambda: rank_files(files, ridge=ridge), "ridge is ")


def test_several_outputs_for_one_question_are_told(tmp_path):
    annotations = written(tmp_path / "a.json", TEXT.encode())
    base = written(tmp_path / "b.json", json.dumps([*BASELINE, BASELINE[0]]).encode())
    with pytest.raises(BadInput, match=r"b\.json: row 7 repeats 'Question 0\?'; one answer per prompt is needed"):
        annotated.win_rates_of(annotations, baseline=base)
