"""From work to time and memory on this CPU or on named GPUs. CPU rates are measured; those of GPUs are assumptions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.errors import BadInput, nearest
from prefopt.plan import Plan
from prefopt.planning.costs import Work, work_of
from prefopt.planning.sizes import Sizes
from prefopt.processes.shares import ROW_STAGES, TRAINING_STAGES, row_processes

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.specs import ExecutionSpec

# One thread of an AMD EPYC, float32, in a full run of both papers' demo items.
CPU_TRAIN, CPU_READ, CPU_WRITE = 30e9, 30e9, 2.4e9  # FLOP/s
CPU_MEMORY = 480e6  # bytes of a job that has imported torch and transformers
# Shares of a GPU's data sheet that jobs are assumed to reach: training, reading, and bandwidth while writing.
MFU_TRAIN, MFU_READ, BANDWIDTH_USED = 0.35, 0.45, 0.5
LAYER_SECONDS = 0.5e-3  # assumed launch overhead of one layer for one token
GPU_CONTEXT = 1.5e9  # bytes, assumed


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense FLOP/s, bytes of memory, bytes per second."""

    bf16: float
    fp32: float
    memory: float
    bandwidth: float


GPUS = {
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12),
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12),
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.0e12),
    "l40s": Gpu(362e12, 91.6e12, 48e9, 0.86e12),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9, 1.0e12),
}


@dataclass
class StageCost:
    """Sums over a stage's artifacts that are still to be made; memory is of its largest job."""

    jobs: int = 0
    there: int = 0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    cpu_memory: float = 0.0
    gpu_memory: float = 0.0  # on each GPU of the largest job
    gpus: int = 0  # of the largest job
    longest: float = 0.0  # seconds of the job that takes longest, on its GPUs
    sharded: bool = False  # whether a job's state is divided among its GPUs
    whole: bool = False  # whether its jobs need a whole model on every GPU
    fits: bool = True
    micro_batch: float = math.inf  # rows with which all jobs would fit; 0: none
    disk: float = 0.0
    checkpoint: float = 0.0
    dollars: float = 0.0


def parsed_gpus(text: str) -> tuple[str, int]:
    """``h100:8`` as name and number; BadInput for others."""
    name, _, number = text.lower().partition(":")
    if name not in GPUS:
        raise BadInput(f"--gpu {text}: no figures for '{name}'; {nearest(name, GPUS)}")
    if not (number or "1").isdecimal() or int(number or 1) < 1:
        raise BadInput(f"--gpu {text}: '{number}' is no number of GPUs; write {name}:8")
    return name, int(number or 1)


def cpu_seconds(work: Work) -> float:
    """FLOPs over measured rates, plus the job's fixed cost."""
    size = work.model.parameters if work.model else 0.0
    return work.fixed + work.train / CPU_TRAIN + work.read / CPU_READ + work.written * 2 * size / CPU_WRITE


def cpu_memory(work: Work) -> float:
    """Imports, the model's state and one micro-batch's activations, in bytes."""
    return CPU_MEMORY + work.state + work.activations


def gpu_seconds(work: Work, gpu: Gpu) -> float:
    """GPU time: FLOPs over assumed rates; writing is bound by reading the weights, or by starting the layers."""
    if work.model is None:
        return 0.0
    peak = gpu.bf16 if work.bf16 else gpu.fp32
    step = max(
        work.model.parameters * (2 if work.bf16 else 4) / (BANDWIDTH_USED * gpu.bandwidth),
        work.model.layers * LAYER_SECONDS,
        work.batch * 2 * work.model.parameters / (MFU_READ * peak),
    )
    return work.train / (MFU_TRAIN * peak) + work.read / (MFU_READ * peak) + work.written / work.batch * step


def placed(work: Work, gpu: Gpu, number: int, processes: int = 1) -> tuple[int, float, bool]:
    """How many GPUs a training job takes, bytes on each, and whether it fits.

    As many as it has processes if it fits on one; else all, with its state sharded.
    """
    if work.model is None or not work.state:
        return 0, 0.0, True
    on_one = GPU_CONTEXT + work.state + work.activations
    if on_one <= gpu.memory:
        return min(processes, number), on_one, True
    sharded = GPU_CONTEXT + work.state / number + work.activations
    return number, sharded, sharded <= gpu.memory


def placed_rows(work: Work, gpu: Gpu, number: int, processes: int) -> tuple[int, float, bool]:
    """The same of a job that runs a whole model over rows in every process; answers are divided by whole batches."""
    if work.model is None or not work.state:
        return 0, 0.0, True
    batches = math.ceil(work.written / work.answer / work.batch) if work.written else processes
    on_one = GPU_CONTEXT + work.state + work.activations
    return max(1, min(processes, number, batches)), on_one, on_one <= gpu.memory


def _fitting_rows(work: Work, gpu: Gpu, number: int) -> int:
    """Rows of a micro-batch whose activations fit beside the sharded state; 0 if not one does."""
    left = gpu.memory - GPU_CONTEXT - work.state / number
    return max(0, math.floor(left * work.rows / work.activations)) if work.activations else 0


def stage_costs(plan: Plan, sizes: Sizes, there: Iterable[str], gpus: tuple[str, int] | None) -> dict[str, StageCost]:
    """Costs of every stage of a plan; artifacts whose ref is in ``there`` cost nothing."""
    found: dict[str, StageCost] = {}
    there = set(there)
    for node in plan.reachable(plan.items.values()):
        stage = found.setdefault(node.stage.split("/", maxsplit=1)[0], StageCost())
        if node.ref in there:
            stage.there += 1
            continue
        work = work_of(sizes, node)
        stage.jobs += 1
        stage.cpu_seconds += cpu_seconds(work)
        rows, processes = node.stage in ROW_STAGES, processes_of(node, plan.config.execution)
        stage.cpu_memory = max(stage.cpu_memory, processes * cpu_memory(work))
        stage.disk += work.disk
        stage.checkpoint = max(stage.checkpoint, work.checkpoint)
        stage.dollars += work.dollars
        if gpus is not None:
            gpu, seconds = GPUS[gpus[0]], gpu_seconds(work, GPUS[gpus[0]])
            number, memory, fits = (placed_rows if rows else placed)(work, gpu, gpus[1], processes)
            stage.gpu_seconds += seconds
            stage.longest = max(stage.longest, seconds / max(number, 1))
            stage.fits &= fits
            stage.whole |= rows
            stage.sharded |= not rows and number > processes
            if not fits:
                stage.micro_batch = min(stage.micro_batch, _fitting_rows(work, gpu, gpus[1]))
            stage.gpus, stage.gpu_memory = max((stage.gpus, stage.gpu_memory), (number, memory))
    return found


def processes_of(node: Node, execution: ExecutionSpec) -> int:
    """Processes of the job that makes an artifact."""
    return execution.processes if node.stage in TRAINING_STAGES else row_processes(node, execution)
