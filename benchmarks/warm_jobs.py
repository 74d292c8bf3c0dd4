"""What a warm start saves: one finished job run again cold and forked, in turn, on this machine.

    make reproduce
    OMP_NUM_THREADS=1 python benchmarks/warm_jobs.py results/specs/generations/<id>.json

Prints the median wall seconds of both, and their ratio. The artifact is made again each time, with equal bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from prefopt.stages import STAGES

PYTHON = (sys.executable, "-m", "prefopt")


def seconds(command: tuple[str, ...]) -> float:
    """Wall seconds of a command."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Compare the two ways to start a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the part that runs beside the server
    arguments = parser.parse_args()
    folder = json.loads(arguments.spec.read_text())["stage"].split("/")[0]
    job = (*PYTHON, next(s.verb for s in STAGES.values() if s.folder == folder), "--spec", str(arguments.spec))
    if not arguments.inside:
        again = (sys.executable, __file__, str(arguments.spec), "--rounds", str(arguments.rounds), "--inside")
        sys.exit(subprocess.call((*PYTHON, "launch", "--", *again)))
    address = os.environ.pop("PREFOPT_WARM")
    rows: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(arguments.rounds + 1):
        cold = seconds(job)
        os.environ["PREFOPT_WARM"] = address
        warm = seconds(job)
        del os.environ["PREFOPT_WARM"]
        if number:  # the first round fills the caches, and the server imports in it
            rows["cold"].append(cold)
            rows["warm"].append(warm)
    for name, walls in rows.items():
        print(f"{name}: median {statistics.median(walls):.2f} s wall [{min(walls):.2f}, {max(walls):.2f}]")
    ratios = [cold / warm for cold, warm in zip(rows["cold"], rows["warm"], strict=True)]
    print(f"cold / warm: median {statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]")


if __name__ == "__main__":
    main()
