"""How a job's rows are divided among processes: which jobs' can be, who takes what, and on which GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefopt.errors import BadInput

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.specs import ExecutionSpec

TRAINING_STAGES = frozenset({"sft", "reward", "policy"})
ROW_STAGES = frozenset({"reference", "samples", "rewards", "win_rates", "generations", "judgements", "sampled_pairs"})


def row_processes(node: Node, execution: ExecutionSpec) -> int:
    """Processes of the job that makes an artifact by running a model over rows; 1 for all other jobs.

    ``execution.row_processes``, and ``processes`` where that is not given. Judges that are no model of ours, and
    vLLM, which takes a GPU for itself, run as one process.
    """
    return (execution.row_processes or execution.processes) if has_divisible_rows(node) else 1


def has_divisible_rows(node: Node) -> bool:
    """Whether a model of ours runs over rows that do not depend on each other."""
    if node.stage not in ROW_STAGES:
        return False
    if node.stage == "judgements":
        judge = node.spec["judge"]
        return judge == "reward_model" if isinstance(judge, str) else judge["kind"] == "lm"
    if node.stage == "sampled_pairs":
        return not node.spec["oracle"]
    return node.spec.get("sampling", {}).get("engine") != "vllm"


def check_divisible(node: Node, processes: int) -> None:
    """BadInput where a job is asked to run as several processes and cannot."""
    if processes > 1 and not has_divisible_rows(node):
        raise BadInput(f"{node.ref}: runs no model of ours that {processes} processes could share; use --processes 1")


def shares(costs: Sequence[float], size: int) -> list[list[int]]:
    """Numbers of the pieces that each of ``size`` processes takes, every piece once, in their order.

    The dearest first, each to whoever has least so far: no load is above mean + max of the costs.
    """
    loads = [0.0] * size
    found: list[list[int]] = [[] for _ in range(size)]
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        rank = loads.index(min(loads))
        loads[rank] += costs[piece]
        found[rank].append(piece)
    return [sorted(pieces) for pieces in found]


def gpu_of(local_rank: int, gpus: int) -> int:
    """The GPU of a machine's process with that number; BadInput where there are fewer GPUs than processes."""
    if local_rank >= gpus:
        raise BadInput(f"process {local_rank} of this machine has no GPU: there are {gpus}; start as many processes")
    return local_rank
