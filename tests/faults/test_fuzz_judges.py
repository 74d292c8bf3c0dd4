"""Any reply of a judge is a preference in its range or none; any kept answer is read whole or told to be damaged."""

from __future__ import annotations

import gzip
import json
import math
import sqlite3
import string

import pytest
from fuzzing import damaged, fuzzed, mutated, outcome, texts, told, values
from hypothesis import strategies as st

from judge_server import JudgeServer, completion, serving
from prefopt.errors import BadInput, TryAgain
from prefopt.judges.answers import RawAnswer, preference_of
from prefopt.judges.cache import AnswerCache
from prefopt.judges.client import ChatClient, retry_after
from prefopt.judges.server import raw_answer
from prefopt.judges.templates import CONTROL, TEMPLATES, Question, quoted

LABELS = ("m", "M")
REPLY = completion("M", {"m": -1.0, "M": -0.5, " M": -3.0})
ANSWER = RawAnswer("M", {"m": -1.0, "M": -0.5}, 100, 1)
NO_COMPLETION = (AttributeError, LookupError, TypeError, ValueError, OverflowError)  # what the client takes for a fault


def assert_answer(answer: RawAnswer) -> None:
    preference, reading = preference_of(answer, LABELS)
    assert math.isnan(preference) == (reading == "none")
    assert math.isnan(preference) or 1 <= preference <= 2
    line = answer.to_json()
    line.encode()
    kept = RawAnswer.from_json(line)
    assert repr(kept) == repr(answer)  # NaN is not equal to itself, and says the same
    assert min(kept.tokens_in, kept.tokens_out) >= 0


@fuzzed(6_000, reply=mutated(REPLY))
def test_any_reply_is_a_preference_or_none_or_no_completion(reply):
    try:
        answer = raw_answer(reply)
    except NO_COMPLETION:
        return
    assert_answer(answer)


candidates = st.dictionaries(
    st.sampled_from(["m", "M", " m", "M\n", "x"]) | texts,
    st.sampled_from([0.0, -1.0, 5.0, -1e308, 1e308, math.nan, math.inf, -math.inf]) | st.floats(),
    max_size=4,
)


@fuzzed(4_000, said=st.sampled_from(["m", "**M**", "m M", "", "model m"]) | texts, top=candidates | st.none())
def test_any_log_probabilities_are_a_preference_or_none(said, top):
    preference, reading = preference_of(RawAnswer(said, top), LABELS)
    assert math.isnan(preference) if reading == "none" else 1 <= preference <= 2


@fuzzed(
    3_000,
    line=damaged(st.just(ANSWER.to_json().encode())) | mutated(vars(ANSWER)).map(json.dumps) | values.map(json.dumps),
)
def test_any_line_is_an_answer_or_no_answer(line):
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    try:
        answer = RawAnswer.from_json(text)
    except ValueError:
        return
    assert math.isnan(preference_of(answer, LABELS)[0]) or 1 <= preference_of(answer, LABELS)[0] <= 2


