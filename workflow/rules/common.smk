# What the rules share: the plan, input functions over it, and resources. No logic of its own.
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

from snakemake.io import flag
from snakemake.path_modifier import PATH_MODIFIER_FLAG

from prefopt.planning.config import check_place
from prefopt.errors import PrefoptError, one_line
from prefopt.plan import load_plan
from prefopt.processes.shares import row_processes
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


# With --default-storage-provider results lie in a storage, every artifact as one file, <stage>/<id>.tar: its bundle.
# A job takes the bundles of all that its artifact is made from, works in its own results folder, and leaves a bundle.
STORAGE = workflow.storage_settings.default_storage_provider is not None
OUT_OF_STORAGE = ""
if STORAGE:
    OUT_OF_STORAGE = f"python -m prefopt unpack --results {shlex.quote(RESULTS)} {{input.finished:q}} >> {{log:q}} 2>&1 && "


def manifest(ref):
    """Path of an artifact's manifest."""
    return f"{RESULTS}/{ref}/manifest.json"


def bundle(ref):
    """Path of an artifact's bundle, below the storage's prefix."""
    return f"{ref}.tar"


def finished(nodes):
    """What is there when these artifacts are finished: their manifests, or in a storage their bundles."""
    return [(bundle if STORAGE else manifest)(node.ref) for node in nodes]


def record(path):
    """A log or benchmark: on this machine as long as jobs see it, else in the storage."""
    return local(path) if workflow.storage_settings.assume_common_workdir else path


def everywhere(path):
    """A file that every planning writes where it runs: not to be looked for in a storage, nor on this machine alone.

    (A job with a file that is ``local`` stays on the main machine, where none of the machine is shared.)
    """
    return flag(path, PATH_MODIFIER_FLAG)


def spec(stage):
    """Path of an artifact's spec file."""
    return everywhere(f"{RESULTS}/specs/{stage}/{{id}}.json")


def made(stage, **names):
    """Outputs of a stage: these files, and folders without an ending, and its manifest; or in a storage its bundle."""
    if STORAGE:
        return {"bundle": bundle(f"{stage}/{{id}}")}
    paths = {role: f"{RESULTS}/{stage}/{{id}}/{name}" for role, name in names.items()}
    outputs = {
        role: path if Path(path).suffix else directory(path)
        for role, path in paths.items()
    }
    return outputs | {"manifest": manifest(f"{stage}/{{id}}")}


def job(command):
    """A stage's command; in a storage within the one that fetches its parents and leaves a bundle."""
    if not STORAGE:
        return command
    return (
        "python -m prefopt stored --spec {input.spec:q} --bundle {output.bundle:q} -- env "
        + command
    )


captioned = partial(report, category="{paper}", subcategory="{id}")


def shown(outputs, **captions):
    """Outputs of an item, those with a caption in Snakemake's report; bundles cannot be shown."""
    return {
        role: captioned(path, caption=captions[role]) if role in captions else path
        for role, path in outputs.items()
    }


def items(paper=None, scale=None):
    """The finished items of the configuration, of one paper or one scale."""
    return finished(
        node
        for node in PLAN.items.values()
        if paper in (None, node.spec["item"]["paper"])
        and scale in (None, node.spec["item"]["scale"])
    )


def finished_below_items():
    """Everything that the items are made from, finished."""
    roots = {node.ref for node in PLAN.items.values()}
    return finished(
        node for node in PLAN.reachable(PLAN.items.values()) if node.ref not in roots
    )


def bundles_below_items():
    """What the report and the import read beside the items, where it has to be taken out of a storage."""
    return finished_below_items() if STORAGE else []


# The items' manifests in this machine's results folder.
FINISHED = (
    " ".join(shlex.quote(manifest(node.ref)) for node in PLAN.items.values())
    if STORAGE
    else "{input.finished:q}"
)


def wired(refs):
    """What a job reads of these parents: their manifests tell that they are there; in a storage all that is behind them."""
    nodes = [PLAN.node(ref) for ref in refs]
    return finished(PLAN.reachable(nodes) if STORAGE else nodes)


def parent(stage, role):
    """Input function: the parent in that role, finished; nothing where the plan wired none."""

    def find(wildcards):
        ref = PLAN.node(f"{stage}/{wildcards.id}").parents.get(role)
        return wired([ref] if ref else [])

    return find


def parents(stage, prefix=""):
    """Input function: all parents whose role starts with the prefix, finished."""

    def find(wildcards):
        node = PLAN.node(f"{stage.format(**wildcards)}/{wildcards.id}")
        return wired(
            ref for role, ref in node.parents.items() if role.startswith(prefix)
        )

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
