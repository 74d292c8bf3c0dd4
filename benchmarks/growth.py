"""What a DPO step costs as the vocabulary, the length of texts, the number of arms and that of reward models grow.

    python -m benchmarks.growth
    python -m benchmarks.growth --precision bf16 --only vocabulary

Everything else as in ``dpo_step``. The floor is 6 N tokens: N of the layers for every token, with each prompt once, and
N of the head for response tokens; attention over the length is not in it. The rate is that of [2048, 256] x
[256, 1408] in the same process, right after the run. Prints tables, and writes JSON with --out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.conditions import (
    LONGEST,
    Found,
    environment,
    fresh_process,
    new_pairs,
    parser,
    rounds_of,
    shape_of,
    spread,
    write_json,
)

BATCH, STEPS, WARM_UP = 8, 6, 2
VOCABULARIES = (2048, 8192, 32768, 131072)
STRETCHES = (0.25, 0.5, 1, 2, 4)  # of all lengths
COUNTS = (1, 2, 4)  # arms, or reward models


def settings_of(what: str, precision: str) -> dict[str, tuple[str, Found]]:
    """Module and settings of every point of one curve."""
    common = {"steps": STEPS, "warm_up": WARM_UP, "batch": BATCH, "precision": precision, "settings": {}}
    if what == "vocabulary":
        points = {str(size): {"model": {"vocabulary": size}, "pairs": {"seed": 1}} for size in VOCABULARIES}
    elif what == "length":
        points = {}
        for stretch in STRETCHES:
            longest = int(LONGEST * stretch)
            pairs = {"prompt": 93 * stretch, "response": 110 * stretch, "longest": longest, "seed": 1}
            shape = shape_of(new_pairs(STEPS * BATCH, **pairs), BATCH)
            name = f"{shape['tokens_per_sequence']:.0f} (longest {shape['longest']})"
            points[name] = {"model": {"positions": 4 * LONGEST}, "pairs": pairs}
    else:
        return {
            str(count): (
                "benchmarks.our_arms",
                {"kind": what, "count": count, "steps": STEPS, "batch": BATCH, "precision": precision},
            )
            for count in COUNTS
        }
    return {name: ("benchmarks.our_dpo", {**common, **given}) for name, given in points.items()}


def curve(what: str, precision: str, rounds: int) -> list[Found]:
    """One entry per point: medians over rounds, and the rates of all rounds."""
    sides: dict[str, Callable[[], Found]] = {
        name: partial(fresh_process, sys.executable, module, settings, {})
        for name, (module, settings) in settings_of(what, precision).items()
    }
    entries = []
    for name, runs in rounds_of(sides, rounds).items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        entries.append({what: name, **medians, "rounds": [run["cpu_seconds"] for run in runs]})
    return entries


def shown(what: str, entries: list[Found]) -> str:
    """A table as Markdown."""
    if what in ("arms", "members"):
        head, rows = ["CPU s", "of which reference", "CPU s of each further one", "peak MB"], []
        first = entries[0]
        for entry in entries:
            more = int(entry[what]) - int(first[what])
            each = f"{(entry['cpu_seconds'] - first['cpu_seconds']) / more:.1f}" if more else ""
            cells = (spread(entry["rounds"]), f"{entry['reference_cpu_seconds']:.1f}", each, f"{entry['peak_mb']:.0f}")
            rows.append((entry[what], *cells))
    else:
        head = ["pairs/CPU s", "floor, GFLOP per pair", "GFLOP/s of the floor", "of the matmul rate", "peak MB"]
        pairs, rows = (STEPS - WARM_UP) * BATCH, []
        for entry in entries:
            rates = [pairs / seconds for seconds in entry["rounds"]]
            floor = entry["gflop_floor"] / pairs
            fraction = f"{100 * entry['fraction_of_matmul_rate']:.0f} % of {entry['matmul_gflop_per_s']:.0f}"
            rate = f"{floor * statistics.median(rates):.0f}"
            rows.append((entry[what], spread(rates), f"{floor:.1f}", rate, fraction, f"{entry['peak_mb']:.0f}"))
    lines = [f"| {what} | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    """Measure the curves, one after the other."""
    arguments = parser(__doc__)
    kinds = ["vocabulary", "length", "arms", "members"]
    arguments.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    arguments.add_argument("--only", action="append", choices=kinds, help="default: all")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    curves = {what: curve(what, given.precision, given.rounds) for what in given.only or kinds}
    for what, entries in curves.items():
        print(f"{given.precision}, {given.rounds} rounds\n{shown(what, entries)}\n")
    if given.out:
        conditions = {"precision": given.precision, "batch": BATCH, "steps": STEPS, "warm_up": WARM_UP}
        write_json(given.out, {"environment": environment(), "conditions": conditions, "curves": curves})


if __name__ == "__main__":
    main()
