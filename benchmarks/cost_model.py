"""The cost model against a finished run: CPU seconds, memory and disk per stage, estimated and measured.

    python -m benchmarks.cost_model --results results

Sizes are read from specs alone, as before anything has run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from prefopt.artifacts import MANIFEST, Node
from prefopt.plan import Plan
from prefopt.planning.costs import work_of
from prefopt.planning.machines import cpu_memory, cpu_seconds
from prefopt.planning.sizes import Sizes
from prefopt.specs import Config


def finished_plan(results: Path) -> tuple[Plan, dict[str, dict]]:
    """A plan of what lies in a results folder, and the manifests by ``stage/id``."""
    plan, manifests = Plan(Config(items=["*"])), {}
    for path in sorted(results.rglob(MANIFEST)):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        node = Node.from_json(manifest)
        plan.nodes[f"{manifest['stage']}/{manifest['id']}"] = node
        manifests[f"{manifest['stage']}/{manifest['id']}"] = manifest
    return plan, manifests


def compared(results: Path) -> dict[str, dict[str, float]]:
    """Sums over each stage's artifacts (memory: the largest), estimated and measured."""
    plan, manifests = finished_plan(results)
    sizes = Sizes(plan, Path("nothing-is-there"))
    stages: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for ref, manifest in manifests.items():
        stage, work = stages[manifest["stage"].split("/")[0]], work_of(sizes, plan.nodes[ref])
        stage["jobs"] += 1
        stage["cpu_s"] += cpu_seconds(work)
        stage["cpu_s_measured"] += manifest["cpu_seconds"]
        stage["disk"] += work.disk
        stage["disk_measured"] += sum(output["bytes"] for output in manifest["outputs"].values())
        stage["memory"] = max(stage["memory"], cpu_memory(work))
        stage["memory_measured"] = max(stage["memory_measured"], manifest["peak_memory_mb"] * 1e6)
    return {name: dict(stage) for name, stage in sorted(stages.items())}


def main() -> None:
    """Print the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="a finished run (default: %(default)s)")
    stages = compared(parser.parse_args().results)
    total = {key: sum(stage[key] for stage in stages.values()) for key in next(iter(stages.values()))}
    total |= {key: max(stage[key] for stage in stages.values()) for key in ("memory", "memory_measured")}
    pairs = [f"{what}: estimated | measured" for what in ("CPU s", "peak MB", "disk MB")]
    print(f"| stage | jobs | {pairs[0]} | ratio | {' | '.join(pairs[1:])} |")
    print("| --- " * 9 + "|")
    for name, s in (stages | {"all": total}).items():
        ratio = s["cpu_s"] / s["cpu_s_measured"]
        cells = [name, f"{s['jobs']:.0f}", f"{s['cpu_s']:.1f}", f"{s['cpu_s_measured']:.1f}", f"{ratio:.2f}"]
        cells += [f"{s[key] / 1e6:.0f}" for key in ("memory", "memory_measured")]
        cells += [f"{s[key] / 1e6:.2f}" for key in ("disk", "disk_measured")]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
