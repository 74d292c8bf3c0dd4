# What the rules share: the plan, input functions over it, and resources. No logic of its own.
import os
import re
import shlex
import sys
from pathlib import Path

from prefopt.config import check_place
from prefopt.errors import PrefoptError, one_line
from prefopt.plan import load_plan
from prefopt.shares import row_processes
from prefopt.storage import told

try:
    check_place(Path.cwd(), Path(workflow.basedir))
    PLAN = load_plan(Path("config/config.yaml"), config)
    RESULTS = PLAN.config.results
    PLAN.write_specs(Path(RESULTS))
except Exception as error:
    failure = (
        error if isinstance(error, PrefoptError) else told(error, config["results"])
    )
    if failure is None:
        raise
    print(f"prefopt plan: {one_line(failure)}", file=sys.stderr, flush=True)
    os._exit(
        failure.exit_code
    )  # Snakemake would bury the one line under its own traceback

EXECUTION = PLAN.config.execution

# Without GPUs in config.yaml a job stays on the CPU, also on a machine that has one.
DEVICE = "cuda" if EXECUTION.gpus else "cpu"
LAYERS = "".join(
    option
    for option, wanted in (
        (" --gradient-checkpointing", EXECUTION.gradient_checkpointing),
        (" --compile", EXECUTION.compile),
    )
    if wanted
)

# Training jobs of several processes, one per GPU where there are GPUs.
PROCESSES = EXECUTION.processes
PYTHON, SHARDING = "python", ""
if PROCESSES > 1:
    # torchrun kills after 30 s what has not saved its state; a scheduler's grace period should decide that.
    PYTHON = (
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}}"
        f" OMP_NUM_THREADS={EXECUTION.threads} torchrun --standalone --nproc-per-node {PROCESSES}"
    )
    SHARDING = f" --sharding {EXECUTION.sharding}"
ROW_PROCESSES = EXECUTION.row_processes or PROCESSES
TRAINING_GPUS = max(EXECUTION.gpus, PROCESSES) if EXECUTION.gpus else 0

# Jobs find the package beside the rules, also in a conda environment that has only its dependencies.
shell.prefix(
    f"export PYTHONPATH={shlex.quote(str(Path(workflow.basedir) / 'workflow'))}; "
)


wildcard_constraints:
    id=r"[a-z0-9][a-z0-9_.-]*-[0-9a-f]{8}",
    paper=r"[a-z0-9_-]+",


def manifest(ref):
    """Path of an artifact's manifest."""
    return f"{RESULTS}/{ref}/manifest.json"


def items(paper=None, scale=None):
    """Manifests of the configured items, of one paper or one scale."""
    return [
        manifest(node.ref)
        for node in PLAN.items.values()
        if paper in (None, node.spec["item"]["paper"])
        and scale in (None, node.spec["item"]["scale"])
    ]


def manifests_below_items():
    """Manifests of everything that the items are made from."""
    roots = {node.ref for node in PLAN.items.values()}
    return [
        manifest(node.ref)
        for node in PLAN.reachable(PLAN.items.values())
        if node.ref not in roots
    ]


def parent(stage, role):
    """Input function: the manifest of the parent in that role, nothing where the plan wired none."""

    def find(wildcards):
        ref = PLAN.node(f"{stage}/{wildcards.id}").parents.get(role)
        return manifest(ref) if ref else []

    return find


def parents(stage, prefix=""):
    """Input function: the manifests of all parents whose role starts with the prefix."""

    def find(wildcards):
        node = PLAN.node(f"{stage.format(**wildcards)}/{wildcards.id}")
        return [
            manifest(ref)
            for role, ref in node.parents.items()
            if role.startswith(prefix)
        ]

    return find


def one_of(ids):
    """Wildcard pattern of exactly these ids; none of them matches nothing."""
    return "|".join(map(re.escape, ids)) or r"(?!)"


def micro_batch(wildcards, attempt):
    """Rows in memory at a time: halved with every attempt, so that a job killed for memory fits the next time."""
    return max(1, EXECUTION.micro_batch >> (attempt - 1))


def memory(gigabytes):
    """Memory in MB that grows with the attempt."""
    return lambda wildcards, attempt: int(1000 * gigabytes * attempt)


def minutes(count):
    """Run time in minutes that grows with the attempt."""
    return lambda wildcards, attempt: count * attempt


# Snakemake's own setting of this is for all processes of a job together.
EACH = f"OMP_NUM_THREADS={EXECUTION.threads} " if ROW_PROCESSES > 1 else ""


def processes(stage):
    """Input function: processes of a job that runs a model over rows, where its rows can be divided."""
    return lambda wildcards: row_processes(
        PLAN.node(f"{stage}/{wildcards.id}"), EXECUTION
    )


def row_threads(stage):
    """Input function: threads of all processes of such a job."""
    return lambda wildcards: EXECUTION.threads * processes(stage)(wildcards)


def row_memory(stage):
    """Memory in MB of all processes of such a job, which grows with the attempt."""
    return lambda wildcards, attempt: 8000 * processes(stage)(wildcards) * attempt


def row_gpus(stage):
    """Input function: a GPU for each process of such a job, where jobs have GPUs."""
    return lambda wildcards: (
        max(EXECUTION.gpus, processes(stage)(wildcards)) if EXECUTION.gpus else 0
    )


def one_process(verb):
    """Command line of a stage that trains."""
    return (
        f"python -m prefopt {verb} --spec {{input.spec:q}} --device {{resources.device}}"
        " --micro-batch {resources.micro_batch} --checkpoint-steps {resources.checkpoint_steps}"
        + LAYERS
    )


def trained_by(verb):
    """Command line of a stage that trains, in as many processes as config.yaml says."""
    return one_process(verb).replace("python", PYTHON, 1) + SHARDING
