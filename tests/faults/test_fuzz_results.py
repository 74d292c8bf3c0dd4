"""Any damage of a results folder is found or told in one line, whichever reader or command meets it."""

from __future__ import annotations

import contextlib
import io
import json
import math

import pandas as pd
import pytest
from fuzzing import damaged, fuzzed, mutated, outcome, told
from hypothesis import strategies as st

from prefopt.artifacts import MANIFEST, Node, node_of, read_manifest
from prefopt.cli import main
from prefopt.errors import BadInput
from prefopt.files import read_json, read_lines, read_rows, read_text, write_json, write_lines
from prefopt.store.builds import building
from prefopt.store.inventory import artifacts, below, made_from
from prefopt.store.verification import verify_artifact
from prefopt.tables import read_table, write_table
from small_project import ROOT

PARENT = Node("pairs", 1, "few", {"source": {"kind": "world", "seed": 0}, "limit": 0.5})
CHILD = Node("tokens", 1, "few", {"max_length": 64}, {"pairs": PARENT.ref})
METRICS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan"), "note": "a\u2028b"}]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two artifacts, the second made from the first."""
    results = tmp_path_factory.mktemp("results")
    for node in (PARENT, CHILD):
        with building(node, results) as build:
            write_json(build.work / "metrics.json", {"accuracy": 0.5})
            build.summary["pairs"] = 3
    return results


@pytest.fixture(scope="module")
def manifest(results):
    return read_json(results / CHILD.ref / MANIFEST)


SPEC = CHILD.to_json()


@fuzzed(4_000, content=mutated(SPEC) | damaged(st.just(json.dumps(SPEC).encode())))
def test_any_spec_file_is_an_artifact_below_the_results_or_told(results, content):
    path = results / "any.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    found = outcome(lambda: node_of(path), str(path))
    if isinstance(found, Node):
        assert (results / found.ref).resolve().is_relative_to(results.resolve())
        assert Node.from_json(found.to_json()) == found
        json.dumps(found.to_json(), allow_nan=False, ensure_ascii=False).encode()


@fuzzed(2_500, data=st.data())
def test_any_manifest_is_sound_or_a_finding(results, manifest, data):
    path = results / CHILD.ref / MANIFEST
    whole = path.read_bytes()
    broken = data.draw(mutated(manifest) | damaged(st.just(whole)))
    path.write_bytes(broken if isinstance(broken, bytes) else json.dumps(broken).encode())
    try:
        findings = verify_artifact(results, CHILD)
        found = outcome(lambda: read_manifest(path, *manifest.keys()), str(path))
        if isinstance(found, BadInput):
            assert findings == [str(found)]
        listed = artifacts(results)
        assert PARENT.ref in below(listed, [PARENT.ref])
        assert PARENT.ref in made_from(listed, [PARENT.ref])
    finally:
        path.write_bytes(whole)
    assert verify_artifact(results, CHILD) == []


