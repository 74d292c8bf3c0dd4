"""Paper items: the measurements of all arms and seeds become a table, a figure and a verdict."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prefopt.artifacts import MANIFEST, Build, read_json, read_table, write_json, write_text
from prefopt.stages import RunOptions

if TYPE_CHECKING:
    import pandas as pd

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
    item, table, markdown, figure = _exact(build) if build.has_parent("study") else _measured(build)
    write_json(build.work / "item.json", item)
    write_text(build.work / "table.csv", table.to_csv(index=False))
    write_text(build.work / "table.md", markdown)
    write_text(build.work / "figure.svg", figure)
    build.summary |= {"verdict": item["verdict"], "claims": [row["verdict"] for row in item["expect"]]}
    log.info("%s/%s: %s", item["paper"], item["name"], item["verdict"])


def _measured(build: Build) -> tuple[dict[str, Any], pd.DataFrame, str, str]:
    """Content, table, Markdown and figure over all arms and seeds."""
    from prefopt import figures, items

    item = items.collect_item(build.node.spec, _finished_runs(build))
    return item, items.table(item), items.markdown(item), figures.arms_figure(item)


def _exact(build: Build) -> tuple[dict[str, Any], pd.DataFrame, str, str]:
    """The same of an exact item; its figure is the first one of its study."""
    from prefopt import exact

    folder = build.parent("study")
    values = read_json(folder / "values.json")
    item = exact.collect_exact(build.node.spec, values, build.node.parents["study"])
    first = read_json(folder / MANIFEST)["summary"]["figures"][0]
    figure = (folder / "figures" / f"{first}.svg").read_text(encoding="utf-8")
    return item, exact.table(item), exact.markdown(item), figure