@fuzzed(4_000, question=st.builds(Question, texts, texts, texts), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_text_stays_between_its_quotes(question, name):
    """What is quoted is one JSON string that gives the text back, and it spells nothing that a chat format uses."""
    *_, turn = TEMPLATES[name].messages(question, LABELS)
    asked = turn["content"]
    shown = json.loads(asked[asked.index("{\n") : asked.rindex("\n}") + 2])
    assert shown["request"] == question.instruction
    assert [one["answer"] for one in shown["answers"]] == [question.first, question.second]
    assert [one["model"] for one in shown["answers"]] == list(LABELS)
    outline = string.Template(TEMPLATES[name].user).substitute(
        dict.fromkeys(question._asdict(), '""'), label_1="m", label_2="M"
    )
    assert len(CONTROL.findall(asked)) == len(CONTROL.findall(outline)) == 0
    assert asked.count("\n") == outline.count("\n")
    assert all(json.loads(quoted(text)) == text for text in question)


def cache_bytes(folder) -> bytes:
    cache = AnswerCache(folder, {"name": "j"})
    for number in range(3):
        cache.keep(f"k{number}", ANSWER)
    cache.close()
    return cache._path.read_bytes()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, cache_bytes(folder)


@fuzzed(1_000, cuts=st.lists(st.tuples(st.integers(0, 12_000), st.binary(max_size=40)), min_size=1, max_size=4))
def test_any_bytes_of_a_cache_are_its_answers_or_told(kept, cuts):
    folder, content = kept
    for at, piece in cuts:
        content = content[: at % len(content)] + piece + content[at % len(content) + len(piece) :]
    (path,) = (file for file in folder.iterdir() if file.suffix == ".sqlite")
    path.write_bytes(content)
    for journal in folder.glob("*-journal"):
        journal.unlink()

    def answers():
        cache = AnswerCache(folder, {"name": "j"})
        try:
            return cache.kept(["k0", "k1", "k2"])
        finally:
            cache.close()

    try:
        found = outcome(answers, str(path))
    except TryAgain as error:
        assert str(path) in str(error)  # noqa: PT017 - both failures are right here
        return
    if not isinstance(found, BadInput):
        assert all(
            math.isnan(preference_of(a, LABELS)[0]) or 1 <= preference_of(a, LABELS)[0] <= 2 for a in found.values()
        )


# --- explicit examples ------------------------------------------------------------------------------------------------


def top(**logprobs: float) -> RawAnswer:
    return RawAnswer("x", logprobs)


@pytest.mark.parametrize("first", [math.inf, math.nan, -math.inf])
def test_a_log_probability_that_is_none_says_nothing(first):
    assert preference_of(top(m=first), LABELS)[1] == "none"
    assert preference_of(top(m=first, M=-1.0), LABELS) == (2.0, "logprobs")


def test_half_of_a_character_can_be_kept(tmp_path):
    answer = raw_answer(json.loads(json.dumps(completion("M\ud800", {"M\udfff": -1.0}))))
    cache = AnswerCache(tmp_path, {"name": "j"})
    cache.keep("k", answer)
    assert cache.kept(["k"])["k"] == answer
    assert (answer.text, list(answer.top_logprobs)) == ("M?", ["M?"])


def test_tokens_are_not_negative():
    assert raw_answer(REPLY | {"usage": {"prompt_tokens": -5, "completion_tokens": None}}).tokens_in == 0


def cache_file(tmp_path):
    cache_bytes(tmp_path)
    (path,) = tmp_path.glob("*.sqlite")
    return path


@pytest.mark.parametrize(
    "content", [b"no database at all, but a text", b"\0" * 5000, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_file_that_is_no_cache(tmp_path, content):
    cache_file(tmp_path).write_bytes(content)
    told(lambda: AnswerCache(tmp_path, {"name": "j"}), r"\.sqlite: not a file of a judge's answers .*move it away")


def test_a_cache_whose_schema_is_damaged(tmp_path):
    path = cache_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE answers", b"CREATE TABL\x80 answers"))
    told(lambda: AnswerCache(tmp_path, {"name": "j"}), r"\.sqlite: not a file of a judge's answers .*move it away")


def test_a_folder_in_place_of_a_cache(tmp_path):
    path = cache_file(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(TryAgain, match=r"\.sqlite: the judge's answers cannot be kept there"):
        AnswerCache(tmp_path, {"name": "j"})


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "7", '{"texts": "M"}', ANSWER.to_json().replace("100", "-1"), ANSWER.to_json().replace("100", '"1"'),
        ANSWER.to_json().replace('"M": -0.5', '"M": "low"'), ANSWER.to_json().replace("{", '{"text": "m", ', 1),
    ],
)  # fmt: skip
def test_a_damaged_answer_is_told(tmp_path, line):
    path = cache_file(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET answer = ? WHERE question = 'k1'", (line,))
    connection.close()
    cache = AnswerCache(tmp_path, {"name": "j"})
    told(lambda: cache.kept(["k0", "k1"]), r"\.sqlite: a damaged answer, .*move it away")


BODIES = {
    "nothing": b"",
    "nested deeply": b"[" * 200_000,
    "a list": b"[]",
    "no UTF-8": b'{"choices": "\xff"}',
    "a key twice": json.dumps(REPLY).replace('"text"', '"x"').replace("{", '{"choices": [], ', 1).encode(),
    "infinitely many tokens": json.dumps(REPLY | {"usage": {"prompt_tokens": math.inf}}).encode(),
    "5000 digits": b'{"choices": [{"message": {"content": ' + b"9" * 5000 + b"}}]}",
    "gzip that is none": b"no gzip",
    "gzip that is cut": gzip.compress(json.dumps(REPLY).encode() * 50)[:-20],
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_completion_is_asked_again_and_then_told(case):
    """Every one is tried three times; the run ends with the advice to go on later, not with a traceback."""

    server = JudgeServer(faults=lambda asked, before: "body")
    headers = {"content_encoding": "gzip"} if case.startswith("gzip") else {}

    class Handler(server.RequestHandlerClass):
        def _fault_body(self):
            self._send(200, BODIES[case], **headers)

    server.RequestHandlerClass = Handler
    with serving(server):
        client = ChatClient(server.base_url, retries=2, first_wait=0.001)
        with pytest.raises(TryAgain, match="3 times; answers so far are kept"):
            client.ask_all([{"messages": []}], raw_answer, RawAnswer, lambda number, reply: None)
    assert server.asked.total() == 3


@pytest.mark.parametrize(
    "header", ["nan", "-5", "1e999", "soon", "\0", "٣", "99999999999999999999", "Tue, 99 Foo 2024"]
)
def test_any_wait_that_a_server_asks_for_is_a_number_of_seconds_or_none(header):
    assert retry_after(header) >= 0
