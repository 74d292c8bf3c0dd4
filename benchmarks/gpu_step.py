"""A DPO step of a large model, ours and TRL's, on the same pairs: tokens per second, share of the GPU's rate, memory.

    python -m benchmarks.gpu_step --shape 1b
    python -m benchmarks.gpu_step --shape 8b --lora 16 --checkpointing --against trl --trl-python TRL/bin/python
    python -m benchmarks.gpu_step --shape tiny --device cpu --length 64

Llamas of 1 B and 8 B parameters with random weights, bf16, sequences of 2048 tokens of which half are prompt, reference
scores computed before. Every measurement is a process of its own, the sides in turn; seconds are those of the steps
after the first two. Both sides are credited with the same work: 6 N tokens (4 N with adapters), the prompt once, the
head on responses alone, attention over the length left out; its rate over the GPU's is the utilisation. The last
column of our rows is the largest |policy margin - reference margin| before the first step, nats. Prints a table, and
writes JSON with --out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.conditions import Found, environment, fresh_process, parser, rounds_of, spread, write_json
from benchmarks.gpu_shapes import SHAPES

WARM_UP = 2
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bf16, by what the device's name holds, from the makers' data sheets."""


def gpu_name() -> str | None:
    """The first GPU, as its driver calls it."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def rows_of(found: dict[str, list[Found]], peak_tflops: float | None) -> list[Found]:
    """One entry per side, rates round by round; ratios are those of rates in the same round."""
    rows = []
    for side, runs in found.items():
        row: Found = {"side": side, **{key: [run[key] for run in runs] for key in ("pairs_per_s", "tokens_per_s")}}
        if peak_tflops is not None:
            row["utilisation"] = [round(run["tflop_per_s"] / peak_tflops, 4) for run in runs]
        if "TRL" in found:
            pairs = zip(runs, found["TRL"], strict=True)
            row["times_trl"] = [round(mine["pairs_per_s"] / theirs["pairs_per_s"], 3) for mine, theirs in pairs]
        row["peak_gb"] = runs[-1]["peak_gb"]
        row["step0_margin_gap"] = max(
            (run["step0_margin_gap"] for run in runs if "step0_margin_gap" in run), default=None
        )
        rows.append(row)
    return rows


def shown(rows: list[Found]) -> str:
    """The table as Markdown."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.get(head) for head in heads]
        texts = ["" if cell is None else spread(cell) if isinstance(cell, list) else f"{cell}" for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the sides in turn."""
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=list(SHAPES), required=True)
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments.add_argument("--length", type=int, default=2048)
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--batch", type=int, default=8, help="pairs per step")
    arguments.add_argument("--micro", type=int, default=2, help="pairs at a time")
    arguments.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights are trained")
    arguments.add_argument("--checkpointing", action="store_true", help="layers computed again in the backward pass")
    arguments.add_argument("--compiled", action="store_true", help="torch.compile, on both sides")
    arguments.add_argument("--against", choices=["trl"])
    arguments.add_argument("--trl-python", help="interpreter of an environment with trl 1.16.0 (and peft, with --lora)")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--peak-tflops", type=float, help="of the GPU in bf16 (default: by its name)")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    if given.against and not given.trl_python:
        arguments.error("--against trl needs --trl-python")
    name = gpu_name() if given.device == "cuda" else None
    if given.device == "cuda" and name is None:
        arguments.error("nvidia-smi finds no GPU; --device cpu --shape tiny tries the command without one")
    if given.steps <= WARM_UP or given.batch % given.micro:
        arguments.error(f"--steps must be above {WARM_UP}, and --micro divide --batch")
    keys = ("shape", "device", "length", "steps", "batch", "micro", "lora", "checkpointing", "compiled")
    settings = {**{key: vars(given)[key] for key in keys}, "warm_up": WARM_UP}
    pythons = {"ours": (sys.executable, "benchmarks.gpu_ours")}
    if given.against:
        pythons["TRL"] = (given.trl_python, "benchmarks.gpu_trl")
    sides: dict[str, Callable[[], Found]] = {
        side: partial(fresh_process, python, module, settings, {}) for side, (python, module) in pythons.items()
    }
    found = rounds_of(sides, given.rounds)
    known = next((rate for part, rate in PEAK_TFLOPS.items() if name and part in name), None)
    rows = rows_of(found, given.peak_tflops or known)
    print(f"{given.rounds} rounds in turn on {name or 'the CPU'}; {settings}")
    print(shown(rows))
    if given.out:
        trl = next((runs[0]["trl"] for side, runs in found.items() if side == "TRL"), None)
        write_json(
            given.out, {"environment": {**environment(), "gpu": name, "trl": trl}, "conditions": settings, "rows": rows}
        )


if __name__ == "__main__":
    main()
