"""Exact studies: a function of its parameters alone, its numbers, tables and figures written down."""

from __future__ import annotations

import logging

from prefopt.errors import FailedCheck
from prefopt.files import write_json, write_text
from prefopt.stages import RunOptions
from prefopt.store.builds import Build
from prefopt.studies import get_study

log = logging.getLogger(__name__)


def run_study(build: Build, options: RunOptions) -> None:
    """Write values.json, tables/<name>.csv and figures/<name>.svg; the summary keeps the order they came in.

    Raises FailedCheck where the spec was planned for another version of the study.
    """
    from prefopt.figures import styled, svg_text

    spec = build.node.spec
    study = get_study(spec["name"])
    if study.version != spec["version"]:
        raise FailedCheck(f"study '{study.name}' is at version {study.version}, the spec asks for {spec['version']}")
    with styled():
        result = study.run(spec["params"])
        figures = {name: svg_text(figure) for name, figure in result.figures.items()}
    write_json(build.work / "values.json", dict(result.values))
    for name, table in result.tables.items():
        write_text(build.work / "tables" / f"{name}.csv", table.to_csv(index=False))
    for name, svg in figures.items():
        write_text(build.work / "figures" / f"{name}.svg", svg)
    build.summary |= {"values": dict(result.values), "tables": list(result.tables), "figures": list(figures)}
    log.info("%s: %d numbers, %d tables, %d figures", study.name, *map(len, (result.values, result.tables, figures)))
