"""The server judge against llama.cpp's server, which gives log-probabilities: a second opinion on ours.

The environment variable LLAMA_CPP_PYTHON names an interpreter that has `llama-cpp-python[server]` and `gguf`. Skipped,
with the reason, where there is none.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from judge_models import folder_of, judge_tokenizer, torn
from judge_processes import LABELS, judge_at, lacking, served
from judge_results import rows
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


def test_log_probabilities_agree_with_our_own_judge_of_the_same_weights(tmp_path):
    tokenizer = judge_tokenizer()
    model = torn(tokenizer, LABELS)
    folder = folder_of(model, tokenizer, tmp_path / "model")
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(folder / "weights.npz", **weights)
    file = tmp_path / "judge.gguf"
    subprocess.run([PYTHON, HERE / "gguf_of_folder.py", folder, file], check=True)
    prompts, baseline, answers = rows(6)
    words = [PYTHON, "-m", "llama_cpp.server", "--model", file, "--model_alias", "judge", "--host", "127.0.0.1"]
    words += ["--n_ctx", "2048", "--n_gpu_layers", "0", "--logits_all", "true", "--n_threads", "1", "--port"]
    with served(lambda port: [*words, port], "/v1/models", tmp_path / "log") as address:
        far = judge_at(f"{address}/v1", "judge", tmp_path)
        theirs = judge_both_orders(far, prompts, answers, baseline)
    asker = CausalJudge(model, tokenizer, TEMPLATES["ranking"], LABELS, 4)
    near = PairwiseJudge(asker, LABELS, AnswerCache(tmp_path, {"near": True}))
    ours = judge_both_orders(near, prompts, answers, baseline)
    assert far.tally.readings == near.tally.readings == {"logprobs": 12}
    assert far.tally.tokens_in == near.tally.tokens_in
    assert np.ptp(ours.baseline_first) > 0.02  # the answers matter to this model
    np.testing.assert_allclose(theirs.baseline_first, ours.baseline_first, atol=2e-3)
    np.testing.assert_allclose(theirs.model_first, ours.model_first, atol=2e-3)
