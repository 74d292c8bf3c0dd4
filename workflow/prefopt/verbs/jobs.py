"""The verbs of the stages: one spec file in, one artifact out."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt import team
from prefopt.errors import AlreadyMade, FailedCheck
from prefopt.processes import parallel
from prefopt.processes.shares import check_divisible, has_divisible_rows
from prefopt.stages import STAGES, RunOptions, Stage
from prefopt.verbs.arguments import Verbs, count

if TYPE_CHECKING:
    from prefopt.artifacts import Node

_log = logging.getLogger(__name__)


_OPTIONS: dict[str, dict[str, Any]] = {  # of RunOptions by name: what argparse is told
    "micro_batch": {"type": count, "help": "rows in memory at a time"},
    "checkpoint_steps": {"type": count, "help": "steps between checkpoints"},
    "gradient_checkpointing": {
        "action": "store_true",
        "help": "run layers again in the backward pass: less memory, more time",
    },
    "compile": {"action": "store_true", "help": "run layers through torch.compile: pays in long runs"},
    "sharding": {
        "choices": ("none", "full"),
        "help": "full: weights, gradients and optimiser state divided among processes that torchrun started",
    },
    "processes": {"type": count, "help": "processes that share the rows, each with a whole model on a GPU of its own"},
    "device": {"choices": ("auto", "cpu", "cuda")},
}


def add_verb(
    verbs: Verbs, common: argparse.ArgumentParser, stage: Stage, *, spec_required: bool = True
) -> argparse.ArgumentParser:
    """The verb of a stage, with the options that the stage heeds."""
    defaults = RunOptions()
    verb = verbs.add_parser(stage.verb, parents=[common], help=stage.help, description=stage.help)
    several: dict[str, Any] = {"nargs": "+"} if stage.several else {}
    text = f"results/specs/{stage.folder}/<id>.json{', or several' if several else ''}"
    verb.add_argument("--spec", type=Path, required=spec_required, help=text, **several)
    for name, settings in _OPTIONS.items():
        if name in stage.options:
            verb.add_argument(f"--{name.replace('_', '-')}", default=getattr(defaults, name), **settings)
    verb.set_defaults(run=run)
    return verb


def run(arguments: argparse.Namespace) -> None:
    """Make what the named spec files describe; FailedCheck for a spec of another stage."""
    for spec in arguments.spec if STAGES[arguments.verb].several else [arguments.spec]:
        _make(arguments, spec)


def _make(arguments: argparse.Namespace, spec: Path) -> None:
    """Run the stage over one spec file."""
    from prefopt.artifacts import node_of, results_of

    stage = STAGES[arguments.verb]
    node = node_of(spec)
    if node.stage.split("/", maxsplit=1)[0] != stage.folder:
        raise FailedCheck(f"{spec}: a spec of '{node.stage}', which '{stage.verb}' does not make")
    options = RunOptions(**{name: getattr(arguments, name) for name in stage.options})
    build = partial(_build, stage, node, results_of(spec), options)
    check_divisible(node, options.processes)
    try:
        if has_divisible_rows(node):
            team.run(options.processes, build)
        else:
            build()
    except AlreadyMade as made:
        _log.info("%s: %s", stage.verb, made)
        return
    _log.info("%s: done, see %s", stage.verb, results_of(spec) / node.ref)


def _build(stage: Stage, node: Node, results: Path, options: RunOptions) -> None:
    """Build one artifact in this process, which may be one of several that share its rows or its weights."""
    if team.size() > 1:
        parallel.take_gpu(team.rank(), options.device)
    with (
        parallel.started(stage.verb, several="sharding" in stage.options, device=options.device),
        parallel.building_together(node, results) as build,
    ):
        stage.load()(build, options)
        if team.size() > 1:
            build.summary |= {"processes": team.size()}
