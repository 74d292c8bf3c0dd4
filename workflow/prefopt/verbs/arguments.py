"""What several verbs take, and what becomes of it: the configuration, files beside annotations, counts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.plan import Plan

Verbs = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], None]

ANNOTATED_FILES = {
    "outputs": "model_outputs of the model, for lengths",
    "baseline": "model_outputs of the baseline, for lengths and prompt numbers",
    "difficulty": "table of index and instruction_difficulty",
    "gamed": "comparisons of the baseline with its verbose and concise selves",
}


def count(text: str) -> int:
    """A whole number of at least one, for argparse."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def add_configured(
    verbs: Verbs, common: argparse.ArgumentParser, name: str, text: str, run: Run
) -> argparse.ArgumentParser:
    """A verb that works on the configured items; ``loaded_plan`` reads what it takes."""
    verb = verbs.add_parser(name, parents=[common], help=text, description=text)
    verb.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="default: %(default)s")
    verb.add_argument("--items", help="comma-separated paper/item names or patterns, instead of the config file's")
    verb.add_argument("--data-root", help="folder that data paths are relative to, instead of the config file's")
    verb.add_argument("--results", help="results folder, instead of the config file's")
    verb.add_argument("--full", action="store_true", default=None, help="grids in full, not their quick part")
    verb.set_defaults(run=run)
    return verb


def loaded_plan(arguments: argparse.Namespace) -> Plan:
    """The plan that a verb of ``add_configured`` was given; BadInput as ``plan.load_plan`` raises it."""
    from prefopt.plan import load_plan

    given = {name: getattr(arguments, name) for name in ("items", "data_root", "results", "full")}
    return load_plan(arguments.config, {key: value for key, value in given.items() if value is not None})


def add_beside_annotations(files: argparse._ActionsContainer) -> None:
    """The options that ``annotation_options`` reads."""
    for name, text in ANNOTATED_FILES.items():
        files.add_argument(f"--{name}", type=Path, help=text)
    files.add_argument(
        "--by-position", action="store_true", help="number prompts by their row, as published figures do"
    )


def annotation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said about an annotation file beside its name: files, and how prompts are numbered."""
    return {name: getattr(arguments, name) for name in (*ANNOTATED_FILES, "by_position")}
