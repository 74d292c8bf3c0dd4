"""What a verdict rests on: of each arm one spec in full and the artifacts of all its runs, and the command for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefopt.reporting.addresses import kind_of

STUDY = "study"


def remake_command(item: Mapping[str, Any]) -> str:
    """The command that makes an item, in the tier that its result has."""
    full = " FULL=1" if item.get("tier") == "full" else ""
    return f"make reproduce ITEMS={item['paper']}/{item['name']}{full}"


def specs_behind(item: Mapping[str, Any], artifacts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm -> ``text`` (the spec of one of its runs as JSON) and ``refs`` (stage/id of all runs that the verdicts use).

    ``artifacts``: manifests by stage/id. Of an exact item the only entry is the study's. Where no run of an arm is on
    this machine its text is what the item declares.
    """
    if kind_of(item) == "exact":
        declared = {key: item["study"][key] for key in ("name", "params")}
        return {STUDY: _entry(declared, [item["study"]["artifact"]], artifacts)}
    runs = _grid_runs if kind_of(item) == "grid" else _arm_runs
    return {arm: _entry({"loss": held["loss"]}, runs(item, arm), artifacts) for arm, held in item["arms"].items()}


def _grid_runs(item: Mapping[str, Any], arm: str) -> list[str]:
    """Runs of the points that the validation selected, or of all points where nothing was selected."""
    points = [point for point in item["points"] if point["arm"] == arm]
    chosen = [point for point in points if point["selected"]] or points
    return [ref for point in chosen for ref in point["runs"].values()]


def _arm_runs(item: Mapping[str, Any], arm: str) -> list[str]:
    return [run["policy"] for run in item["arms"][arm]["seeds"].values() if run["policy"]]


def _entry(declared: Mapping[str, Any], refs: list[str], artifacts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    here = [ref for ref in refs if ref in artifacts]
    spec = artifacts[here[0]]["spec"] if here else declared
    return {"text": json.dumps(spec, indent=1, ensure_ascii=False), "refs": here}
