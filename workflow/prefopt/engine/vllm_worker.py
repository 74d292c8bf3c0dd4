"""Runs under the interpreter of vLLM's environment, which has nothing of this package: a JSON line in, one out."""

from __future__ import annotations

import json
import os
import sys


def main(folder: str, answers: int) -> None:
    """Answer every line of stdin, prompts and keywords of SamplingParams, with token ids on the pipe ``answers``."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, dtype="float32", skip_tokenizer_init=True, generation_config="vllm")
    with os.fdopen(answers, "w") as stream:
        for line in sys.stdin:
            asked = json.loads(line)
            prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
            chosen = [SamplingParams(**keywords) for keywords in asked["sampling"]]
            outputs = engine.generate(prompts, chosen, use_tqdm=False)
            print(json.dumps([[*output.outputs[0].token_ids] for output in outputs]), file=stream, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
