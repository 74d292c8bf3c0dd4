"""Tokens per second of our generation and of transformers' ``generate`` in its default use, in turn, in one process.

    OMP_NUM_THREADS=1 python benchmarks/generation.py

Both get the same model, batches, seeds and settings; the other side gets left-padded batches in their declared order.
The prompts are generated: random tokens. Two models with random weights: one of the demo world's size, and a larger
one (4 layers, width 256, vocabulary 8192). "ends": about one token in 50 ends a response; "one end": one token of the
vocabulary, so that most responses go to the limit. Prints medians of tokens per CPU second, their ratio round by
round, and how many tokens of the last round differ.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from contextlib import nullcontext

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.decoding import decodes, plain
from prefopt.generation import Generations, generate
from prefopt.specs import SamplingSpec

MODELS = {
    "demo size": {
        "vocab_size": 275,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    },
    "4 x 256": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.05,
    },
}
PROMPTS = {"demo size": (7, 17), "4 x 256": (20, 120)}  # shortest and longest
LIMITS = {"demo size": 50, "4 x 256": 96}  # new tokens
DECODING = {
    "sampled": {},
    "sampled, top-p 0.9": {"top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


def new_model(name: str, ends: bool) -> LlamaForCausalLM:
    """Random weights; one token ends a response, or one in fifty."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODELS[name], max_position_embeddings=512)).eval()
    model.generation_config.eos_token_id = list(range(2, 2 + model.config.vocab_size // 50)) if ends else 2
    return model


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One that has an end token, which is all that generation asks of it."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[BOS]": 1, "[END]": 2}, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]")


def prompts_for(name: str, count: int) -> list[list[int]]:
    """Random tokens, short prompts more often."""
    draw = random.Random(0)
    low, high = PROMPTS[name]
    vocabulary = MODELS[name]["vocab_size"]
    lengths = [round(draw.triangular(low, high, low + (high - low) / 3)) for _ in range(count)]
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def compare(name: str, ends: bool, sampling: SamplingSpec, prompts: list[list[int]], rounds: int) -> str:
    """One line of the table."""
    model, tokenizer = new_model(name, ends), new_tokenizer()
    if not decodes(model):
        raise SystemExit(f"{type(model).__name__} is not decoded by us, so there is nothing to compare")
    rates: dict[str, list[float]] = {"transformers": [], "ours": []}
    found: dict[str, Generations] = {}
    for number in range(rounds + 1):
        for side, values in rates.items():
            with plain(model) if side == "transformers" else nullcontext():
                started = time.process_time()
                found[side] = generate(model, tokenizer, prompts, sampling, progress=False)
                seconds = time.process_time() - started
            if number:  # the first round warms up
                values.append(sum(map(len, found[side].response_ids)) / seconds)
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["transformers"], strict=True)]
    tokens = sum(map(len, found["ours"].response_ids))
    differ = sum(
        sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))
        for mine, theirs in zip(found["ours"].response_ids, found["transformers"].response_ids, strict=True)
    )
    return (
        f"{name:10} {'ends' if ends else 'one end':8}{sampling.batch_size:6}  "
        f"{statistics.median(rates['transformers']):10.0f} {statistics.median(rates['ours']):10.0f}  "
        f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]  {differ} of {tokens}"
    )


def main() -> None:
    """Print the table for both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=list(MODELS), action="append", help="default: both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("model      ends      batch  transf. t/s   ours t/s  ratio [min, max]  tokens that differ")
    for name in arguments.model or MODELS:
        cases = [(64, True), (64, False), (300, True), (16, True)] if name == "demo size" else [(64, True), (64, False)]
        for batch, ends in cases:
            for decoding, settings in DECODING.items():
                sampling = SamplingSpec(batch_size=batch, max_new_tokens=LIMITS[name], **settings)
                prompts = prompts_for(name, max(batch, 128) if name == "demo size" else batch)
                print(compare(name, ends, sampling, prompts, arguments.rounds), f" {decoding}", flush=True)


if __name__ == "__main__":
    main()
