"""A sweep of small runs that share their parents: one cold process per run, and runs forked from a warm process.

    OMP_NUM_THREADS=1 python -m benchmarks.many_runs

The runs are trials of a grid item, its arms and settings in turn over the seeds. What they share (pairs, tokens,
reference model, its scores) is made first and not counted. Each round makes all of them cold and all of them warm, as
many at a time as there are cores, one thread each. CPU seconds are those of all processes of a sweep: what asks for a
run, the run, and, on the warm side, the process that imports once. The results of both sides must be the same bytes.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from benchmarks.conditions import ROOT
from benchmarks.pairs_and_models import environment, markdown, median_range, write_evidence

from prefopt.artifacts import MANIFEST, Node
from prefopt.files import read_json
from prefopt.plan import Plan, load_plan
from prefopt.processes.warm import SOCKET_VARIABLE, run_beside_server
from prefopt.stages import STAGES

VERBS = {stage.folder: stage.verb for stage in STAGES.values()}


def run_all(specs: Sequence[str], jobs: int) -> int:
    """Make the artifacts of these spec files, ``jobs`` at a time; how many failed."""

    def run(spec: str) -> int:
        verb = VERBS[Path(spec).parent.name]
        device = ["--device", "cpu"] if "device" in STAGES[verb].options else []
        command = [sys.executable, "-m", "prefopt", verb, "--spec", spec, *device]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        return done.returncode

    with ThreadPoolExecutor(jobs) as pool:
        return sum(code != 0 for code in pool.map(run, specs))


def swept(specs: Sequence[Path], jobs: int, warm: bool) -> dict[str, float]:
    """CPU and wall seconds of a sweep; SystemExit where a run failed."""
    command = [sys.executable, "-m", "benchmarks.many_runs", "--jobs", str(jobs), "--run", *map(str, specs)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = run_beside_server(command) if warm else subprocess.call(command)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise SystemExit(f"{code} of {len(specs)} runs failed; their messages are above")
    return {"cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, "wall_s": wall}


def trials_of(plan: Plan, count: int | None) -> list[Node]:
    """Trials of the planned item that train, arm by arm in turn and seed by seed."""
    nodes = [node for node in plan.nodes.values() if node.stage == "trials" and node.spec["loss"] is not None]
    seeds = sorted({node.spec["seed"] for node in nodes})

    def in_turn() -> Iterator[Node]:
        for row in zip_longest(*([node for node in nodes if node.spec["seed"] == seed] for seed in seeds)):
            yield from (node for node in row if node is not None)

    return list(islice(in_turn(), count))


def main() -> None:
    """Print the table and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--item", default="mallowspo/tables1_6")
    parser.add_argument("--trials", type=int, help="at most so many (default: all that the item runs by default)")
    parser.add_argument("--full", action="store_true", help="all of the item's grid, as with full: true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work, and to find parents made before; else a new one")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "evidence" / "cpu-many-runs.json")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # one sweep
    arguments = parser.parse_args()
    if arguments.run:
        sys.exit(run_all(arguments.run, arguments.jobs))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop(SOCKET_VARIABLE, None)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="prefopt-runs-"))
    content = measured(arguments, folder.resolve())
    write_evidence(arguments.json, content)
    if arguments.folder is None:
        shutil.rmtree(folder)


def make_missing(plan: Plan, results: Path, wanted: Sequence[Node]) -> None:
    """Make the wanted artifacts and all below them, where they are not there yet, parents first."""
    for node in plan.reachable(wanted):
        if not (results / node.ref / MANIFEST).is_file():
            print(f"making {node.ref}", file=sys.stderr)
            if run_all([str(results / "specs" / f"{node.ref}.json")], 1):
                raise SystemExit(f"{node.ref} could not be made")


def measured(arguments: argparse.Namespace, results: Path) -> dict[str, Any]:
    """All rounds of both sides, their table printed; SystemExit where two sweeps differ in a byte."""
    settings = {"items": arguments.item, "results": str(results), "full": arguments.full}
    plan = load_plan(ROOT / "config" / "config.yaml", settings)
    plan.write_specs(results)
    trials = trials_of(plan, arguments.trials)
    make_missing(plan, results, [plan.nodes[ref] for node in trials for ref in node.parents.values()])
    specs = [results / "specs" / f"{node.ref}.json" for node in trials]
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    outputs: list[Any] = []
    for number in range(arguments.rounds):
        for side in found if number % 2 == 0 else reversed(found):
            shutil.rmtree(results / "trials", ignore_errors=True)
            found[side].append(swept(specs, arguments.jobs, warm=side == "warm"))
            outputs.append([read_json(results / node.ref / MANIFEST)["outputs"] for node in trials])
            print(f"round {number + 1} of {arguments.rounds}, {side}: {found[side][-1]}", file=sys.stderr)
    if any(sweep != outputs[0] for sweep in outputs):
        raise SystemExit("the results of two sweeps differ")
    rows = table(found, len(trials))
    print(markdown(rows))
    print(f"{len(trials)} runs, {arguments.jobs} at a time; all {len(outputs)} sweeps gave the same bytes")
    asked = {"item": arguments.item, "trials": len(trials), "jobs": arguments.jobs, "same_bytes": True}
    return {"benchmark": "many_runs", "environment": environment(), **asked, "rows": rows, "rounds": found}


def table(found: dict[str, list[dict[str, float]]], trials: int) -> list[dict[str, Any]]:
    """Seconds per run of both sides, and by what the warm one is faster, round by round."""
    rows = []
    for side, rounds in found.items():
        row: dict[str, Any] = {"side": side}
        for name in ("cpu_s", "wall_s"):
            row[f"{name} per run"] = median_range([one[name] / trials for one in rounds])
            pairs = zip(found["cold"], rounds, strict=True)
            row[f"cold / this, {name}"] = median_range([cold[name] / one[name] for cold, one in pairs])
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
