"""Artifacts for the tests of single stages: parents as plain folders, one stage run over them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from prefopt.artifacts import MANIFEST, Node
from prefopt.plan import Plan, load_plan
from prefopt.stages import STAGES, RunOptions
from prefopt.store.builds import Build, building


def build_of(results: Path, stage: str, spec: dict[str, Any], parents: list[str]) -> Build:
    """A build of a stage whose parents are the folders of these names below ``results``."""
    out = results / "built"
    out.mkdir(exist_ok=True)
    node = Node(stage=stage, version=1, name=stage, spec=spec, parents={p: p for p in parents}, execution={})
    return Build(node=node, results=results, work=out, scratch=out)


def run_stage(results: Path, verb: str, spec: dict[str, Any], parents: list[str]) -> Build:
    """Run one stage over the parents below ``results``; its files are in ``work``."""
    stage = STAGES[verb]
    build = build_of(results, stage.folder, spec, parents)
    stage.load()(build, RunOptions())
    return build


def plan_items(folder: Path, *items: dict[str, Any], **config: Any) -> Plan:
    """The plan of these items and no others, declared below ``folder``; ``config``: more for config.yaml."""
    experiments = folder / "config" / "experiments"
    shutil.rmtree(experiments, ignore_errors=True)
    for item in items:
        path = experiments / item["item"]["paper"] / f"{item['item']['name']}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(item, sort_keys=False))
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump({"items": ["*/*"], **config}))
    return load_plan(folder / "config" / "config.yaml")


def plan_of(folder: Path, item: dict[str, Any]) -> Plan:
    """The plan of one item, own/x, whose results are below ``folder`` too."""
    return plan_items(folder, item, results=str(folder / "results"))


def trial_of(plan: Plan, arm: str) -> Node:
    """The trial of an arm's first point with the seed 0."""
    item = plan.items["own/x"]
    number = [point["arm"] for point in item.spec["grid"]["points"]].index(arm)
    return plan.node(item.parents[f"run.{number}.0"])


def make_all(plan: Plan, roots: list[Node], options: RunOptions) -> Path:
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
