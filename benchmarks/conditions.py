"""What both sides of a comparison share: model, pairs, timing of steps, fresh processes. Needs torch and transformers.

Nothing here imports prefopt, so that the other side can run in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 512  # tokens of prompt and response
KEEP_PAGES = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
}
_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16")

Found = dict[str, Any]


def new_model(
    vocabulary: int = 8192, layers: int = 4, hidden: int = 256, seed: int = 0, positions: int = 2 * LONGEST
) -> Any:
    """A Llama with random weights, the same every time; 9.6 M parameters as it stands."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def new_pairs(
    count: int,
    *,
    vocabulary: int = 8192,
    prompt: float = 93,
    response: float = 110,
    spread: float = 0.6,
    seed: int = 0,
    longest: int = LONGEST,
) -> dict[str, list[list[int]]]:
    """Random tokens; lengths are lognormal with these means, prompt and response together have at most ``longest``."""
    draw = np.random.default_rng(seed)

    def lengths(mean: float) -> np.ndarray:
        return draw.lognormal(np.log(mean) - spread**2 / 2, spread, count).round()

    prompts = lengths(prompt).clip(4, longest - 4)
    sides = [lengths(response).clip(4, longest - prompts) for _ in range(2)]

    def rows(sizes: np.ndarray) -> list[list[int]]:
        return [draw.integers(3, vocabulary, int(size)).tolist() for size in sizes]

    return {"prompt_ids": rows(prompts), "chosen_ids": rows(sides[0]), "rejected_ids": rows(sides[1])}


def shape_of(pairs: Mapping[str, list[list[int]]], batch: int) -> Found:
    """Tokens per pair, and by what padding and repeated prompts would multiply them in batches of that many pairs."""
    prompt, chosen, rejected = (np.array([len(row) for row in pairs[name]]) for name in pairs)
    widest = prompt + np.maximum(chosen, rejected)
    padded = sum(2 * len(part) * part.max() for part in np.split(widest, range(batch, len(widest), batch)))
    twice, once = (2 * prompt + chosen + rejected).sum(), (prompt + chosen + rejected).sum()
    return {
        "pairs": len(prompt),
        "tokens_per_sequence": round(float(twice) / 2 / len(prompt), 1),
        "longest": int(widest.max()),
        "padding_factor": round(float(padded) / float(twice), 2),
        "prompt_sharing_factor": round(float(twice) / float(once), 2),
        "response_share": round(float((chosen + rejected).sum()) / float(twice), 2),
    }


def typical_seed(count: int, batch: int, **settings: Any) -> int:
    """The seed, of a hundred, whose padding, shared prompts and lengths are most like those of many pairs.

    Few pairs by the first seed need less padding than the law of their lengths means: long texts are rare.
    """
    traits = ("tokens_per_sequence", "padding_factor", "prompt_sharing_factor")
    law = shape_of(new_pairs(4096, **settings), batch)

    def distance(seed: int) -> float:
        shape = shape_of(new_pairs(count, seed=seed, **settings), batch)
        return sum(abs(math.log(shape[trait] / law[trait])) for trait in traits)

    return min(range(100), key=distance)


class Timer:
    """CPU seconds of the steps after the first ``warm_up`` ones."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.steps, self.started, self.ended = warm_up, 0, 0.0, 0.0

    def tick(self) -> None:
        """After every step."""
        self.steps += 1
        self.ended = time.process_time()
        if self.steps == self.warm_up:
            self.started = self.ended

    def found(self, pairs_per_step: int) -> Found:
        """Rate, and memory of this process at its highest."""
        scale = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        seconds = self.ended - self.started
        return {
            "cpu_seconds": round(seconds, 3),
            "pairs_per_cpu_second": round((self.steps - self.warm_up) * pairs_per_step / seconds, 4),
            "peak_mb": round(peak / 1e6, 1),
        }


def matmul_rate(dtype: Any, rounds: int = 20) -> float:
    """GFLOP per CPU second of [2048, 256] x [256, 1408], the best of some rounds: what this machine can do now."""
    import torch

    from prefopt.engine.products import product

    left, right = torch.randn(2048, 256).to(dtype), torch.randn(256, 1408).to(dtype)
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        product(left, right)
        seconds.append(time.process_time() - started)
    return 2 * 2048 * 256 * 1408 / min(seconds) / 1e9


def fresh_process(
    python: str | Path, module: str, settings: Mapping[str, Any], environment: Mapping[str, str]
) -> Found:
    """What ``python -m module <settings as JSON>`` prints on its last line, with one thread."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    command = [str(python), "-m", module, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {settings}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(measure: Callable[..., Found]) -> None:
    """The other end of ``fresh_process``."""
    print(json.dumps(measure(**json.loads(sys.argv[1]))))


def rounds_of(sides: Mapping[str, Callable[[], Found]], rounds: int) -> dict[str, list[Found]]:
    """Every side once per round, in turn."""
    found: dict[str, list[Found]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
            print(f"round {number + 1} of {rounds}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def spread(values: list[float]) -> str:
    """Median [smallest, largest]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def environment() -> Found:
    """Versions, processor and commit that numbers belong to."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    entries = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in entries.items()}
    git = ["git", "rev-parse", "HEAD"]
    return {
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": values.get("model name", platform.machine()),
        "processor_flags": [flag for flag in _FLAGS if flag in values.get("flags", "").split()],
        "threads": 1,
    }


def write_json(path: Path, content: Found) -> None:
    """Readable, and the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parser(text: str | None) -> argparse.ArgumentParser:
    """With the description as it stands in the module."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
