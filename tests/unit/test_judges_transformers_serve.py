"""The server judge against `transformers serve` with a tiny model made here, directly and through failures.

The command comes from the environment variable TRANSFORMERS_CLI, else from beside this Python; it needs the extra
`transformers[serving]`, which may be in an environment of its own: with that of envs/judge-servers.txt it is
bin/transformers there. Skipped, with the reason, where it cannot serve.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest

from judge_models import always, folder_of, judge_tokenizer
from judge_processes import LABELS, judge_at, lacking, served
from judge_results import rows
from judge_server import JudgeServer, serving
from prefopt.errors import BadInput
from prefopt.judges.cache import AnswerCache
from prefopt.judges.causal import CausalJudge
from prefopt.judges.pairwise import PairwiseJudge
from prefopt.judges.templates import TEMPLATES
from prefopt.judging import judge_both_orders
from prefopt.models import load_causal_lm, load_tokenizer

COMMAND = Path(os.environ.get("TRANSFORMERS_CLI", Path(sys.executable).with_name("transformers")))
REASON = lacking(COMMAND.with_name("python"), "fastapi, openai, transformers, uvicorn")
pytestmark = pytest.mark.skipif(
    REASON is not None, reason=f"transformers serve: {REASON}; set TRANSFORMERS_CLI to one with transformers[serving]"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Base URL of the server, and the folder of the model that it serves: one that always answers M."""
    tokenizer = judge_tokenizer()
    folder = folder_of(always(tokenizer, "M"), tokenizer, tmp_path_factory.mktemp("judge") / "model")
    words = [COMMAND, "serve", folder, "--host", "127.0.0.1", "--device", "cpu", "--port"]
    with served(lambda port: [*words, port], "/health", folder.parent / "log") as address:
        yield f"{address}/v1", folder


def test_answers_come_as_texts_and_agree_with_the_model_itself(server, tmp_path):
    base_url, folder = server
    prompts, baseline, model = rows(3)
    judge = judge_at(base_url, str(folder), tmp_path)
    judged = judge_both_orders(judge, prompts, model, baseline)
    assert judged.baseline_first.tolist() == [2, 2, 2]
    assert judged.model_first.tolist() == [1, 1, 1]
    assert judge.tally.readings == {"text": 6}  # this server gives no log-probabilities
    loaded, tokenizer = load_causal_lm(folder, device="cpu"), load_tokenizer(folder)
    asker = CausalJudge(loaded, tokenizer, TEMPLATES["ranking"], LABELS, 6)
    near = PairwiseJudge(asker, LABELS, AnswerCache(tmp_path, {"near": True}))
    assert (judge_both_orders(near, prompts, model, baseline).baseline_first > 1.5).all()
    assert judge.tally.tokens_in == near.tally.tokens_in  # both apply the same chat template, once


def test_failures_on_the_way_lose_and_repeat_nothing(server, tmp_path):
    base_url, folder = server
    plan = ("busy", "cut", "garbage", "error", None, None)

    def faults(asked, before):
        return plan[zlib.crc32(asked.encode()) % len(plan)] if not before else None

    with serving(JudgeServer(upstream=base_url, faults=faults)) as proxy:
        judge = judge_at(proxy.base_url, str(folder), tmp_path)
        prompts, baseline, model = rows(6)
        judged = judge_both_orders(judge, prompts, model, baseline)
        assert judged.baseline_first.tolist() == [2] * 6
        assert judged.model_first.tolist() == [1] * 6
        assert set(proxy.answered.values()) == {1}
        assert len(proxy.answered) == judge.tally.asked == 12
        assert sum(proxy.asked.values()) > 12  # some did fail


def test_a_model_that_is_not_served_is_told(server, tmp_path):
    with pytest.raises(BadInput, match=r"HTTP 400, the server refuses the request: .*pinned"):
        judge_at(server[0], "another/model", tmp_path)(*rows(1))
