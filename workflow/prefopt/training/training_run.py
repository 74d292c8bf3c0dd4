"""One training run: its state, its steps, and its checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.engine.packed_attention import packs
from prefopt.engine.precision import set_precision
from prefopt.errors import BadInput, FailedCheck, TryAgain
from prefopt.lazy import LazyModule
from prefopt.processes import parallel
from prefopt.training.checkpoints import check_finite, load_checkpoint, save_checkpoint, take_over, trained_state
from prefopt.training.objectives import Moment, Objective, rows_of_stream
from prefopt.training.optimizers import new_optimizer, rate_factor, total_steps

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from prefopt.specs import TrainSpec
    from prefopt.training.sharding import Divided
else:
    torch = LazyModule("torch")

Metrics = dict[str, float]

_NAMES_SHOWN = 16
_CPU_TOKENS = 1024  # a CPU gains nothing from larger pieces, and they are padded to their longest row
_CPU_TOKENS_PACKED = 2048  # without padding, fewer calls count for more
_CPU_NUMBERS_PACKED = 1 << 19  # tokens x width: those of narrow models fit a CPU's caches all the same
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Visits:
    """``call(model, step)`` after that many optimiser steps, 0 = before the first; the model must be left as it is.

    A visit comes before the checkpoint of its step. A resumed run repeats the visit of the step that it resumes at, and
    none of an earlier step.
    """

    steps: Collection[int]
    call: Callable[[PreTrainedModel, int], None]


def micro_batches(rows: Sequence[int], lengths: Sequence[int], size: int, tokens: int | None = None) -> list[list[int]]:
    """Rows of one effective batch by falling length, in pieces of at most ``size`` rows and, padded, ``tokens`` tokens.

    A row longer than that stands alone. Similar lengths stand together, so there is little padding.
    """
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        fits = parts and len(parts[-1]) < size
        if fits and tokens is not None:
            fits = (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= tokens
        if fits:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


class Run:
    """State of one training run: all that a checkpoint holds, and what it takes to do a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        spec: TrainSpec,
        *,
        seed: int,
        state_dir: Path,
        micro_batch: int,
        device: str,
        sharded: bool = False,
    ) -> None:
        self.objective, self.spec, self.seed, self.state_dir = objective, spec, seed, state_dir
        self.micro_batch, self.device = micro_batch, device
        self.accelerator = _new_accelerator(device)
        self.divided: Divided | None = None
        if sharded:
            from prefopt.training.sharding import Divided

            self.divided = Divided(model, device, spec.precision)
            self.model, self.loss = self.divided.model, partial(self.divided, objective.loss)
        else:
            self.model = set_precision(model.to(device), spec.precision).eval()  # eval: dropout off, gradients on
            self.loss = partial(objective.loss, self.model)
        self.tokens = None
        if device == "cpu" and objective.divisible:
            self.tokens = _packed_tokens(self.model) if packs(self.model) else _CPU_TOKENS
        self.optimizer = new_optimizer(self.model, spec)
        self.parameters = list(self.model.parameters())
        self.steps = total_steps(spec, objective.size)
        self.step, self.seconds = 0, 0.0
        self.metrics: list[dict[str, float]] = []
        self.identity: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "seed": seed, "rows": objective.size}

    def resume(self) -> None:
        """Take over the newest checkpoint, if there is one."""
        found = load_checkpoint(self.state_dir, self.identity, "cpu" if self.divided else self.device)
        parallel.check_same(found[0] if found else 0, f"the newest checkpoint in {self.state_dir}")
        if found is None:
            return
        self.step, state = found
        trained, optimizer = state["model"], state["optimizer"]
        if self.divided is not None:
            from prefopt.training.sharding import divide_model_state, divide_optimizer_state

            trained = divide_model_state(self.model, trained)
            optimizer = divide_optimizer_state(self.optimizer, optimizer)
        take_over(self.model, trained, self.state_dir)
        self.optimizer.load_state_dict(optimizer)
        self.metrics, self.seconds = state["metrics"], state["seconds"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
        _log.info("going on from step %d of %d in %s", self.step, self.steps, self.state_dir)

    def save(self) -> None:
        """Write a checkpoint of the whole state, by one process.

        The sampler and the schedule are functions of the step, so they have no state.
        """
        if self.divided is None:  # divided weights are on no process whole
            check_finite(self.model, self.step)
        state = {
            "model": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "metrics": self.metrics,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device == "cuda" else [],
        }
        if self.divided is not None:
            from prefopt.training.sharding import gathered

            state = gathered(state)
        if parallel.is_main():
            save_checkpoint(self.state_dir, self.step, self.identity, state)
        parallel.barrier()

    def visit(self, visits: Visits | None, gpus: Collection[int]) -> None:
        """Show the model to the visitor that wants it at this step; random states are as before afterwards."""
        if visits is None or self.step not in visits.steps:
            return
        with torch.random.fork_rng(devices=gpus), torch.no_grad():
            visits.call(self.model, self.step)

    def advance(self) -> Metrics:
        """One optimiser step on the next effective batch."""
        started = time.monotonic()
        before = self.step * self.spec.batch_size
        rows = rows_of_stream(self.objective.size, self.seed, before, self.spec.batch_size)
        rate = self.spec.learning_rate * rate_factor(self.spec, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _out_of_memory(self.micro_batch, self.state_dir):
            sums = self._gradients(rows, before)
        if self.divided is not None:
            norm = self.divided.clip(self.spec.max_grad_norm)
        else:
            parallel.sum_gradients(self.parameters)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.max_grad_norm)
        sums["grad_norm"] = float(norm)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(sums[name]):
                error = FailedCheck(
                    f"step {self.step + 1} of {self.steps}: {name} is {sums[name]}, on pairs {self._suspects(rows)}; "
                    "no weights were changed by this step. Lower the learning rate, or look at these pairs"
                )
                raise parallel.together(error)
        self.optimizer.step()
        self.step += 1
        metrics = {"step": self.step, **sums, "learning_rate": rate}
        self.metrics.append(metrics)
        self.seconds += time.monotonic() - started
        return metrics

    def _gradients(self, rows: list[int], before: int) -> Metrics:
        """Gradients of this process's part of the mean loss over ``rows``; the means of loss and other quantities."""
        self.optimizer.zero_grad()
        weight = self.objective.weight(rows)
        totals: dict[str, torch.Tensor] = {}
        parts, before = self._parts(rows, before)
        for part, share in parts:
            loss, sums = self.loss(part, Moment(self.step, self.steps, before))
            self.accelerator.backward(loss / weight if share else loss * 0.0)
            for name, value in {"loss": loss.detach(), **sums}.items():
                counted = value if share else value * 0
                totals[name] = totals[name] + counted if name in totals else counted
            before += len(part)
        return parallel.all_reduce_sums({name: float(value) / weight for name, value in totals.items()})

    def _parts(self, rows: list[int], before: int) -> tuple[list[tuple[list[int], bool]], int]:
        """This process's micro-batches and whether they count, and the rows of the run that come before them.

        All processes have equally many, since they gather weights together: where one has fewer, a row that counts
        nothing is computed.
        """
        shares = parallel.shares(rows, self.objective.lengths)
        parts = [micro_batches(share, self.objective.lengths, self.micro_batch, self.tokens) for share in shares]
        own = [(part, True) for part in parts[parallel.rank()]]
        idle = max(map(len, parts)) - len(own)
        return own + idle * [(rows[:1], False)], before + sum(map(len, shares[: parallel.rank()]))

    def _suspects(self, rows: list[int]) -> str:
        """Names of the rows whose own loss is not finite, or of all where each alone is fine."""
        moment = Moment(self.step, self.steps, self.step * self.spec.batch_size)
        with torch.no_grad():
            alone = {row: float(self.loss([row], moment)[0]) for row in rows}
        names = self.objective.names([row for row in rows if not math.isfinite(alone[row])] or rows)
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        return ", ".join(names[:_NAMES_SHOWN]) + more


def _packed_tokens(model: PreTrainedModel) -> int:
    return max(_CPU_TOKENS_PACKED, _CPU_NUMBERS_PACKED // model.config.get_text_config().hidden_size)


def _new_accelerator(device: str) -> Accelerator:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.num_processes != parallel.world():
        raise BadInput(f"one of {accelerator.num_processes} processes that did not join: train inside parallel.started")
    return accelerator


@contextmanager
def _out_of_memory(micro_batch: int, state_dir: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a GPU has its own kind of error, a CPU only this text
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TryAgain(
            f"out of memory with micro_batch {micro_batch}; run again with a smaller one or with gradient "
            "checkpointing, the result is the same. "
            f"Checkpoints are in {state_dir}"
        ) from error
