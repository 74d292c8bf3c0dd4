"""A training run as several processes under torchrun: who it is, what is summed, and that one of them writes.

Every process has the whole batch's row numbers and takes its share of the rows. A step's loss is a sum over rows over
the weight of the whole batch, so the sum of all processes' gradients is the gradient that one process would have had.
Nothing here averages: torch's DistributedDataParallel does, wants one forward pass of one module per backward pass,
and gathers in the middle of the accumulation, whereas objectives run body and head by themselves, and several times.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt import team
from prefopt.errors import AlreadyMade, BadInput, FailedCheck, PrefoptError
from prefopt.lazy import LazyModule
from prefopt.processes.shares import gpu_of

if TYPE_CHECKING:
    import torch
    from torch import distributed as dist

    from prefopt.artifacts import Node
    from prefopt.store.builds import Build
else:
    torch = LazyModule("torch")
    dist = LazyModule("torch.distributed")

_PATIENCE = timedelta(hours=2)  # the others wait that long while the first one writes


def launched() -> int:
    """Processes that torchrun or ``accelerate launch`` started this one among; 1 where neither did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def label() -> str:
    """What tells this process's messages from those of the first one."""
    return f" (process {os.environ['RANK']})" if launched() > 1 and os.environ["RANK"] != "0" else ""


@contextmanager
def started(verb: str, *, several: bool, device: str) -> Iterator[None]:
    """Join the processes that were launched with this one, if any; BadInput where ``verb`` cannot be ``several``.

    ``device`` auto and cuda give process i of a machine its GPU i.
    """
    count = launched()
    if count == 1:
        yield
        return
    if not several:
        raise BadInput(f"{verb} was started as {count} processes, and runs as one; start it as python -m prefopt")
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        take_gpu(int(os.environ["LOCAL_RANK"]), device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    if not is_main():
        logging.getLogger().setLevel(logging.WARNING)
    try:
        yield
    finally:
        dist.destroy_process_group()


def take_gpu(local_rank: int, device: str) -> None:
    """Make the GPU of this machine's process with that number the one that cuda means; nothing where there is none."""
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(gpu_of(local_rank, torch.cuda.device_count()))


def world() -> int:
    """Processes of this run."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))  # by the CPU's backend, also where gradients go another way


def shares(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """The rows of every process: dealt by falling length, so that all have about as many tokens."""
    if world() == 1:
        return [[*rows]]
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    return [order[at :: world()] for at in range(world())]


def all_reduce_sums(sums: dict[str, float]) -> dict[str, float]:
    """Every value summed over the processes, which have the same names."""
    if world() == 1:
        return sums
    values = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
    dist.all_reduce(values)
    return sums | dict(zip(sorted(sums), values.tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all of them."""
    return all_reduce_sums({"flag": float(flag)})["flag"] > 0


def check_same(value: int, what: str) -> None:
    """FailedCheck where the processes differ in a number."""
    if world() == 1:
        return
    low, high = torch.tensor([value]), torch.tensor([value])
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if low != high:
        raise together(FailedCheck(f"{what} differs between processes: {int(low)} and {int(high)}"))


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place."""
    if world() == 1:
        return
    works = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
    for work in works:
        work.wait()


def together(error: PrefoptError) -> BaseException:
    """What to raise where all processes fail for one reason: the first one tells it, the others end without a word.

    They end with exit code 0, since torchrun kills all others as soon as one process fails.
    """
    return error if is_main() else SystemExit(0)


@contextmanager
def building_together(node: Node, results: Path) -> Iterator[Build]:
    """``builds.building`` in the first process; what the others write goes to a folder that is thrown away."""
    from prefopt.store.builds import SCRATCH, Build, building

    with ExitStack() as stack:
        made: AlreadyMade | None = None
        build: Build | None = None
        if is_main() and team.is_first():
            try:
                build = stack.enter_context(building(node, results))
            except AlreadyMade as error:
                made = error
        if any_of(made is not None):
            raise together(made or AlreadyMade(node.ref))
        team.barrier()  # until the first one has the artifact's lock
        if build is not None:
            yield build
            team.barrier()  # nobody reads from the scratch folder any more
            return
    with tempfile.TemporaryDirectory(prefix="prefopt-") as folder:
        scratch = results / SCRATCH / node.ref
        yield Build(node=node, results=results, work=Path(folder), scratch=scratch)
        team.barrier()


def _joined() -> bool:
    return launched() > 1 and dist.is_available() and dist.is_initialized()
