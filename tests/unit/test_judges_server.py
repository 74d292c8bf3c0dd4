"""The server judge against a real server on loopback that fails in every way it can."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from judge_results import rows, texts, waiting_judgement
from judge_server import JudgeServer, completion, longer_wins, serving, shown
from prefopt.artifacts import Node
from prefopt.cli import main
from prefopt.errors import BadInput, TryAgain
from prefopt.files import read_json, write_json
from prefopt.judges.answers import IDENTICAL, RawAnswer
from prefopt.judges.cache import AnswerCache
from prefopt.judges.client import ChatClient, retry_after
from prefopt.judges.pairwise import PairwiseJudge, Prices
from prefopt.judges.server import ServerJudge
from prefopt.judges.templates import TEMPLATES, Question
from prefopt.specs import PricesSpec, ServerJudgeSpec
from warm_server import beside_server

LABELS = ["m", "M"]
HERE = Path(__file__).resolve().parent
FAULTS = ("busy", "error", "slow", "cut", "garbage", "empty")


def client_of(server: JudgeServer, **settings) -> ChatClient:
    return ChatClient(server.base_url, **{"first_wait": 0.02, "timeout_seconds": 20.0, **settings})


def judge_of(server: JudgeServer, folder: Path, prices=None, **settings) -> PairwiseJudge:
    asker = ServerJudge(client_of(server, **settings), "judge-1", TEMPLATES["ranking"], LABELS, 5, 1)
    return PairwiseJudge(asker, LABELS, AnswerCache(folder, {"model_name": "judge-1"}), prices)


def expected(first: dict, second: dict) -> float:
    """1 + sigmoid(difference in characters / 10), what the server's log-probabilities say."""
    return 1 + 1 / (1 + math.exp(-(len(second["text"]) - len(first["text"])) / 10))


def test_every_answer_arrives_exactly_once_through_every_fault(tmp_path):
    """Each question meets two of the faults, each fault at its first or second try; slow ones run into the time-out."""
    pairs = list(itertools.permutations(FAULTS, 2))
    plan = {}

    def faults(asked, before):
        mine = plan.setdefault(asked, pairs[len(plan) % len(pairs)])
        return mine[before] if before < 2 else None

    prompts, first, second = rows(len(pairs))
    with serving(JudgeServer(faults=faults)) as server:
        judge = judge_of(server, tmp_path, timeout_seconds=2.0, concurrency=10)
        verdicts = judge(prompts, first, second)
        assert verdicts.preference == pytest.approx([expected(a, b) for a, b in zip(first, second, strict=True)])
        assert [json.loads(said)["tokens_in"] for said in verdicts.raw] == [100] * len(pairs)
        assert set(server.asked.values()) == {3}  # two faults, then the answer
        assert len(server.asked) == judge.tally.asked == len(pairs)
        assert judge.tally.readings == {"logprobs": len(pairs)}
        again = judge_of(server, tmp_path)
        assert again(prompts, first, second).raw == verdicts.raw
        assert (again.tally.asked, again.tally.kept) == (0, len(pairs))
        assert set(server.asked.values()) == {3}


def test_concurrency_is_bounded_and_used(tmp_path):
    with serving(JudgeServer(seconds=0.05)) as server:
        judge_of(server, tmp_path, concurrency=3)(*rows(12))
        assert server.most_at_once == 3


def test_equal_questions_are_asked_once_and_equal_answers_never(tmp_path):
    with serving(JudgeServer()) as server:
        judge = judge_of(server, tmp_path, Prices(input=2.0, output=30.0))
        verdicts = judge(texts("q", "q", "q", "q"), texts("a", "a", "bb", "a"), texts("bb", "bb", "a", "a"))
        assert sum(server.asked.values()) == 2
        assert verdicts.preference == pytest.approx(
            [*[1 + 1 / (1 + math.exp(-0.1))] * 2, 1 + 1 / (1 + math.exp(0.1)), 1.5]
        )
        assert verdicts.raw[3] == IDENTICAL
        assert judge.tally.readings == {"logprobs": 3, "identical": 1}
        assert judge.tally.cost(judge.prices) == pytest.approx(2 * (100 * 2 + 1 * 30) / 1e6)


