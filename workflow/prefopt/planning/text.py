"""What ``prefopt plan`` prints: stages to make, what is there, and what the rest will cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefopt.artifacts import MANIFEST
from prefopt.plan import Plan
from prefopt.planning.machines import BANDWIDTH_USED, LAYER_SECONDS, MFU_READ, MFU_TRAIN, StageCost, stage_costs
from prefopt.planning.sizes import Sizes


def plan_lines(plan: Plan, gpus: tuple[str, int] | None = None, listed: bool = False) -> list[str]:
    """The plan as text, ``gpus`` as name and number; ``listed``: every artifact instead of sums by stage."""
    results = Path(plan.config.results)
    nodes = plan.reachable(plan.items.values())
    there = {node.ref for node in nodes if (results / node.ref / MANIFEST).is_file()}
    lines = []
    if listed:
        lines += [f"{'have' if node.ref in there else 'make'}  {node.ref}" for node in nodes]
    sizes = Sizes(plan, results)
    stages = stage_costs(plan, sizes, there, gpus)
    if not listed:
        lines += _aligned(_gpu_rows(stages) if gpus else _cpu_rows(stages))
    lines += ["", *(f"item  {name}: {results / node.ref}" for name, node in plan.items.items())]
    if len(there) < len(nodes):
        lines += ["", *_estimate(stages, gpus), *_assumptions(sizes, gpus)]
    counted = [_counted(len(plan.items), "item"), _counted(len(plan.nodes), "artifact")]
    return [*lines, f"{', '.join(counted)}, {len(nodes) - len(there)} to make"]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cpu_rows(stages: Mapping[str, StageCost]) -> list[list[str]]:
    rows = [["stage", "make", "have", "CPU time", "memory", "disk"]]
    for name, stage in stages.items():
        costs = [duration(stage.cpu_seconds), size(stage.cpu_memory), size(stage.disk)] if stage.jobs else [""] * 3
        rows.append([name, str(stage.jobs), str(stage.there), *costs])
    return rows


def _gpu_rows(stages: Mapping[str, StageCost]) -> list[list[str]]:
    rows = [["stage", "make", "have", "GPU-hours", "GPUs per job", "longest job", "memory per GPU", "fits", "disk"]]
    for name, stage in stages.items():
        costs = [""] * 5
        if stage.gpus:
            fits = ("sharded" if stage.sharded else "yes") if stage.fits else "no"
            hours, longest = f"{stage.gpu_seconds / 3600:.2f}", duration(stage.longest)
            costs = [hours, str(stage.gpus), longest, size(stage.gpu_memory), fits]
        rows.append([name, str(stage.jobs), str(stage.there), *costs, size(stage.disk) if stage.jobs else ""])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _estimate(stages: Mapping[str, StageCost], gpus: tuple[str, int] | None) -> list[str]:
    made = [stage for stage in stages.values() if stage.jobs]
    if gpus is None:
        seconds, cores = sum(stage.cpu_seconds for stage in made), len(os.sched_getaffinity(0))
        spent = f"{duration(seconds)} of CPU time (at best {duration(seconds / cores)} on {_counted(cores, 'core')}), "
        spent += f"{size(max(stage.cpu_memory for stage in made))} for the largest job"
    else:
        spent = f"{sum(stage.gpu_seconds for stage in made) / 3600:.1f} GPU-hours of {gpus[0]}"
    lines = [f"estimate: {spent}; disk {size(sum(stage.disk for stage in made))}"]
    if checkpoint := max(stage.checkpoint for stage in made):
        lines[0] += f", and {size(checkpoint)} for a job's checkpoint while it trains"
    if dollars := sum(stage.dollars for stage in made):
        lines.append(f"estimate: {dollars:.0f} US dollars for a judge's server, at the declared prices")
    for name, stage in stages.items():
        if gpus and not stage.fits:
            lines.append(f"{name} does not fit on {gpus[1]} x {gpus[0]}: {_way_out(stage)}")
    return lines


def _way_out(stage: StageCost) -> str:
    if stage.whole:
        return "every one of its processes holds a whole model; take GPUs with more memory"
    if stage.micro_batch >= 1:
        return f"set execution.micro_batch: {stage.micro_batch:.0f} in config.yaml, or gradient_checkpointing: true"
    return "set execution.gradient_checkpointing: true and a lower micro_batch in config.yaml, or take more GPUs"


def _assumptions(sizes: Sizes, gpus: tuple[str, int] | None) -> list[str]:
    lines = [f"assumed: {line}" for line in sizes.assumed]
    if gpus:
        lines.append(
            f"assumed: {MFU_TRAIN:.0%} of {gpus[0]}'s data-sheet FLOP rate in training, {MFU_READ:.0%} in reading, "
            f"{BANDWIDTH_USED:.0%} of its bandwidth in writing, {1000 * LAYER_SECONDS:g} ms a layer; not measured"
        )
        if any(stage.sharded for stage in stage_costs(sizes.plan, sizes, (), gpus).values()):
            lines.append(
                "assumed: what does not fit on one GPU has its state divided evenly (execution.sharding: full)"
            )
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"
    return f"{count / 1e3:.0f} kB"