def table_bytes(folder) -> bytes:
    write_table(folder / "t.parquet", pd.DataFrame({"pair_id": [1, 2], "split": ["train", "test"], "x": [0.5, 1.5]}))
    return (folder / "t.parquet").read_bytes()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    write_lines(folder / "metrics.jsonl", METRICS)
    (folder / "rows.csv").write_text('a,b\n1,"two\nlines"\n')
    table_bytes(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    return folder, whole


READERS = {
    "metrics.jsonl": read_lines,
    "rows.csv": read_rows,
    "t.parquet": lambda path: read_table(path, ("pair_id", "x"), "train"),
}


@fuzzed(2_500, name=st.sampled_from(sorted(READERS)), data=st.data())
def test_any_table_of_an_artifact_is_read_or_told(kept, name, data):
    folder, whole = kept
    path = folder / f"any-{name}"
    path.write_bytes(data.draw(damaged(st.just(whole[name]))))
    outcome(lambda: READERS[name](path), str(path))


# --- explicit examples ------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again(kept):
    folder, _ = kept
    found = read_lines(folder / "metrics.jsonl")
    assert math.isnan(found[1].pop("loss"))
    assert found == [METRICS[0], {"step": 2, "note": "a\u2028b"}]
    assert read_rows(folder / "rows.csv") == [["a", "b"], ["1", "two\nlines"]]
    assert READERS["t.parquet"](folder / "t.parquet").to_dict("records") == [{"pair_id": 1, "x": 0.5}]


CASES = {
    "a list": (b"[1]", r"a\.json: spec file is list, expected an object"),
    "nested deeply": (b"[" * 100_000 + b"]" * 100_000, r"a\.json: not JSON .nested more than 100 levels deep"),
    "NaN": (json.dumps(SPEC | {"spec": {"x": math.nan}}).encode(), r"a\.json: not JSON .NaN is no JSON"),
    "over all numbers": (
        json.dumps(SPEC).replace("64", "1e999").encode(),
        r"a\.json: spec file with a value that is none",
    ),
    "a key twice": (json.dumps(SPEC).replace("{", '{"stage": "pairs", ', 1).encode(), "'stage' stands twice"),
    "another user's folder": (
        json.dumps(SPEC | {"name": "../../x"}).encode(),
        "'../../x' names no artifact",
    ),
    "from the root": (json.dumps(SPEC | {"stage": "/etc"}).encode(), "spec file: '/etc' names no artifact"),
    "a parent elsewhere": (
        json.dumps(SPEC | {"parents": {"p": "../x"}}).encode(),
        "'../x' names no artifact",
    ),
    "a parent that is none": (json.dumps(SPEC | {"parents": {"p": 3}}).encode(), "spec file: 3 names no artifact"),
    "a lone surrogate": (json.dumps(SPEC | {"spec": {"x": "\ud800"}}).encode(), "spec file with a value that is none"),
    "parents that are a list": (json.dumps(SPEC | {"parents": []}).encode(), r"spec file: 'parents' is \[\]"),
    "a version that is true": (json.dumps(SPEC | {"version": True}).encode(), "spec file: 'version' is True"),
    "UTF-16": (json.dumps(SPEC).encode("utf-16"), r"a\.json: no text in it .'utf-8' codec"),
    "nothing": (b"", r"a\.json: not JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_spec_files_are_told_in_one_line(tmp_path, case):
    content, expected = CASES[case]
    (tmp_path / "a.json").write_bytes(content)
    told(lambda: node_of(tmp_path / "a.json"), r"a\.json: ", expected)


@pytest.mark.parametrize("read", [read_json, read_lines, read_text, read_table])
def test_a_folder_in_place_of_a_file_and_no_file_at_all(tmp_path, read):
    (tmp_path / "folder").mkdir()
    told(lambda: read(tmp_path / "missing"), "missing: no such file")
    if read is not read_table:  # a folder of parts is a table, for the library
        told(lambda: read(tmp_path / "folder"), "folder: ")


@pytest.mark.parametrize("key", ["outputs", "inputs", "parents", "summary", "spec", "stage"])
def test_a_manifest_without_a_part_is_told(results, manifest, tmp_path, key):
    (tmp_path / MANIFEST).write_text(json.dumps({name: value for name, value in manifest.items() if name != key}))
    told(lambda: read_manifest(tmp_path / MANIFEST, key), rf"manifest\.json: no manifest, '{key}' is None")


# --- commands ---------------------------------------------------------------------------------------------------------


def words_with(path) -> list[list[str]]:
    """Every command that takes a file of the user's, with this one in its place."""
    file, good = str(path), str(ROOT / "README.md")
    one = [
        ["win-rate", "--annotations", file],
        ["show-answers", "--annotations", file, "--out", f"{file}.html"],
        ["rank", "--annotations", file],
        ["compare-policies", "--annotations", file, file],
        ["fit-difficulty", "--annotations", file, file, "--out", f"{file}.out.csv"],
        ["disagreement", "--votes", file],
        ["plan", "--config", file],
        ["verify", "--config", file],
        ["report", file, "--out", f"{file}.html"],
        ["publish", file],
        ["judge", "--spec", file],
        ["prepare-pairs", "--spec", file],
        ["gc", "--config", file],
        ["losses", "--page", file],
        ["compare", "--results-a", file, "--results-b", good],
    ]
    beside = ["outputs", "baseline", "difficulty", "gamed"]
    return one + [["win-rate", "--annotations", file, f"--{option}", file] for option in beside]


CONTENTS = [
    b"",
    b"\xff\xfe\0",
    b"\x1f\x8b\x08\0",
    b"[" * 20_000,
    b"- " * 20_000,
    b"{}",
    b"[]",
    b"[{}]",
    b"a,b\n1\n",
    b"\0" * 99,
]
CONTENTS += [b'{"a": NaN}', b'{"a": 1, "a": 2}', "שלום \U0001f469\n".encode(), b"items: [x]\n", b"x" * 200_000, b"PAR1"]
SUFFIXES = [".json", ".jsonl", ".csv", ".json.gz", ".csv.gz", ".yaml", ".parquet", ""]
COMMANDS = len(words_with("x"))


@pytest.fixture(scope="module")
def run():
    """Runs a command line in this process: its exit code and what it wrote to stderr, line by line."""

    def run(words):
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        return code, heard.getvalue().strip().splitlines()

    return run


given_files = st.tuples(st.sampled_from(SUFFIXES), damaged(st.sampled_from(CONTENTS)) | st.none())


@fuzzed(3_000, command=st.integers(0, COMMANDS - 1), given=given_files)
def test_any_file_ends_a_command_in_one_line(kept, run, command, given):
    (folder, _), (suffix, content) = kept, given
    place = folder / "commands" / "specs" / "pairs"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"given{suffix}"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    words = words_with(path)[command]
    code, lines = run(words)
    assert code in (0, 2, 3), (words, lines)
    assert not any("Traceback" in line for line in lines)
    if code:
        assert lines[-1].startswith(f"prefopt {words[0]}: "), (words, lines)
        assert len(lines[-1]) < 2000
