"""Artifacts for the tests of single stages: parents as plain folders, one stage run over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.artifacts import MANIFEST, Build, Node, building
from prefopt.stages import STAGES, RunOptions


def build_of(results: Path, stage: str, spec: dict[str, Any], parents: list[str]) -> Build:
    """A build of a stage whose parents are the folders of these names below ``results``."""
    out = results / "built"
    out.mkdir(exist_ok=True)
    node = Node(stage=stage, version=1, name=stage, spec=spec, parents={p: p for p in parents}, execution={})
    return Build(node=node, results=results, out=out, work=out, scratch=out)


def run_stage(results: Path, verb: str, spec: dict[str, Any], parents: list[str]) -> Build:
    """Run one stage over the parents below ``results``; its files are in ``work``."""
    stage = STAGES[verb]
    build = build_of(results, stage.folder, spec, parents)
    stage.load()(build, RunOptions())
    return build


def make_all(plan: Any, roots: list[Node], options: RunOptions) -> Path:
    """Make planned artifacts, and all below them that is not there, in this process; the folder of results."""
    results, stages = Path(plan.config.results), {stage.folder: stage for stage in STAGES.values()}
    for node in plan.reachable(roots):
        if not (results / node.ref / MANIFEST).is_file():
            with building(node, results) as build:
                stages[node.stage].load()(build, options)
    return results


def save_table(results: Path, parent: str, name: str, table: pd.DataFrame) -> None:
    """Write a table of a parent artifact."""
    (results / parent).mkdir(exist_ok=True)
    table.to_parquet(results / parent / f"{name}.parquet", index=False)
