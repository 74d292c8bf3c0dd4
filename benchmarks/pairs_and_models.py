"""What the benchmarks of scoring and reward models share: measuring several sides in turn, and the table.

Model, pairs and environment are those of ``conditions``. Every side of a comparison is a process of its own that is
asked for one round at a time, so that the sides alternate, and nothing of one side (imports, allocator, caches) stands
in the time or memory of another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import conditions

_PACKAGES = ("torch", "transformers", "trl", "numpy")
VOCABULARY = 8192
SPECIAL = 3  # padding, begin, end

Pairs = dict[str, list[list[int]]]
Rounds = dict[str, list[dict[str, Any]]]


def typical_pairs(count: int, batch: int, vocabulary: int = VOCABULARY) -> Pairs:
    """Few pairs that are like many in padding, shared prompts and lengths."""
    seed = conditions.typical_seed(count, batch, vocabulary=vocabulary)
    return conditions.new_pairs(count, vocabulary=vocabulary, seed=seed)


def reward_llama(seed: int = 0) -> Any:
    """The body of ``conditions.new_model`` under a head with one output."""
    import torch
    from transformers import LlamaForSequenceClassification

    config = conditions.new_model().config
    config.num_labels = 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def word_tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """A tokenizer whose word ``w<n>`` is token n; trainers and model folders ask for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[BOS]", "[END]", *(f"w{token}" for token in range(SPECIAL, vocabulary))]
    inner = Tokenizer(WordLevel({name: token for token, name in enumerate(names)}, unk_token="[PAD]"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[END]")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a name, the Python that runs it, and what its worker is told."""

    name: str
    settings: Mapping[str, Any]
    python: str = sys.executable


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """CPU and wall seconds of a call in this process, the process's peak memory so far, and what the call returned."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": round(cpu, 4), "wall_s": round(wall, 4), "peak_mb": round(peak)}, found


def serve(new_round: Callable[[dict[str, Any]], Callable[[], dict[str, Any]]], settings: str) -> None:
    """A worker: ``new_round(settings)`` once, what it returns for every line that is read; one JSON line per answer."""
    answers, sys.stdout = sys.stdout, sys.stderr  # trainers print to standard output
    import torch

    told = json.loads(settings)
    torch.set_num_threads(told["threads"])
    run = new_round(told)
    for _line in sys.stdin:
        answers.write(json.dumps(run()) + "\n")
        answers.flush()


class _Worker:
    """The process of a side, started when it is first asked."""

    def __init__(self, module: str, side: Side, threads: int, keep_pages: bool) -> None:
        told = json.dumps({"side": side.name, "threads": threads, **side.settings})
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings |= {"CUDA_VISIBLE_DEVICES": "", **(conditions.KEEP_PAGES if keep_pages else {})}
        self.process = subprocess.Popen(
            [side.python, "-W", "ignore", "-m", module, "--worker", told],
            cwd=conditions.ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = side.name

    def round(self) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended with status {self.process.wait()}; see above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def alternate(
    module: str,
    sides: Sequence[Side],
    *,
    rounds: int,
    warm_up: int = 1,
    threads: int = 1,
    keep_pages: bool = False,
    fresh: bool = False,
) -> Rounds:
    """What each side's worker answers, round by round, the sides in turn and every other round in reversed order.

    ``module`` is run as ``python -m module --worker JSON`` and calls ``serve``. ``warm_up`` rounds are not kept.
    ``keep_pages`` lets glibc keep freed memory, on every side. ``fresh``: a new process for every round (with its own
    warm-up), where the processes do not fit into memory side by side.
    """
    found: Rounds = {side.name: [] for side in sides}
    workers: dict[str, _Worker] = {}
    try:
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                if side.name not in workers:
                    workers[side.name] = _Worker(module, side, threads, keep_pages)
                    for _ in range(warm_up):
                        workers[side.name].round()
                found[side.name].append(workers[side.name].round())
                print(
                    f"round {number + 1} of {rounds}: {side.name}: {found[side.name][-1]['cpu_s']} CPU s",
                    file=sys.stderr,
                )
                if fresh:
                    workers.pop(side.name).close()
    finally:
        for worker in workers.values():
            worker.close()
    return found


def median_range(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median, least and greatest of the rounds, and the rounds."""
    kept = [round(float(value), digits) for value in values]
    return {"median": round(statistics.median(kept), digits), "min": min(kept), "max": max(kept), "rounds": kept}


def rate_rows(found: Rounds, work: float, baselines: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per side: ``work`` per CPU second, its ratio to each baseline round by round, peak memory in MB."""
    rates = {name: [work / answer["cpu_s"] for answer in answers] for name, answers in found.items()}
    rows = []
    for name, values in rates.items():
        row = {"side": name, "per_cpu_s": median_range(values)}
        for baseline in baselines:
            ratios = [mine / theirs for mine, theirs in zip(values, rates[baseline], strict=True)]
            row[f"times {baseline}"] = median_range(ratios)
        row["peak_mb"] = max(answer["peak_mb"] for answer in found[name])
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; medians with [min, max]."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row[head]) for head in heads)} |" for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.3g} [{value['min']:.3g}, {value['max']:.3g}]"
    return str(value)


def versions(python: str = sys.executable) -> dict[str, str]:
    """Versions of the packages that matter in an environment; absent ones are left out."""
    if python == sys.executable:
        found = {}
        for name in _PACKAGES:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found
    code = "import json; from benchmarks.pairs_and_models import versions; print(json.dumps(versions()))"
    answer = subprocess.run([python, "-c", code], cwd=conditions.ROOT, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def environment(other_python: str | None = None, threads: int = 1) -> dict[str, Any]:
    """What numbers belong to, on both sides; no names of machines or folders."""
    theirs = {"theirs": versions(other_python)} if other_python else {}
    return conditions.environment() | {"threads": threads, "ours": versions(), **theirs}


def write_evidence(path: Path, content: dict[str, Any]) -> None:
    """Write a benchmark's result as JSON, and say where."""
    conditions.write_json(path, content)
    print(f"\nwritten: {path}", file=sys.stderr)


def arguments_for(doc: str | None, evidence: str, **more: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The options that benchmarks against TRL share; ``more`` is added as further options."""
    parser = conditions.parser(doc)
    parser.add_argument("--against", choices=["trl", "nothing"], default="trl")
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment with TRL; default: this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-pages", action="store_true", help="glibc keeps freed memory, on all sides")
    parser.add_argument(
        "--json", type=Path, default=conditions.ROOT / "docs" / "evidence" / evidence, help="where to write JSON"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser
