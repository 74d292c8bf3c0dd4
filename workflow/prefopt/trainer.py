"""The training loop, the same for supervised fine-tuning, reward models and policies."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import BadInput, TryAgain
from prefopt.lazy import LazyModule
from prefopt.processes import parallel
from prefopt.progress import Progress
from prefopt.training.checkpoints import check_finite
from prefopt.training.layers import layers_run
from prefopt.training.objectives import Objective
from prefopt.training.training_run import Metrics, Run, Visits

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prefopt.specs import TrainSpec
else:
    torch = LazyModule("torch")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Optimiser steps done, one dict of metrics per step, and seconds of training over all attempts."""

    steps: int
    metrics: list[Metrics]
    seconds: float


def train(
    model: PreTrainedModel,
    objective: Objective,
    spec: TrainSpec,
    *,
    seed: int,
    state_dir: Path,
    micro_batch: int,
    checkpoint_steps: int,
    device: str,
    on_metrics: Callable[[Metrics], None] | None = None,
    visits: Visits | None = None,
    progress: bool = True,
    gradient_checkpointing: bool = False,
    compile_layers: bool = False,
    sharding: str = "none",
) -> TrainResult:
    """Optimise ``model`` in place; a run that was cut off goes on from the newest checkpoint in ``state_dir``.

    A step's loss is the mean over the effective batch of spec.batch_size rows, however it is split into micro-batches.
    Gradient checkpointing and compiled layers change memory and time: see ``layers.layers_run``.
    A resumed run ends in the same weights and metrics as one that was not cut off, and ``visits`` change neither.
    As one of several processes (see ``parallel``) it computes its share of every batch, and all end in the same
    weights; ``sharding`` full divides weights, gradients and optimiser state among them in the meantime.
    Raises TryAgain after SIGTERM (state saved) or when memory runs out, FailedCheck where loss, gradient or weights are
    not finite (no state saved, so that the last checkpoint is a good one).
    """
    if micro_batch < 1 or objective.size < 1:
        raise BadInput(f"{objective.size} rows to train on, in micro-batches of {micro_batch}; both must be 1 or more")
    _check_processes(objective, visits, sharding, compile_layers)
    micro_batch = _usable_micro_batch(objective, spec, micro_batch)
    run = Run(
        model,
        objective,
        spec,
        seed=seed,
        state_dir=state_dir,
        micro_batch=micro_batch,
        device=device,
        sharded=sharding == "full" and parallel.world() > 1,
    )
    gpus = range(torch.cuda.device_count()) if device == "cuda" else []
    layers = layers_run(run.model, checkpointing=gradient_checkpointing, compiled=compile_layers)
    with layers, torch.random.fork_rng(devices=gpus), _termination() as terminated:
        torch.manual_seed(seed)
        run.resume()
        run.visit(visits, gpus)
        with Progress(run.steps, "train", start=run.step, shown=progress and parallel.is_main()) as bar:
            while run.step < run.steps:
                metrics = run.advance()
                if on_metrics is not None:
                    on_metrics(metrics)
                bar.advance(f"loss {metrics['loss']:.4g}")
                run.visit(visits, gpus)
                stop = parallel.any_of(terminated.is_set())
                if run.step < run.steps and (stop or run.step % checkpoint_steps == 0):
                    run.save()
                    if stop:
                        raise parallel.together(
                            TryAgain(
                                f"terminated after step {run.step} of {run.steps}; the state is in {state_dir}, "
                                "run the same command again to go on"
                            )
                        )
    if run.divided is not None:
        run.divided.put_back(device)
    check_finite(model, run.step)
    return TrainResult(run.step, run.metrics, round(run.seconds, 3))


def _check_processes(objective: Objective, visits: Visits | None, sharding: str, compiled: bool) -> None:
    """BadInput where several processes cannot do what is asked for."""
    if parallel.world() == 1:
        if sharding == "full":
            raise BadInput(
                "sharding full divides a model among processes, and this is the only one; see docs/cluster.md"
            )
        return
    if not objective.divisible:
        raise BadInput(
            f"this loss looks at the whole batch, which {parallel.world()} processes would split; train with "
            "execution.processes: 1"
        )
    if sharding == "full" and compiled:
        raise BadInput("execution.compile does not go with execution.sharding: full; leave one of them out")
    if sharding == "full" and visits is not None:
        raise BadInput("a run whose model is looked at on the way cannot be divided; use execution.sharding: none")


def _usable_micro_batch(objective: Objective, spec: TrainSpec, micro_batch: int) -> int:
    """Rows per forward pass; all of the effective batch where its loss cannot be split."""
    if objective.divisible or micro_batch >= spec.batch_size:
        return min(micro_batch, spec.batch_size)
    _log.warning("this loss looks at the whole batch: micro_batch is %d, not %d", spec.batch_size, micro_batch)
    return spec.batch_size


@contextmanager
def _termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process; outside the main thread nothing ever sets it."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)