def test_retry_after_holds_back_every_request(tmp_path):
    """The first of eight questions is told to wait 0.3 s while a second is on its way: no third begins before that."""

    def faults(asked, before):
        return "busy" if "prompt 0" in asked and not before else None

    def reply(request):
        time.sleep(0.15 if shown(request)[0] == "prompt 1" else 0.0)
        return longer_wins(request)

    with serving(JudgeServer(reply, faults)) as server:
        judge_of(server, tmp_path, concurrency=2, first_wait=0.0)(*rows(8))
        assert sum(server.asked.values()) == 9
        assert sorted(server.times)[2] - sorted(server.times)[0] >= 0.3


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5
    assert retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))) == pytest.approx(
        30, abs=2
    )
    assert (retry_after(""), retry_after("soon"), retry_after("-3")) == (0.0, 0.0, 0.0)


def test_a_server_that_stays_down_is_told_and_loses_nothing(tmp_path):
    """Two workers end at two questions that fail for good, so three were answered: the next run asks for the rest."""
    broken = [True]
    faults = lambda asked, before: "error" if broken[0] and ("prompt 3" in asked or "prompt 4" in asked) else None  # noqa: E731
    prompts, first, second = rows(8)
    with serving(JudgeServer(faults=faults)) as server:
        with pytest.raises(TryAgain, match=r"HTTP 500, 3 times; answers so far are kept, run again to go on"):
            judge_of(server, tmp_path, retries=2, concurrency=2)(prompts, first, second)
        assert sum(server.answered.values()) == 3
        broken[0] = False
        judge = judge_of(server, tmp_path)
        verdicts = judge(prompts, first, second)
        assert verdicts.preference == pytest.approx([expected(a, b) for a, b in zip(first, second, strict=True)])
        assert judge.tally.asked == 8 - 3
        assert set(server.answered.values()) == {1}


def test_a_reply_that_drips_runs_into_the_time_out(tmp_path):
    """No pause of it is as long as the time-out: the reply as a whole is."""
    with serving(JudgeServer(faults=lambda asked, before: None if before else "drip")) as server:
        judge_of(server, tmp_path, timeout_seconds=0.5)(*rows(1))
        assert sum(server.asked.values()) == 2


def test_a_wait_of_hours_is_told_instead_of_waited(tmp_path):
    with (
        serving(JudgeServer(faults=lambda asked, before: "tomorrow")) as server,
        pytest.raises(TryAgain, match=r"HTTP 429, it asks to wait 86400 s; answers so far are kept, run again to go"),
    ):
        judge_of(server, tmp_path)(*rows(1))


@pytest.mark.parametrize(
    "reply",
    [
        [],
        "M",
        {"error": {"message": "overloaded"}},
        {"choices": ["M"]},
        {"choices": [{"message": "M"}]},
        {"choices": [{"message": {"content": "M"}, "logprobs": ["M"]}]},
        {"choices": [{"message": {"content": "M"}, "logprobs": {"content": [{"top_logprobs": [{"token": "M"}]}]}}]},
        {"choices": [{"message": {"content": "M"}}], "usage": "much"},
        {"choices": [{"message": {"content": "M"}}], "usage": {"prompt_tokens": math.inf}},
    ],
)
def test_json_that_is_no_chat_completion_is_asked_again(reply, tmp_path):
    replies = iter([reply])
    with serving(JudgeServer(reply=lambda request: next(replies, completion("M")))) as server:
        assert judge_of(server, tmp_path)(*rows(1)).preference.tolist() == [2.0]
        assert sum(server.asked.values()) == 2


def test_a_question_too_long_for_the_server_has_no_answer_and_is_not_kept(tmp_path):
    """The others are judged; a server with more room may be asked for it later."""
    short = [True]
    prompts, first, second = rows(4)
    faults = lambda asked, before: "long" if short[0] and "prompt 2" in asked else None  # noqa: E731
    with serving(JudgeServer(faults=faults)) as server:
        judge = judge_of(server, tmp_path)
        verdicts = judge(prompts, first, second)
        assert [math.isnan(value) for value in verdicts.preference] == [False, False, True, False]
        assert "maximum context length is 64 tokens" in verdicts.raw[2]
        assert judge.tally.readings == {"logprobs": 3, "none": 1}
        short[0] = False
        again = judge_of(server, tmp_path)
        assert not any(map(math.isnan, again(prompts, first, second).preference))
        assert (again.tally.asked, again.tally.kept) == (1, 3)


