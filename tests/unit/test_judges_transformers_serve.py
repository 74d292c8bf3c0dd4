"""The server judge against `transformers serve` with a tiny model made here, directly and through failures.

The command comes from the environment variable TRANSFORMERS_CLI, else from beside this Python; it needs the extra
`transformers[serving]`, which may be in an environment of its own. Skipped, with the reason, where it cannot serve.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest

from judge_models import always, folder_of, judge_tokenizer
from judge_server import JudgeServer, serving
from prefopt.errors import BadInput
from prefopt.judges.cache import AnswerCache
from prefopt.judges.causal import CausalJudge
from prefopt.judges.client import ChatClient
from prefopt.judges.pairwise import PairwiseJudge
from prefopt.judges.server import ServerJudge
from prefopt.judges.templates import TEMPLATES
from prefopt.judging import judge_both_orders
from prefopt.models import load_causal_lm, load_tokenizer

LABELS = ["m", "M"]
TEMPLATE = TEMPLATES["ranking"]
COMMAND = Path(os.environ.get("TRANSFORMERS_CLI", Path(sys.executable).with_name("transformers")))
START_SECONDS = 300


def unable() -> str | None:
    """Why the command cannot serve, if so."""
    if not COMMAND.is_file():
        return f"no command {COMMAND.name}"
    check = "import fastapi, openai, uvicorn"
    done = subprocess.run([COMMAND.with_name("python"), "-c", check], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


REASON = unable()
pytestmark = pytest.mark.skipif(
    REASON is not None, reason=f"transformers serve: {REASON}; set TRANSFORMERS_CLI to one with transformers[serving]"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Base URL of the server, and the folder of the model that it serves: one that always answers M."""
    tokenizer = judge_tokenizer()
    folder = folder_of(always(tokenizer, "M"), tokenizer, tmp_path_factory.mktemp("judge") / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [COMMAND, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not start: {log.read_text()[-2000:]}")


def judge_of(base_url: str, name: str, cache: Path) -> PairwiseJudge:
    client = ChatClient(base_url, first_wait=0.05, timeout_seconds=120.0, concurrency=4)
    return PairwiseJudge(ServerJudge(client, name, TEMPLATE, LABELS, 5, 1), LABELS, AnswerCache(cache, {"m": name}))


def sides(count: int) -> list[list[dict[str, str]]]:
    return [[{"text": f"{side} {n}"} for n in range(count)] for side in ("prompt", "mine", "base")]


def test_answers_come_as_texts_and_agree_with_the_model_itself(served, tmp_path):
    base_url, folder = served
    judge = judge_of(base_url, str(folder), tmp_path)
    judged = judge_both_orders(judge, *sides(3))
    assert judged.baseline_first.tolist() == [2, 2, 2]
    assert judged.model_first.tolist() == [1, 1, 1]
    assert judge.tally.readings == {"text": 6}  # this server gives no log-probabilities
    model, tokenizer = load_causal_lm(folder, device="cpu"), load_tokenizer(folder)
    near = PairwiseJudge(CausalJudge(model, tokenizer, TEMPLATE, LABELS, 6), LABELS, AnswerCache(tmp_path, {"m": 0}))
    assert ((judge_both_orders(near, *sides(3)).baseline_first > 1.5) == (judged.baseline_first > 1.5)).all()
    assert judge.tally.tokens_in == near.tally.tokens_in  # the chat template was applied once, and is the same one


def test_failures_on_the_way_lose_and_repeat_nothing(served, tmp_path):
    base_url, folder = served
    plan = ("busy", "cut", "garbage", "error", None, None)

    def faults(asked, before):
        return plan[zlib.crc32(asked.encode()) % len(plan)] if not before else None

    with serving(JudgeServer(upstream=base_url, faults=faults)) as proxy:
        judge = judge_of(proxy.base_url, str(folder), tmp_path)
        judged = judge_both_orders(judge, *sides(6))
        assert judged.baseline_first.tolist() == [2] * 6
        assert judged.model_first.tolist() == [1] * 6
        assert set(proxy.answered.values()) == {1}
        assert len(proxy.answered) == judge.tally.asked == 12


def test_a_model_that_is_not_served_is_told(served, tmp_path):
    base_url, _ = served
    with pytest.raises(BadInput, match=r"HTTP 400, the server refuses the request: .*pinned"):
        judge_of(base_url, "another/model", tmp_path)(*sides(1))
