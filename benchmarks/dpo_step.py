"""A DPO training step, ours and TRL's, on the same pairs: pairs per CPU second and peak memory.

    python -m benchmarks.dpo_step
    python -m benchmarks.dpo_step --against trl --trl-python TRL_ENVIRONMENT/bin/python

A Llama of 9.6 M parameters (4 layers x 256, vocabulary 8192) with random weights; random pairs with lognormal lengths,
about 200 tokens per sequence and at most 512, about half of them prompt. Steps of 8 pairs, TRL's default. Every
measurement is a process of its own with one thread and the same allocator settings, and the sides take turns. CPU
seconds are those of the steps after the first ``warm_up``, without import, tokenisation and cached reference scores;
memory is the highest of the whole process. Prints a table, and writes JSON with --out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.conditions import (
    KEEP_PAGES,
    Found,
    environment,
    fresh_process,
    new_pairs,
    parser,
    rounds_of,
    shape_of,
    spread,
    typical_seed,
    write_json,
)

BATCH, WARM_UP = 8, 2
LENGTHS = {
    "issue": {},
    "long prompts, short answers": {"prompt": 300, "response": 40, "spread": 0.3},
    "long answers": {"prompt": 30, "response": 170},
}
OURS = {
    "ours fp32, padded": {"precision": "fp32", "padding": True},
    "ours fp32": {"precision": "fp32"},
    "ours fp32, gradient checkpointing": {"precision": "fp32", "settings": {"gradient_checkpointing": True}},
    "ours bf16": {"precision": "bf16"},
    "ours bf16, gradient checkpointing": {"precision": "bf16", "settings": {"gradient_checkpointing": True}},
    "ours bf16, compiled layers": {"precision": "bf16", "settings": {"compile_layers": True}},
}
_CACHED = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
THEIRS = {
    "TRL default": {},
    "TRL fp32, cached reference, no checkpointing": {"settings": {**_CACHED, "bf16": False}},
    "TRL bf16, cached reference, no checkpointing": {"settings": _CACHED},
    "TRL bf16, cached reference, no checkpointing, compact head": {"settings": _CACHED, "compact": True},
    "TRL bf16, cached reference, checkpointing, compact head": {
        "settings": {"precompute_ref_log_probs": True},
        "compact": True,
    },
}
_DEFAULT = "TRL default"


def sides(
    chosen: list[str], trl_python: str | None, common: Mapping[str, Any], allocator: Mapping[str, str]
) -> dict[str, Callable[[], Found]]:
    """What measures each side once."""
    found: dict[str, Callable[[], Found]] = {}
    for name, given in {**THEIRS, **OURS}.items():
        if name not in chosen:
            continue
        python, module = (sys.executable, "benchmarks.our_dpo") if name in OURS else (trl_python, "benchmarks.trl_dpo")
        settings = {**common, "settings": {}, **given}
        found[name] = partial(fresh_process, python, module, settings, allocator)
    return found


def table(found: Mapping[str, list[Found]]) -> list[Found]:
    """One entry per side; ratios are those of rates in the same round."""
    rows = []
    best = max((name for name in found if name in THEIRS), key=lambda name: _median(found[name]), default=None)
    for name, runs in found.items():
        rates = [run["pairs_per_cpu_second"] for run in runs]
        row: Found = {
            "side": name,
            "pairs_per_cpu_second": rates,
            "peak_mb": statistics.median(run["peak_mb"] for run in runs),
        }
        for label, other in (("default", _DEFAULT if _DEFAULT in found else None), ("best", best)):
            if other is not None:
                bases = [run["pairs_per_cpu_second"] for run in found[other]]
                row[f"times_trl_{label}"] = [round(a / b, 3) for a, b in zip(rates, bases, strict=True)]
                row[f"memory_of_trl_{label}"] = round(
                    row["peak_mb"] / statistics.median(run["peak_mb"] for run in found[other]), 3
                )
        rows.append(row)
    return rows


def _median(runs: list[Found]) -> float:
    return statistics.median(run["pairs_per_cpu_second"] for run in runs)


def shown(rows: list[Found]) -> str:
    """The table as Markdown."""
    lines = ["| | pairs/CPU s | x TRL default | x TRL best | peak MB |", "|---|---|---|---|---|"]
    for row in rows:
        ratios = [spread(row[key]) if key in row else "" for key in ("times_trl_default", "times_trl_best")]
        lines.append(
            f"| {row['side']} | {spread(row['pairs_per_cpu_second'])} | {' | '.join(ratios)} | {row['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the sides in turn."""
    arguments = parser(__doc__)
    arguments.add_argument("--against", choices=["trl"])
    arguments.add_argument("--trl-python", help="interpreter of an environment with trl 1.16.0; needs no prefopt")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=10, help="of 8 pairs, two of them to warm up")
    arguments.add_argument("--lengths", choices=list(LENGTHS), default="issue")
    arguments.add_argument("--keep-pages", action="store_true", help="glibc keeps freed memory, on both sides")
    arguments.add_argument("--side", action="append", choices=[*THEIRS, *OURS], help="default: all")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    if given.against and not given.trl_python:
        arguments.error("--against trl needs --trl-python")
    chosen = given.side or [*(THEIRS if given.against else ()), *OURS]
    lengths = LENGTHS[given.lengths]
    lengths = {**lengths, "seed": typical_seed(given.steps * BATCH, BATCH, **lengths)}
    common = {"pairs": lengths, "model": {}, "steps": given.steps, "warm_up": WARM_UP, "batch": BATCH}
    allocator = KEEP_PAGES if given.keep_pages else {}
    found = rounds_of(sides(chosen, given.trl_python, common, allocator), given.rounds)
    shape = shape_of(new_pairs(given.steps * BATCH, **lengths), BATCH)
    rows = table(found)
    print(f"{given.rounds} rounds in turn; {shape}")
    print(shown(rows))
    if given.out:
        conditions = {"lengths": given.lengths, **shape, "steps": given.steps, "batch": BATCH, "allocator": allocator}
        versions = {"trl": next((runs[0]["trl"] for name, runs in found.items() if name in THEIRS), None)}
        write_json(given.out, {"environment": {**environment(), **versions}, "conditions": conditions, "rows": rows})


if __name__ == "__main__":
    main()
