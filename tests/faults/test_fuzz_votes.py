"""Any file of votes becomes votes of named annotators, or one line that names file and row; any prompts likewise."""

from __future__ import annotations

import gzip
import json
import math

import pytest
from fuzzing import damaged, fuzzed, mutated, outcome, told
from hypothesis import strategies as st

from prefopt.annotators.readers import VOTE_READERS, read_votes
from prefopt.annotators.source import voted_outcomes
from prefopt.annotators.votes import CHOICES
from prefopt.errors import BadInput
from prefopt.inputs.prompt_sets import read_prompts
from prefopt.inputs.sources import prompts_identity
from prefopt.readers.raw import REASONS, RawPair
from prefopt.specs import FilePrompts, VotesSource
from prefopt.verbs.votes_file import agreement_of

PAIR = {"prompt": "Why?", "response_a": "So.", "response_b": "No."}
RATINGS = {"RE": 3, "CH": 4, "EM": "2", "SU": 1.5, "EG": 2, "CX": 5}
VALID = {
    "votes": [
        PAIR | {"annotator": "ann", "vote": "a", "system_a": "x", "system_b": "y"},
        PAIR | {"votes": {"bob": "tie", "eve": "b"}},
        PAIR | {"prompt": "How?", "votes": '[{"annotator": "ann", "vote": "a"}]'},
    ],
    "rankings": [
        {"prompt": "Why?", "responses": {"x": "1", "y": "2", "z": "3"}, "annotator": who, "ranking": ranking}
        for who, ranking in (("ann", ["x", "y", "z"]), ("bob", [["z", "y"], "x"]))
    ],
    "ukp_convarg1": [
        {"topic_side": "t", "arg_id": name, "text": f"said {name}", "debate_title": "Tea?", "stance": "yes"}
        for name in ("p", "q")
    ]
    + [{"topic_side": "t", "arg1": "p", "arg2": "q", "gold": "a1", "votes": [{"worker": "w", "vote": "a1"}]}],
    "pandalm": [
        {"instruction": "Add.", "input": "1 1", "response1": "2", "response2": True, "cmp_key": "x_y"}
        | {"annotator1": 1, "annotator2": 0, "annotator3": 2}
    ],
    "tulu_human_eval": [
        {
            "prompt": "Why?",
            "completions": {"x": "So.", "y": "No."},
            "annotations": [{"annotator": "ann", "model_a": "x", "model_b": "y", "preference": "a-is-better"}],
        }
    ],
    "squality_human_eval": [
        {
            "question": "Who?",
            "passage_id": "7",
            "responses": {"x": "She.", "y": "He."},
            "reviewers": [{"worker": 1, "systems": {"x": {"overall_rank": 1}, "y": {"overall_rank": "2"}}}],
        }
    ],
    "mt_bench_human": [
        {"question_id": 81, "model_a": "x", "model_b": "y", "winner": "model_a", "judge": "ann", "turn": 1}
    ],
    "hanna": [{"prompt_id": 1, "rater_slot": slot, "system": s} | RATINGS for slot in (0, 1) for s in ("x", "y")],
    "llmbar": [
        {"id": "1", "input": "Why?", "output_1": "So.", "output_2": "No.", "subset": "s", "label": 1},
        {"id": "1", "judge": "j", "strategy": "s", "winner_order_ab": "1", "winner_order_ba": "2"},
    ],
    "qlora": [
        {"question_id": 1, "text": "Why?"},
        {"question_id": 1, "system": "x", "response": "So."},
        {"question_id": 1, "system": "y", "response": "No."},
        {"question_id": 1, "system_first": "x", "system_second": "y", "score": 1},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("votes")


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))


def assert_votes(votes) -> None:
    assert any(pair.ballots for pair in votes.pairs)
    for pair in votes.pairs:
        people = [ballot.annotator for ballot in pair.ballots]
        assert len(set(people)) == len(people)
        assert all(person.strip() for person in people)
        assert {ballot.vote for ballot in pair.ballots} <= set(CHOICES)
        "".join([*people, pair.system_a, pair.system_b]).encode()
    for ranked in votes.rankings:
        for ranks in ranked.ranks.values():
            assert len(ranks) == len(ranked.systems)
            assert all(math.isfinite(rank) for rank in ranks)


@st.composite
def files_of_votes(draw):
    name = draw(st.sampled_from([*sorted(VALID), "votes", "rankings"]))
    return name, draw(st.sampled_from([name, "auto"])), draw(mutated(VALID[name], most=2))


@fuzzed(14_000, case=files_of_votes())
def test_any_rows_are_votes_or_told(folder, case):
    _, reader, rows = case
    path = folder / "votes.jsonl"
    write(path, rows)
    found = outcome(lambda: read_votes([path], reader), str(path))
    if not isinstance(found, BadInput):
        assert_votes(found)


