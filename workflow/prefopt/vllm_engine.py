"""Drawing with vLLM, an optional extra for GPUs: other random numbers and other float noise than ``decoding``.

vLLM could not be installed where this was written, so that only the request that we make and the reading of its
answer are tested, not vLLM itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.generation import DrawBatch, Ids
    from prefopt.specs import SamplingSpec


@contextmanager
def vllm_drawing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSpec, ends: list[int]
) -> Iterator[DrawBatch]:
    """vLLM on the model's weights as they are now; row i of a batch with seed s draws from the seed s + i.

    Raises BadInput where vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise BadInput(
            f"sampling.engine 'vllm': vLLM cannot be imported ({error}); install it with pip install 'prefopt[vllm]', "
            "or remove 'engine' to sample with transformers"
        ) from error
    from prefopt.models import save_model

    with tempfile.TemporaryDirectory(prefix="prefopt-vllm-") as folder:
        save_model(model, tokenizer, folder)
        engine = LLM(model=folder, dtype="float32", skip_tokenizer_init=True)

        def draw(prompts: Ids, seed: int) -> list[list[int]]:
            asked = [{"prompt_token_ids": [*prompt]} for prompt in prompts]
            chosen = [SamplingParams(**request(sampling, ends, seed + row)) for row in range(len(prompts))]
            outputs = engine.generate(asked, chosen, use_tqdm=False)
            return [[*output.outputs[0].token_ids] for output in outputs]

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
