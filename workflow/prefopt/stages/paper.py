"""Paper items: the measurements of all arms and seeds become a table, a figure and a verdict."""

from __future__ import annotations

import logging
from typing import Any

from prefopt.artifacts import Build, read_json, read_table, write_json, write_text
from prefopt.stages import RunOptions

log = logging.getLogger(__name__)


def _finished_runs(build: Build) -> dict[tuple[str, int], dict[str, Any]]:
    """What collect_item reads for every arm and seed; the arm judged against has a policy and no metrics."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for arm in build.node.spec["arms"]:
        for seed in build.node.spec["seeds"]:
            run: dict[str, Any] = {"policy": build.node.parents[f"policy.{arm}.{seed}"]}
            role = f"metrics.{arm}.{seed}"
            if build.has_parent(role):
                folder = build.parent(role)
                run |= {
                    "metrics_ref": build.node.parents[role],
                    "metrics": read_json(folder / "metrics.json"),
                    "prompts": read_table(folder / "prompts.parquet"),
                }
            runs[arm, seed] = run
    return runs


def paper_item(build: Build, options: RunOptions) -> None:
    """Write item.json, table.csv, table.md and figure.svg."""
    from prefopt.figures import arms_figure
    from prefopt.items import collect_item, markdown, table

    item = collect_item(build.node.spec, _finished_runs(build))
    write_json(build.work / "item.json", item)
    write_text(build.work / "table.csv", table(item).to_csv(index=False))
    write_text(build.work / "table.md", markdown(item))
    write_text(build.work / "figure.svg", arms_figure(item))
    build.summary |= {"verdict": item["verdict"], "claims": [row["verdict"] for row in item["expect"]]}
    log.info("%s/%s: %s", item["paper"], item["name"], item["verdict"])