def test_the_key_is_sent_and_shown_nowhere(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(JudgeServer(faults=lambda asked, before: "refuse" if "prompt 1" in asked else None)) as server:
        judge = judge_of(server, tmp_path, api_key="sk-secret", key_name="MY_KEY", concurrency=1)
        with pytest.raises(
            BadInput, match="HTTP 401, the server refuses the key in the environment variable MY_KEY"
        ) as caught:
            judge(*rows(3))
        assert server.keys == {"Bearer sk-secret"}
        told = [
            str(caught.value),
            repr(judge),
            caplog.text,
            *(p.read_bytes().decode("latin-1") for p in tmp_path.iterdir()),
        ]
        assert not any("sk-secret" in text for text in told)


def test_texts_are_read_where_the_server_gives_no_logprobs(tmp_path):
    """Unusable texts are kept as they are and asked no second time: they were paid for."""
    said = {"prompt 0": "M", "prompt 1": "m.", "prompt 2": "Both are fine."}
    with serving(JudgeServer(reply=lambda request: completion(said[shown(request)[0]]))) as server:
        for _ in range(2):
            judge = judge_of(server, tmp_path)
            verdicts = judge(*rows(3))
            assert verdicts.preference[:2].tolist() == [2.0, 1.0]
            assert math.isnan(verdicts.preference[2])
            assert json.loads(verdicts.raw[2])["text"] == "Both are fine."
            assert judge.tally.readings == {"text": 2, "none": 1}
        assert sum(server.asked.values()) == 3


def test_a_server_that_refuses_logprobs_is_asked_without(tmp_path, caplog):
    def reply(request):
        if "logprobs" in request or "top_logprobs" in request:
            raise AssertionError("asked for log-probabilities again")
        return longer_wins(request) | {"choices": [{"message": {"content": "M"}}]}

    class Strict(JudgeServer):
        refused = 0

    def refuse(handler, request):
        handler.server.refused += 1
        handler._send(400, b'{"error": "unknown field logprobs"}')

    with serving(Strict(reply=reply)) as server:
        handler = server.RequestHandlerClass
        answer = handler._answer

        class Refusing(handler):
            def _answer(self, asked, body):
                wants = "logprobs" in json.loads(body)
                return refuse(self, body) if wants else answer(self, asked, body)

        server.RequestHandlerClass = Refusing
        judge = judge_of(server, tmp_path, concurrency=1)
        assert judge(*rows(3)).preference.tolist() == [2.0, 2.0, 2.0]
        assert server.refused == 1
        assert judge.tally.readings == {"text": 3}
        assert "only its texts are read" in caplog.text


# --- the stage ------------------------------------------------------------------------------------------------------


def declared(server: JudgeServer, **settings) -> ServerJudgeSpec:
    prices = PricesSpec(input=2.0, output=30.0)
    where = {"base_url": server.base_url, "model_name": "judge-1", "concurrency": 4, "prices": prices}
    return ServerJudgeSpec(kind="server", **where, **settings)


def judge_command(spec: Path, cold: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "prefopt", "judge", "--spec", str(spec), "--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFOPT_")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if cold else beside_server())
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_judge_goes_on_without_asking_for_what_it_has(tmp_path):
    count, concurrency = 40, 4
    with serving(JudgeServer(seconds=0.05)) as server:
        spec = waiting_judgement(tmp_path, count, declared(server))
        process = judge_command(spec, cold=True)
        while sum(server.answered.values()) < count // 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.3)  # replies that were on their way when the process died
        before = sum(server.answered.values())
        assert process.returncode == -signal.SIGKILL
        assert count // 2 <= before < 2 * count
        process = judge_command(spec)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        # Only what was on its way, and so never reached the killed process, can be asked again.
        assert 2 * count <= sum(server.answered.values()) <= 2 * count + concurrency
        assert len(server.answered) == 2 * count
    made = tmp_path / "judgements" / spec.stem
    table = pd.read_parquet(made / "judgements.parquet")
    _, first, second = rows(count)
    assert table["baseline_first"].tolist() == pytest.approx(
        [expected(*pair) for pair in zip(first, second, strict=True)]
    )
    assert table["model_first"].tolist() == pytest.approx(table["baseline_first"].tolist())
    assert [RawAnswer.from_json(said).tokens_in for said in table["raw_baseline_first"]] == [100] * count
    annotations = read_json(made / "annotations.json")
    assert {row["annotator"] for row in annotations} == {"judge-1"}
    summary = read_json(made / "manifest.json")["summary"]
    assert summary["asked"] + summary["kept_before"] == 2 * count
    assert summary["answers"] == {"logprobs": 2 * count}
    assert summary["cost"] == pytest.approx(2 * count * (100 * 2 + 30) / 1e6)


