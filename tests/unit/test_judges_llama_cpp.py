"""The server judge against llama.cpp's server, which gives log-probabilities: a second opinion on ours.

The environment variable LLAMA_CPP_PYTHON names an interpreter that has `llama-cpp-python[server]` and `gguf`; with the
environment of envs/judge-servers.txt it is bin/python there. Skipped, with the reason, where there is none.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from judge_models import folder_of, judge_tokenizer, torn
from judge_processes import LABELS, judge_at, lacking, served
from judge_results import rows, texts
from judge_server import JudgeServer, serving
from prefopt.judges.cache import AnswerCache
from prefopt.judges.causal import CausalJudge
from prefopt.judges.pairwise import PairwiseJudge
from prefopt.judges.templates import TEMPLATES
from prefopt.judging import judge_both_orders

HERE = Path(__file__).resolve().parent
PYTHON = Path(os.environ["LLAMA_CPP_PYTHON"]) if "LLAMA_CPP_PYTHON" in os.environ else None
REASON = lacking(PYTHON, "gguf, llama_cpp.server.app")
pytestmark = pytest.mark.skipif(
    REASON is not None, reason=f"llama.cpp: {REASON}; set LLAMA_CPP_PYTHON to one with llama-cpp-python[server], gguf"
)


CONTEXT = 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Base URL of the server, and the model that it serves, whose answer depends on the prompt."""
    tokenizer = judge_tokenizer()
    model = torn(tokenizer, LABELS)
    folder = folder_of(model, tokenizer, tmp_path_factory.mktemp("judge") / "model")
    np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    file = folder.parent / "judge.gguf"
    subprocess.run([PYTHON, HERE / "gguf_of_folder.py", folder, file], check=True)
    words = [PYTHON, "-m", "llama_cpp.server", "--model", file, "--model_alias", "judge", "--host", "127.0.0.1"]
    words += ["--n_ctx", CONTEXT, "--n_gpu_layers", 0, "--n_threads", 1, "--port"]
    with served(lambda port: [*words, port], "/v1/models", folder.parent / "log") as address:
        yield f"{address}/v1", CausalJudge(model, tokenizer, TEMPLATES["ranking"], LABELS, 4)


def test_log_probabilities_agree_with_our_own_judge_of_the_same_weights(server, tmp_path):
    base_url, asker = server
    prompts, baseline, answers = rows(6)
    far = judge_at(base_url, "judge", tmp_path)
    theirs = judge_both_orders(far, prompts, answers, baseline)
    near = PairwiseJudge(asker, LABELS, AnswerCache(tmp_path, {"near": True}))
    ours = judge_both_orders(near, prompts, answers, baseline)
    assert far.tally.readings == near.tally.readings == {"logprobs": 12}
    assert far.tally.tokens_in == near.tally.tokens_in  # both apply the same chat template, once
    assert np.ptp(ours.baseline_first) > 0.02  # the answers matter to this model
    np.testing.assert_allclose(theirs.baseline_first, ours.baseline_first, atol=2e-3)
    np.testing.assert_allclose(theirs.model_first, ours.model_first, atol=2e-3)


def test_failures_on_the_way_change_no_answer(server, tmp_path):
    plan = ("busy", "cut", "garbage", "error", None, None)

    def faults(asked, before):
        return plan[zlib.crc32(asked.encode()) % len(plan)] if not before else None

    sides = rows(6)
    with serving(JudgeServer(upstream=server[0], faults=faults)) as proxy:
        judged = judge_at(proxy.base_url, "judge", tmp_path / "proxy")(*sides)
        assert set(proxy.answered.values()) == {1}
        assert sum(proxy.asked.values()) > len(proxy.asked) == 6  # some did fail
    straight = judge_at(server[0], "judge", tmp_path / "straight")(*sides)
    np.testing.assert_allclose(judged.preference, straight.preference, atol=1e-6)


def test_a_question_beyond_the_context_of_the_server_has_no_answer(server, tmp_path):
    judge = judge_at(server[0], "judge", tmp_path)
    verdicts = judge(texts("a", "b"), texts("c", "hello " * CONTEXT), texts("d", "e"))
    assert 1 < verdicts.preference[0] < 2
    assert np.isnan(verdicts.preference[1])
    assert f"maximum context length is {CONTEXT} tokens" in verdicts.raw[1]
