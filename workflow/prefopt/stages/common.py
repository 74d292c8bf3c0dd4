"""What a job does beside its work: warnings, its device, rows kept on the way, a training run written down."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.artifacts import outputs_digest
from prefopt.digests import short_digest
from prefopt.files import write_lines
from prefopt.processes import parallel
from prefopt.processes.rows import Kept
from prefopt.store.builds import Build

if TYPE_CHECKING:
    from prefopt.stages import RunOptions
    from prefopt.training.objectives import Objective
    from prefopt.training.training_run import Visits

log = logging.getLogger(__name__)


def warn(build: Build, text: str) -> None:
    """Say it in the log and keep it in the manifest's summary, where the report finds it."""
    log.warning("%s", text)
    build.summary.setdefault("warnings", []).append(text)


def device_of(build: Build, options: RunOptions) -> str:
    """The device this job runs on, recorded in the manifest; ``auto`` takes CUDA where there is a device."""
    from prefopt.models import pick_device

    build.device = pick_device(options.device)
    return build.device


def kept_rows(build: Build, name: str, keys: Sequence[Any]) -> Kept:
    """Where one pass of this job keeps finished rows: bound to the artifact, and to the bytes of its parents."""

    def folder() -> Path:
        made_from = {role: outputs_digest(build.parent(role)) for role in build.node.parents}
        return root / short_digest(made_from) / name

    root = build.scratch / "rows"
    return Kept(root, folder, list(keys))


def run_training(
    build: Build, options: RunOptions, model: Any, objective: Objective, seed: int, *, visits: Visits | None = None
) -> list[dict[str, Any]]:
    """Train with the spec's ``train`` section; the learning curve becomes an output.

    Returns the curve: one dict of metrics per step.
    """
    from prefopt.specs import TrainSpec
    from prefopt.trainer import train
    from prefopt.training.kernels import use_liger

    build.summary |= {"liger": True} if use_liger(model) else {}
    result = train(
        model,
        objective,
        TrainSpec.model_validate(build.node.spec["train"]),
        seed=seed,
        state_dir=build.scratch / "checkpoints",
        micro_batch=options.micro_batch,
        checkpoint_steps=options.checkpoint_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        compile_layers=options.compile,
        sharding=options.sharding,
        device=device_of(build, options),
        visits=visits,
    )
    write_lines(build.work / "metrics.jsonl", result.metrics)
    if parallel.world() > 1:
        build.summary |= {"processes": parallel.world(), "sharding": options.sharding}
    build.summary |= {"steps": result.steps, "train_seconds": round(result.seconds, 3)}
    build.summary |= {"last_tenth": _last_tenth(result.metrics)}
    return result.metrics


def _last_tenth(curve: list[dict[str, Any]]) -> dict[str, float]:
    """Means of a curve's metrics over its last tenth: single steps are too noisy to compare."""
    last = curve[-max(1, len(curve) // 10) :]
    return {key: sum(step[key] for step in last) / len(last) for key in last[0] if key != "step"}