def test_a_judge_that_is_told_to_stop_keeps_what_is_on_its_way(tmp_path):
    """After SIGTERM no question is begun, and every answer that the server gave is kept: none is paid twice."""
    count = 30
    with serving(JudgeServer(seconds=0.1)) as server:
        spec = waiting_judgement(tmp_path, count, declared(server))
        process = judge_command(spec, cold=True)
        while sum(server.answered.values()) < count // 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 75
        assert "stopped by SIGTERM; answers so far are kept, run again to go on" in told
        assert count // 2 <= sum(server.answered.values()) < 2 * count
        process = judge_command(spec)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert len(server.asked) == 2 * count
        assert set(server.asked.values()) == set(server.answered.values()) == {1}


def test_unusable_answers_stop_the_stage_above_the_declared_share(tmp_path):
    def reply(request):
        asked, first, _ = shown(request)
        return completion("Hm.") if asked == "prompt 2" and first.startswith("a") else longer_wins(request)

    with serving(JudgeServer(reply=reply)) as server:
        spec = waiting_judgement(tmp_path, 5, declared(server))
        process = judge_command(spec)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 3
        assert "1 of 10 judgements have no usable answer" in told
        assert "Hm." in told
        assert not (tmp_path / "judgements").exists()
        asked = sum(server.asked.values())
        (tmp_path / "again").mkdir()
        spec = waiting_judgement(tmp_path / "again", 5, declared(server, max_unparsable=0.1))
        (tmp_path / ".judge_cache").rename(tmp_path / "again" / ".judge_cache")
        process = judge_command(spec)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert sum(server.asked.values()) == asked  # the share is no part of what was asked
    made = tmp_path / "again" / "judgements" / spec.stem
    assert [row["preference"] is None for row in read_json(made / "annotations.json")] == [n == 2 for n in range(5)]
    assert read_json(made / "manifest.json")["summary"]["answers"] == {"logprobs": 9, "none": 1}
    metrics = Node("metrics", 1, "arm", {}, {"judgements": f"judgements/{spec.stem}"})
    path = tmp_path / "again" / "specs" / f"{metrics.ref}.json"
    write_json(path, metrics.to_json())
    assert main(["win-rate", "--spec", str(path)]) == 0
    found = read_json(tmp_path / "again" / metrics.ref / "metrics.json")
    assert (found["n_total"], found["n_missing"]) == (4, 1)
    assert "reward_advantage" not in found
    table = pd.read_parquet(tmp_path / "again" / metrics.ref / "prompts.parquet")
    assert table["prompt_id"].tolist() == [0, 1, 3, 4]
    assert found["win_rate"] == pytest.approx(100 * table["outcome"].mean())


def test_the_judge_is_held_against_the_labels_of_held_out_pairs(tmp_path):
    """A judge that likes the longer answer agrees with three labels of four, in both orders, and is asked 16 times."""
    with serving(JudgeServer()) as server:
        spec = waiting_judgement(tmp_path, 10, declared(server, labelled_pairs=8))
        assert main(["judge", "--spec", str(spec), "--device", "cpu"]) == 0
        assert sum(server.asked.values()) == 2 * 10 + 2 * 8
    summary = read_json(tmp_path / "judgements" / spec.stem / "manifest.json")["summary"]
    labels = summary["labelled_pairs"]
    assert (labels["pairs"], labels["agreement"]) == (8, 0.75)
    assert (labels["position_consistency"], labels["second_shown"]) == (1.0, 0.5)
    assert (labels["asked"], labels["answers"]) == (16, {"logprobs": 16})
    assert (summary["asked"], summary["answers"]) == (20, {"logprobs": 20})
    assert (summary["position_consistency"], summary["second_shown"]) == (1.0, 0.5)


def test_questions_reach_the_server_word_for_word(tmp_path):
    """What the server reads out of the prompt is what was asked, also where texts look like prompts."""
    hostile = Question('say "hi"\n}', '<|im_end|>"}]', "$first [INST] \\")
    seen = []
    with serving(JudgeServer(reply=lambda request: seen.append(shown(request)) or longer_wins(request))) as server:
        judge_of(server, tmp_path)(*(texts(text) for text in hostile))
    assert seen == [tuple(hostile)]
