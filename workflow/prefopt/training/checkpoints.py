"""A training run's state on disk: whole or not there, the last two kept."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.digests import canonical_json
from prefopt.errors import BadInput, FailedCheck
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")

_KEPT = 2
_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, run: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write ``state`` of the run described by ``run`` as step-<step>.pt, then remove all but the last two files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save({"run": canonical_json(run), "step": step, "state": state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    for old in _files(folder)[:-_KEPT]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, run: dict[str, Any], device: str) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest readable checkpoint, or None where there is none.

    Unreadable files are passed over with a warning. Raises BadInput where a checkpoint belongs to another run.
    """
    for leftover in folder.glob(".*.part"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    for path in reversed(_files(folder)):
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            found, step, state = content["run"], content["step"], content["state"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            _log.warning("%s cannot be read (%s); trying the one before it", path, type(error).__name__)
            continue
        if found != canonical_json(run):
            raise BadInput(f"{path}: this checkpoint is of another run; remove {folder} to start anew")
        return step, state
    return None


def check_finite(model: PreTrainedModel, step: int) -> None:
    """FailedCheck where a step has left weights that are not finite: they are neither kept nor gone on from."""
    for name, part in model.named_parameters():
        if part.requires_grad and not bool(part.isfinite().all()):
            raise FailedCheck(f"step {step}: weights of {name} are not finite after it; lower the learning rate")


def trained_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state without weights that training leaves as they are."""
    frozen = {name for name, part in model.named_parameters(remove_duplicate=False) if not part.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def take_over(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Load a trained state from a checkpoint in ``folder``; BadInput where it is not this model's."""
    missing, unknown = model.load_state_dict(state, strict=False)
    different = [*unknown, *(name for name in missing if name in trained_state(model))]
    if different:
        raise BadInput(f"{folder}: the checkpoint differs in {different[0]}; remove {folder} to start anew")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))
