"""Any file of pairs becomes valid pairs and refusals with reasons, or one line that names file, place and value."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import damaged, fuzzed, mutated, outcome, told
from hypothesis import strategies as st

from prefopt.errors import BadInput
from prefopt.pairs import read_source
from prefopt.readers.raw import REASONS, ROLES
from prefopt.specs import FilesSource

USER, ANSWER = {"role": "user", "content": "One plus one?"}, {"role": "assistant", "content": "Two."}
OTHER = {"role": "assistant", "content": "Three."}
VALID = {
    "hh": {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    "trl": {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "id": 7, "score": 0.5},
    "ultrafeedback": {
        "prompt": "One plus one?",
        "chosen": [USER, ANSWER],
        "rejected": [USER, OTHER],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "shp": {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1, "score_A": 30, "score_B": 2},
    "stack_exchange": {
        "qid": 7,
        "question": "<p>Why is <b>bread</b> brown?</p>",
        "answers": [{"text": "<p>Paint &amp; varnish.</p>", "pm_score": -1}, {"text": "<p>Heat.</p>", "pm_score": 4}],
    },
    "tldr": {
        "info": {"post": "My cat sat.", "title": "Cat", "subreddit": "aww"},
        "summaries": [{"text": " Dog ran."}, {"text": " Cat sat."}],
        "choice": 1,
    },
    "imdb_prefix": {"text": "This film is", "chosen": "This film is a joy.", "rejected": "This film is a bore."},
}
FLAT = {name: row for name, row in VALID.items() if all(isinstance(value, str | int) for value in row.values())}


def jsonl(*rows: object, ascii_only: bool = True) -> bytes:
    lines = (json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    return "".join(lines).encode("utf-8", "surrogatepass")


def table(*rows: dict) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def parquet(*rows: dict) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


def read(path, reader="auto"):
    return read_source(FilesSource(kind="files", paths=[str(path)], reader=reader), path.parent)


def assert_sound(found) -> None:
    """Every pair says something on both sides, two different things, in Unicode; every refusal has a known reason."""
    if isinstance(found, BadInput):
        return
    accepted, refused = found
    assert accepted
    for pair in accepted:
        assert pair["chosen"].strip()
        assert pair["rejected"].strip()
        assert pair["chosen"].strip() != pair["rejected"].strip()
        assert any(message["content"].strip() for message in pair["prompt"])
        assert {message["role"] for message in pair["prompt"]} <= {*ROLES, "text"}
        json.dumps(pair, ensure_ascii=False).encode()
        json.loads(pair["meta"], parse_constant=pytest.fail)
    ids = [pair["pair_id"] for pair in accepted]
    assert len(set(ids)) == len(ids)
    assert {record["reason"] for record in refused} <= set(REASONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@st.composite
def rows_of_a_reader(draw):
    name = draw(st.sampled_from(sorted(VALID)))
    return name, draw(st.sampled_from([name, "auto"])), draw(mutated(VALID[name])), draw(st.booleans())


@fuzzed(14_000, case=rows_of_a_reader())
def test_any_row_is_a_pair_or_refused_or_told_with_its_line(folder, case):
    name, reader, row, ascii_only = case
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl(VALID[name], row, ascii_only=ascii_only))
    told_where = [str(path)] if name == "imdb_prefix" and reader == "auto" else [str(path), "line 2"]
    assert_sound(outcome(lambda: read(path, reader), *told_where))


@st.composite
def files_of_pairs(draw):
    kind = draw(st.sampled_from(["jsonl", "jsonl.gz", "csv", "csv.gz"]))
    name = draw(st.sampled_from(sorted(VALID if kind.startswith("jsonl") else FLAT)))
    row = VALID[name]
    content = draw(damaged(st.just(jsonl(row, row) if kind.startswith("jsonl") else table(row, row))))
    if kind.endswith(".gz"):
        content = gzip.compress(content, 1, mtime=0)
        content = draw(damaged(st.just(content))) if draw(st.booleans()) else content
    return kind, name, content


@fuzzed(12_000, case=files_of_pairs())
def test_any_bytes_of_a_text_file_are_pairs_or_told(folder, case):
    kind, name, content = case
    path = folder / f"bytes.{kind}"
    path.write_bytes(content)
    assert_sound(outcome(lambda: read(path, name), str(path)))


PARQUET = [parquet(VALID[name], VALID[name]) for name in sorted(VALID)]


@fuzzed(2_000, content=damaged(st.sampled_from(PARQUET)))
def test_any_bytes_of_a_parquet_file_are_pairs_or_told(folder, content):
    path = folder / "bytes.parquet"
    path.write_bytes(content)
    assert_sound(outcome(lambda: read(path), str(path)))


# --- explicit examples ------------------------------------------------------------------------------------------------

GOOD = jsonl(VALID["trl"])
CSV = table(VALID["shp"])
DEEP = '{"prompt": "a", "chosen": "b", "rejected": "c", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
CASES = {
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
    "gzip with wrong bytes": ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 40, "cannot be read"),
    "no gzip": ("a.jsonl.gz", GOOD, "cannot be read"),
    "latin-1": ("a.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', "line 2: byte 0xe9 is not UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "UTF-16 without mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), "line 1: a byte 0x00"),
    "UTF-16 table": ("a.csv", CSV.decode().encode("utf-16-le"), "line 1: a byte 0x00"),
    "NUL bytes": ("a.csv", CSV + CSV.splitlines()[1].replace(b"Why", b"W\0y"), "line 3: a byte 0x00"),
    "duplicate keys": ("a.jsonl", GOOD + b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n',
                       "line 2: not JSON .*'chosen' stands twice"),
    "duplicate columns": ("a.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", "line 1: column 'chosen' stands twice"),
    "deeply nested": ("a.jsonl", GOOD + DEEP.encode(), "line 2: not JSON .*nested more than 100 levels"),
    "nested, not closed": ("a.jsonl", GOOD + DEEP[:90_000].encode(), "line 2: not JSON"),
    "number of 5000 digits": ("a.jsonl", GOOD + b'{"id": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
    "NaN score": ("a.jsonl", jsonl(VALID["ultrafeedback"], VALID["ultrafeedback"] | {"score_chosen": float("nan")}),
                  "line 2: 'score_chosen' is nan, expected a finite number"),
    "infinite score": ("a.jsonl", jsonl(VALID["ultrafeedback"] | {"score_chosen": float("inf")}), "line 1: .* is inf"),
    "number with underscore": ("a.csv", table(VALID["shp"] | {"score_A": "1_0"}), "line 2: 'score_A' is '1_0'"),
    "an empty file": ("a.jsonl", b"", "it has no rows"),
    "an empty table": ("a.csv", b"", "it has no rows"),
    "an empty gzip": ("a.jsonl.gz", b"", "it has no rows"),
    "an empty parquet": ("a.parquet", b"", "not a readable parquet file"),
    "a cut parquet": ("a.parquet", PARQUET[0][: len(PARQUET[0]) // 2], "not a readable parquet file"),
    "10 MB that is no JSON": ("a.jsonl", GOOD + b"x" * 10_000_000, "line 2: not JSON"),
    "10 MB where a number is expected": ("a.jsonl", jsonl(VALID["shp"] | {"labels": "9" * 10_000_000}), "'labels' is"),
    "10 MB key": ("a.jsonl", jsonl({"k" * 10_000_000: 1}), "line 1: fits no reader"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_told_in_one_line(tmp_path, case):
    name, content, expected = CASES[case]
    (tmp_path / name).write_bytes(content)
    told(lambda: read(tmp_path / name), name, expected)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    told(lambda: read(tmp_path / "a.jsonl"), r"a\.jsonl: no .* file and no saved data set in this folder")


def test_a_path_that_no_file_can_have(tmp_path):
    for name in ("a\0.jsonl", "a" * 300 + ".jsonl", "\ud800.jsonl"):
        source = FilesSource(kind="files", paths=[name], sha256=["0" * 64])
        told(lambda source=source: read_source(source, tmp_path), "no such file")


def test_a_device_is_no_file(tmp_path):
    told(lambda: read_source(FilesSource(kind="files", paths=["/dev/zero"], sha256=["0" * 64]), tmp_path), "/dev/zero")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([b"\xff\xfe", b"a"]).cast(pa.string(), safe=False), "text that is no UTF-8"),
        (pa.array([-(2**60), 0], pa.timestamp("us")), "a date before all calendars"),
        (pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["x", "x"]), "a key twice in an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parquet_values_that_are_no_python_values(tmp_path, column, kind):
    texts = [pa.array(pair) for pair in (["a", "b"], ["c", "d"], ["e", "f"])]
    pq.write_table(pa.table([*texts, column], names=["prompt", "chosen", "rejected", "x"]), tmp_path / "a.parquet")
    told(lambda: read(tmp_path / "a.parquet"), r"a\.parquet: not a readable parquet file from row 1 on")


def test_parquet_with_a_column_twice(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"]), pa.array(["d"])]
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "rejected", "chosen"]), tmp_path / "a.parquet")
    told(lambda: read(tmp_path / "a.parquet"), "column 'chosen' stands twice")


@pytest.mark.parametrize(
    "html", ["<![", "<![foo[x]]>", "<!DOCTYPE [<!x", "<!--", "<a <b", "&#x110000;", "&#xd800;", "<" * 5000]
)
def test_broken_mark_up_is_text(tmp_path, html):
    row = VALID["stack_exchange"] | {"question": f"Why? {html}"}
    (tmp_path / "a.jsonl").write_bytes(jsonl(row))
    accepted, _ = read(tmp_path / "a.jsonl")
    assert accepted[0]["prompt"][0]["content"].startswith("Why?")


def test_a_text_of_10_mb_with_marks_line_ends_and_every_script_is_kept_as_it_is(tmp_path):
    said = "\u202eשלום\u202c \U0001f468\u200d\U0001f469\u200d\U0001f467 $x {{ y }} \u2028" * 250_000
    row = {"prompt": "a", "chosen": said, "rejected": "No."}
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(row, ascii_only=False).replace(b"\n", b"\r\n"))
    ((pair,), refused) = read(tmp_path / "a.jsonl")
    assert (pair["chosen"], refused) == (said, [])


def test_a_table_with_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,chosen,rejected\r\na,"b\r\nc",d\r\n')
    ((pair,), _) = read(tmp_path / "a.csv")
    assert (pair["prompt"][0]["content"], pair["chosen"]) == ("a", "b\r\nc")


def test_lone_surrogates_are_refused_with_their_place(tmp_path):
    rows = [VALID["trl"] | {"chosen": [USER, {"role": "assistant", "content": "a\ud800"}]}, VALID["trl"]]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    _, (refused,) = read(tmp_path / "a.jsonl")
    assert (refused["source_row"], refused["reason"]) == (0, "broken unicode")
    assert refused["detail"] == "lone surrogate at character 1"
