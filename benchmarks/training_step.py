"""What packed rows save in training: a policy and a reward model with packed and with padded rows, in turn.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py

The data are generated: random tokens, prompts of 7 to 17, responses of 6 to 49, short ones more often. Prints median
CPU seconds of both ways, and their ratio round by round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from prefopt.bulk import score_responses
from prefopt.objectives import Objective, PolicyObjective, RewardObjective
from prefopt.packing import packs, padded
from prefopt.specs import TrainSpec
from prefopt.trainer import train

VOCABULARY = 275
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {"policy": LlamaForCausalLM, "reward model": LlamaForSequenceClassification}


def new_model(kind: str) -> torch.nn.Module:
    """The same random weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=72, num_labels=1, pad_token_id=0)
    return MODELS[kind](config).eval()


def generated_pairs(count: int) -> dict[str, list[list[int]]]:
    """Token rows whose lengths are like those of the embedded world."""
    draw = random.Random(0)

    def tokens(low: int, high: int, middle: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(round(draw.triangular(low, high, middle)))]

    return {
        "prompt_ids": [tokens(7, 17, 12) for _ in range(count)],
        "chosen_ids": [tokens(6, 49, 8) for _ in range(count)],
        "rejected_ids": [tokens(6, 49, 7) for _ in range(count)],
    }


def policy_objective(pairs: dict[str, list[list[int]]]) -> PolicyObjective:
    """DPO against the starting model's own cached log-probabilities."""
    reference = new_model("policy")
    signals = {
        f"ref_{side}_logp": score_responses(reference, pairs["prompt_ids"], pairs[f"{side}_ids"], batch_size=32)["logp"]
        for side in ("chosen", "rejected")
    }
    count = len(pairs["prompt_ids"])
    return PolicyObjective(**pairs, pair_ids=range(count), loss="dpo", loss_params={"beta": 0.1}, signals=signals)


def seconds(kind: str, objective: Objective, spec: TrainSpec, packed: bool) -> float:
    """CPU seconds of one run."""
    model = new_model(kind)
    if not packs(model):
        raise SystemExit(f"{type(model).__name__} does not pack rows, so there is nothing to compare")
    with tempfile.TemporaryDirectory() as folder, nullcontext() if packed else padded(model):
        started = time.process_time()
        train(
            model,
            objective,
            spec,
            seed=0,
            state_dir=Path(folder),
            micro_batch=32,
            checkpoint_steps=100_000,
            device="cpu",
            progress=False,
        )
        return time.process_time() - started


def main() -> None:
    """Compare the two ways for both kinds of run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=960)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = generated_pairs(arguments.pairs)
    for kind, objective, optimizer in (
        ("policy", policy_objective(pairs), "rmsprop"),
        ("reward model", RewardObjective(**pairs), "adamw"),
    ):
        spec = TrainSpec(epochs=1, batch_size=32, learning_rate=1e-4, optimizer=optimizer)
        rounds = []
        for number in range(arguments.rounds + 1):
            found = {way: seconds(kind, objective, spec, way == "packed") for way in ("padded", "packed")}
            if number:  # the first round warms up
                rounds.append(found)
        for way in ("padded", "packed"):
            values = [found[way] for found in rounds]
            print(f"{kind}, {way}: median {statistics.median(values):.2f} CPU s [{min(values):.2f}, {max(values):.2f}]")
        ratios = [found["padded"] / found["packed"] for found in rounds]
        print(f"{kind}, padded / packed: median {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
