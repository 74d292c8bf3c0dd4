"""Drawing with vLLM in an environment of its own: other random numbers and other float noise than ``decoding``.

vLLM and this package pin different releases of transformers, so that they cannot share an environment: the interpreter
of the other one (envs/vllm.txt) is named by PREFOPT_VLLM_PYTHON. vLLM needs a GPU. Where this was written there was
none with vLLM on it: what we ask and how we read the answer is tested with a stand-in, not vLLM itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.generation import DrawBatch, Ids
    from prefopt.specs import SamplingSpec

PYTHON = "PREFOPT_VLLM_PYTHON"

_WORKER = Path(__file__).with_name("vllm_worker.py")


@contextmanager
def vllm_drawing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSpec, ends: list[int]
) -> Iterator[DrawBatch]:
    """vLLM on the model's weights as they are now; row i of a batch with seed s draws from the seed s + i.

    Raises BadInput where PREFOPT_VLLM_PYTHON names no interpreter, and where vLLM ends before it has answered.
    """
    from prefopt.models import save_model

    python = _python()
    with tempfile.TemporaryDirectory(prefix="prefopt-vllm-") as folder, _off_the_gpu(model):
        save_model(model, tokenizer, folder)
        with _worker(python, folder) as ask:

            def draw(prompts: Ids, seeds: Sequence[int]) -> list[list[list[int]]]:
                every = [[*prompt] for prompt in prompts]
                wanted = [[request(sampling, ends, seed + row) for row in range(len(every))] for seed in seeds]
                return [ask({"prompts": every, "sampling": one}) for one in wanted]

            yield draw


def request(sampling: SamplingSpec, ends: list[int], seed: int) -> dict[str, Any]:
    """Keywords of vLLM's SamplingParams: pure sampling, no penalties, the ends that we know and no others."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "seed": seed % 2**63,
        "stop_token_ids": ends,
        "ignore_eos": True,  # the end tokens are all in stop_token_ids
        "detokenize": False,
    }


def _python() -> str:
    named = os.environ.get(PYTHON)
    if named is None or not Path(named).is_file():
        found = "is not set" if named is None else f"is '{named}', which is no file"
        raise BadInput(
            f"sampling.engine 'vllm': {PYTHON} {found}; install envs/vllm.txt into an environment of its own and let "
            "it name that environment's python, or remove 'engine' to sample with transformers"
        )
    return named


@contextmanager
def _worker(python: str, folder: str) -> Iterator[Any]:
    """A process with vLLM on the model in ``folder``; answers come over a pipe of their own, since vLLM talks a lot."""
    reading, writing = os.pipe()
    command = [python, str(_WORKER), folder, str(writing)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, pass_fds=[writing])
    os.close(writing)

    def ask(question: dict[str, Any]) -> list[list[int]]:
        try:
            print(json.dumps(question), file=process.stdin, flush=True)
        except BrokenPipeError:
            line = ""
        else:
            line = answers.readline()
        if not line:
            raise BadInput(f"vLLM ended with exit status {process.wait()} before it answered; its messages are above")
        return json.loads(line)

    with os.fdopen(reading) as answers:
        try:
            yield ask
        finally:
            process.kill()
            process.wait()


@contextmanager
def _off_the_gpu(model: PreTrainedModel) -> Iterator[None]:
    """The model in main memory: vLLM takes nearly all of a GPU's for itself."""
    device = model.device
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)
