"""Tokens per CPU second of our generation and of transformers' ``generate``: same model, prompts and settings.

    OMP_NUM_THREADS=1 python -m benchmarks.generation

``generate`` is used as its documentation shows it: one prompt at a time, and on left-padded batches of the prompts in
their given order, of our batch size. Two models: the demo tier's reference policy on its test prompts (found in
--folder or made first, which takes two minutes), and one with random weights (4 layers, width 256, vocabulary 8192) on
random prompts, where one token in fifty ends a response. All sides take turns in every round. Greedy tokens of ours are
compared with those of both others, since batches change the last bits of logits.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.conditions import ROOT
from benchmarks.many_runs import make_missing
from benchmarks.pairs_and_models import environment, markdown, median_range, write_evidence
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from prefopt.engine.decoding import decodes
from prefopt.generation import end_token_ids, generate
from prefopt.models import load_causal_lm, load_tokenizer
from prefopt.plan import load_plan
from prefopt.specs import SamplingSpec
from prefopt.stages.tables import prompt_rows
from prefopt.stages.weights import WEIGHTS

ITEM = "mallowspo/tables1_6"
DECODING: dict[str, dict[str, float]] = {"greedy": {"temperature": 0.0}, "sampled": {}, "top-p 0.9": {"top_p": 0.9}}
OURS, ONE, BATCH = "ours", "generate, one at a time", "generate, padded batch"

Ids = Sequence[Sequence[int]]
Side = Callable[[Ids], list[list[int]]]


class Case(NamedTuple):
    """A model with its prompts, the longest answer, and how many of the prompts are enough one at a time."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    limit: int
    batches: tuple[int, ...]
    alone: int


def demo_policy(folder: Path) -> Case:
    """The demo tier's reference policy on 300 test prompts."""
    plan = load_plan(ROOT / "config" / "config.yaml", {"items": ITEM, "results": str(folder)})
    plan.write_specs(folder)
    trial = next(node for node in plan.nodes.values() if node.stage == "trials")
    policy, tokens = (plan.nodes[trial.parents[role]] for role in ("model", "set.test.tokens"))
    make_missing(plan, folder, [policy, tokens])
    weights = folder / policy.ref / WEIGHTS
    model = load_causal_lm(weights, device="cpu", precision="fp32", trust_remote_code=False)
    prompts = prompt_rows(folder / tokens.ref, "test", 300)["prompt_ids"].tolist()
    return Case("demo policy", model, load_tokenizer(weights), prompts, 50, (64, 300), 40)


def random_weights() -> Case:
    """A larger Llama with random weights on random tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.05, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(2, 2 + 8192 // 50))
    words = Tokenizer(WordLevel({"[PAD]": 0, "[BOS]": 1, "[END]": 2}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]")
    draw = random.Random(0)
    lengths = [round(draw.triangular(20, 120, 53)) for _ in range(64)]
    prompts = [[draw.randrange(200, 8192) for _ in range(length)] for length in lengths]
    return Case("4 x 256, random", model, tokenizer, prompts, 96, (64,), 16)


def cut(row: list[int], ends: Sequence[int]) -> list[int]:
    """A response up to and with its first end token."""
    return row[: next((at for at, token in enumerate(row) if token in ends), len(row) - 1) + 1]


def theirs(case: Case, sampling: SamplingSpec, size: int) -> Side:
    """``model.generate`` on left-padded batches of ``size`` prompts in their order."""
    ends = end_token_ids(case.model, case.tokenizer)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:  # their own default would also drop all but 50 tokens
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}

    def respond(prompts: Ids) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            width = max(map(len, some))
            ids = torch.tensor([[ends[0]] * (width - len(prompt)) + list(prompt) for prompt in some])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some])
            settings = {"max_new_tokens": case.limit, "eos_token_id": ends, "pad_token_id": ends[0], **chosen}
            out = case.model.generate(ids, attention_mask=mask, **settings)
            found += [cut(row, ends) for row in out[:, width:].tolist()]
        return found

    return respond


def sides_of(case: Case, sampling: SamplingSpec) -> dict[str, Side]:
    """The three sides by name."""

    def ours(prompts: Ids) -> list[list[int]]:
        return generate(case.model, case.tokenizer, prompts, sampling, progress=False).response_ids

    return {ONE: theirs(case, sampling, 1), BATCH: theirs(case, sampling, sampling.batch_size), OURS: ours}


def compared(case: Case, sampling: SamplingSpec, rounds: int) -> dict[str, Any]:
    """One row of the table: rates of all sides, ratios round by round, greedy responses that are not the same."""
    rates: dict[str, list[float]] = {ONE: [], BATCH: [], OURS: []}
    found: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):
        for side, respond in sides_of(case, sampling).items():
            torch.manual_seed(number)
            prompts = case.prompts[: case.alone] if side == ONE else case.prompts
            started = time.process_time()
            found[side] = respond(prompts)
            seconds = time.process_time() - started
            if number:  # the first round warms up
                rates[side].append(sum(map(len, found[side])) / seconds)
    row: dict[str, Any] = {side: median_range(values, 0) for side, values in rates.items()}
    for side in (ONE, BATCH):
        ratios = [mine / other for mine, other in zip(rates[OURS], rates[side], strict=True)]
        row[f"ours / {side.removeprefix('generate, ')}"] = median_range(ratios, 2)
    differ = "-"
    if sampling.temperature == 0:
        others = (sum(a != b for a, b in zip(found[OURS], found[side], strict=False)) for side in (ONE, BATCH))
        differ = " and ".join(map(str, others)) + f" of {len(found[ONE])} and {len(found[BATCH])}"
    return {**row, "greedy responses that differ": differ}


def rows_of(cases: Iterator[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """The table, case by case."""
    for case in cases:
        if not decodes(case.model):
            raise SystemExit(f"{type(case.model).__name__} is not decoded by us, so there is nothing to compare")
        for batch in case.batches:
            for decoding, settings in DECODING.items():
                sampling = SamplingSpec(batch_size=batch, max_new_tokens=case.limit, **settings)
                row = {"model": case.name, "decoding": decoding, "batch": batch, **compared(case, sampling, rounds)}
                print(row, file=sys.stderr, flush=True)
                yield row


def main() -> None:
    """Print the table and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "random"), action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the demo policy is or is to be; else a temporary folder")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "evidence" / "cpu-generation.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="prefopt-generation-"))).resolve()
    makers = {"demo": partial(demo_policy, folder), "random": random_weights}
    cases = (makers[name]() for name in arguments.model or makers)
    rows = list(rows_of(cases, arguments.rounds))
    print(markdown(rows))
    print("tokens per CPU second: median [least, greatest] of the rounds")
    write_evidence(arguments.json, {"benchmark": "generation", "environment": environment(), "rows": rows})
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