@fuzzed(4_000, rows=mutated(VALID["votes"]) | mutated(VALID["rankings"]), ties=st.sampled_from(["keep", "refuse"]))
def test_any_rows_are_voted_pairs_or_refused_or_told(folder, rows, ties):
    path = folder / "pairs.jsonl"
    write(path, rows)
    source = VotesSource(kind="votes", paths=[str(path)], ties=ties, per_prompt=2, hold_out=1)
    found = outcome(lambda: list(voted_outcomes([path], source)), str(path))
    for _, one in found if not isinstance(found, BadInput) else ():
        if isinstance(one, RawPair):
            assert one.chosen.strip() != one.rejected.strip()
            columns = one.vote_columns()
            assert columns["votes_chosen"] >= columns["votes_rejected"]
            json.dumps([one.chosen, columns], ensure_ascii=False).encode()
        else:
            assert one.reason in {*REASONS, "few votes"}


@fuzzed(300, rows=mutated(VALID["votes"] * 2) | mutated(VALID["rankings"]))
def test_any_rows_have_an_agreement_or_are_told(folder, rows):
    path = folder / "agreement.jsonl"
    write(path, rows)
    found = outcome(lambda: agreement_of(read_votes([path]), resamples=20))
    if not isinstance(found, BadInput):
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


# --- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = [
    {"instruction": "Name a river.", "output": "The Elbe.", "generator": "someone", "dataset": "places", "index": 0},
    {"instruction": "Name a city.", "output": "", "generator": "someone", "index": 1},
    {"instruction": "Name a lake.", "output": "Zürich.", "generator": "someone", "index": 2},
]


def prompts_of(path):
    spec, _, _ = prompts_identity(FilePrompts(kind="file", path=str(path)), path.parent)
    return read_prompts(spec, path)


def assert_prompts(found) -> None:
    if isinstance(found, BadInput):
        return
    table = found.table
    assert table["index"].is_unique
    assert table["prompt_id"].is_unique
    assert all(message["content"].strip() for (message,) in table["prompt"])
    json.dumps(table.to_dict("records"), ensure_ascii=False).encode()
    assert (table["index"] >= 0).all()
    assert set(found.refused) <= set(REASONS)


@fuzzed(5_000, rows=mutated(PROMPTS))
def test_any_rows_are_prompts_or_told(folder, rows):
    path = folder / "prompts.json"
    path.write_text(json.dumps(rows))
    assert_prompts(outcome(lambda: prompts_of(path), str(path)))


@st.composite
def prompt_files(draw):
    kind = draw(st.sampled_from(["json", "json.gz", "jsonl"]))
    content = json.dumps(PROMPTS) if kind != "jsonl" else "".join(json.dumps(row) + "\n" for row in PROMPTS)
    content = draw(damaged(st.just(content.encode())))
    return kind, draw(damaged(st.just(gzip.compress(content, 1, mtime=0)))) if kind.endswith(".gz") else content


@fuzzed(3_000, case=prompt_files())
def test_any_bytes_are_prompts_or_told(folder, case):
    kind, content = case
    path = folder / f"bytes.{kind}"
    path.write_bytes(content)
    assert_prompts(outcome(lambda: prompts_of(path), str(path)))


# --- explicit examples ------------------------------------------------------------------------------------------------


def test_every_reader_has_a_valid_example_here(tmp_path):
    assert set(VALID) == set(VOTE_READERS)
    for name, rows in VALID.items():
        write(tmp_path / "a.jsonl", rows)
        assert_votes(read_votes([tmp_path / "a.jsonl"], name))


def one(name: str, row: int = -1, **changed: object) -> tuple[str, list[dict]]:
    rows = [dict(each) for each in VALID[name]]
    rows[row] |= changed
    return name, rows


TULU, SQUALITY = VALID["tulu_human_eval"][0], VALID["squality_human_eval"][0]
VOTES = {
    "a ranking of lists": (one("rankings", ranking=[[["x"]], "y", "z"]), r"line 2: 'ranking': \['x'\]"),
    "votes by nobody": (one("votes", votes={" ": "a"}), "line 3: 'annotator' is ' ', expected a name"),
    "a vote given twice": (one("votes", votes='{"ann": "a", "ann": "b"}'), "line 3: 'votes' is .*'ann' stands twice"),
    "votes nested deeply": (one("votes", votes="[" * 5000 + "]" * 5000), "line 3: 'votes' is .*nested more than 100"),
    "a name that is no Unicode": (one("votes", 0, annotator="a\ud800"), "line 1: 'annotator' is .*lone surrogate"),
    "a worker without a name": (one("ukp_convarg1", votes=["w"]), "line 3: 'votes' is .*list of objects"),
    "votes that are no list": (one("ukp_convarg1", votes=3), "line 3: 'votes' is 3, expected a list of objects"),
    "an unknown gold vote": (one("ukp_convarg1", gold="a3"), "line 3: 'gold' is 'a3'"),
    "two texts of one argument": (one("ukp_convarg1", 1, arg_id="p"), "line 2: 'arg_id' is 'p'"),
    "a vote that is missing": (one("pandalm", annotator2=None), "line 1: no 'annotator2'"),
    "three systems": (one("pandalm", cmp_key="x_y_z"), "line 1: 'cmp_key' is 'x_y_z'"),
    "an answer that is a list": (one("pandalm", response1=[1]), r"line 1: 'response1' is \[1\], expected a text"),
    "an answer that is missing": (one("tulu_human_eval", completions={"x": "So."}), "line 1: no 'y'"),
    "completions that are no object": (one("tulu_human_eval", completions=[1]), "line 1: 'completions' is"),
    "a system without rank": (
        one("squality_human_eval", reviewers=[{"worker": 1, "systems": {"x": {"overall_rank": 1}}}]),
        "line 1: no 'y'",
    ),
    "a rank that is NaN": (
        one("squality_human_eval", reviewers=[{"worker": 1, "systems": {k: {"overall_rank": "nan"} for k in "xy"}}]),
        "line 1: 'overall_rank' is 'nan', expected a number",
    ),
    "a rating that is NaN": (one("hanna", RE=float("nan")), "line 4: 'RE' is nan, expected a number"),
    "a rating that is a list": (one("hanna", RE=[1]), r"line 4: 'RE' is \[1\], expected a number"),
    "a slot that rates twice": (one("hanna", system="x"), "line 4: 'system' is 'x', which this slot rated before"),
    "a system that is no Unicode": (one("mt_bench_human", model_a="\ud800"), "row 1: the name .* has a lone surrogate"),
    "an item without output": (one("llmbar", 0, output_2=None), "line 1: no 'output_2'"),
    "two answers of one system": (one("qlora", 2, system="x"), "line 3: 'response' of 'x' to question 1 differs"),
    "a question without number": (one("qlora", 0, question_id=None), "line 1: no 'question_id'"),
}


@pytest.mark.parametrize("case", VOTES)
def test_bad_votes_are_told_in_one_line(tmp_path, case):
    (name, rows), expected = VOTES[case]
    write(tmp_path / "a.jsonl", rows)
    told(lambda: read_votes([tmp_path / "a.jsonl"], name), r"a\.jsonl: ", expected)


def test_a_text_that_is_no_unicode_is_refused_with_its_reason(tmp_path):
    write(tmp_path / "a.jsonl", [PAIR | {"prompt": "\ud800?", "votes": {"ann": "a", "bob": "b"}}])
    source = VotesSource(kind="votes", paths=["a.jsonl"], per_prompt=1, hold_out=1)
    ((_, refusal),) = voted_outcomes([tmp_path / "a.jsonl"], source)
    assert refusal.reason == "broken unicode"


PROMPT_CASES = {
    "a superscript as number": ({"index": "²"}, "row 2: 'index' is '²', expected a whole number from 0"),
    "a number of 400 digits": ({"index": "9" * 400}, "row 2: 'index' is .* expected a whole number"),
    "half a number": ({"index": 1.5}, r"row 2: 'index' is 1\.5, expected a whole number"),
    "a number that stands twice": ({"index": 0}, "row 2: 'index' is 0, as of another prompt before"),
    "an output that is no Unicode": ({"output": "\ud800"}, "row 2: 'output' has a lone surrogate at character 0"),
    "a model that is no Unicode": ({"generator": "\ud800"}, "row 2: 'generator' has a lone surrogate"),
}


@pytest.mark.parametrize("case", PROMPT_CASES)
def test_bad_prompts_are_told_in_one_line(tmp_path, case):
    changed, expected = PROMPT_CASES[case]
    (tmp_path / "a.json").write_text(json.dumps([PROMPTS[0], PROMPTS[1] | changed, PROMPTS[2]]))
    told(lambda: prompts_of(tmp_path / "a.json"), r"a\.json: ", expected)


def test_a_prompt_that_is_no_unicode_is_refused_and_counted(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([PROMPTS[0], PROMPTS[1] | {"instruction": "a\ud800"}]))
    found = prompts_of(tmp_path / "a.json")
    assert (len(found.table), found.refused) == (1, {"broken unicode": 1})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json.gz", gzip.compress(b"[]" * 500, mtime=0)[:12] + b"\xff" * 40, "cannot be read"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested more than 100 levels deep"),
        ("a.json", b'[{"instruction": "a", "instruction": "b"}]', "'instruction' stands twice"),
        ("a.json", b"", "not a JSON file"),
        ("a.json", b'{"instruction": "a"}', "dict, expected a list of objects"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    told(lambda: prompts_of(tmp_path / name), rf"{name}: ", expected)
