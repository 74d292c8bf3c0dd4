"""What a tracking server is told about finished items: a tree of records paper, item, arm, seed. No MLflow in here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, outputs_digest
from prefopt.digests import canonical_json, digest, file_md5
from prefopt.files import read_json, read_lines, read_text
from prefopt.report import ancestors
from prefopt.reporting.addresses import item_numbers, kind_of

TRAINING_STAGES = ("sft", "reward", "policy", "trials", "vote_trials")
SHARED = "shared models"
TRIAL_POINTS = 16  # of a trial's learning curve: a grid has over a thousand of them

# MLflow's own limits; what is longer is cut with a visible mark.
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000

Point = tuple[str, float, int, int]  # key, value, time in ms, step


@dataclass
class Record:
    """One run to be: a finished artifact in its place, or (``ref`` empty) a place that holds others."""

    place: str  # paper, paper/item or paper/item/arm
    name: str
    parent: str | None  # key of the record it stands below
    ref: str = ""  # stage/id
    spec: Mapping[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    span: tuple[int, int] = (0, 0)  # ms since 1970
    files: list[tuple[Path, str]] = field(default_factory=list)  # file, folder below the run's artifacts
    weights: Path | None = None
    content: str = ""  # digest of the artifact's outputs

    @property
    def key(self) -> str:
        """What the run is found again by: the place, with the artifact where it is one."""
        return f"{self.place}|{self.ref}" if self.ref else self.place

    @property
    def digest(self) -> str:
        """Changes when anything does that the run shows."""
        values = [self.name, self.parent, self.tags, self.points, self.content, [str(f[0].name) for f in self.files]]
        return digest(values)


def records(results: Path, item_refs: Sequence[str]) -> list[Record]:
    """Every finished training run and item that the items reach, parents before children.

    An artifact that several items use stands once below each of them; models that belong to no arm (reference policies,
    reward models) stand below ``shared models``.
    """
    manifests: dict[str, dict[str, Any]] = {}
    found: dict[str, Record] = {}
    for ref in item_refs:
        ancestors(results, ref, manifests, set())
        if ref in manifests:
            for record in _item_records(results, ref, manifests):
                found.setdefault(record.key, record)
    placed = {record.ref for record in found.values()}
    rest = [ref for ref, m in manifests.items() if m["stage"] in TRAINING_STAGES and ref not in placed]
    if rest:
        found[SHARED] = Record(SHARED, SHARED, None)
    for ref in rest:
        record = _run(results / ref, SHARED, manifests[ref]["id"], manifests[ref])
        found[record.key] = record
    _spread_times(found)
    return list(found.values())


def _item_records(results: Path, ref: str, manifests: Mapping[str, dict[str, Any]]) -> Iterator[Record]:
    manifest = manifests[ref]
    item = read_json(results / ref / "item.json")
    paper, place = item["paper"], f"{item['paper']}/{item['name']}"
    yield Record(paper, paper, None, tags={"prefopt.level": "paper", "prefopt.arxiv": item["arxiv"] or ""})
    shown = {"prefopt.title": item["title"], "prefopt.verdict": item["verdict"], "prefopt.scale": item["scale"]}
    if "tier" in item:
        shown["prefopt.tier"] = item["tier"]
    note = read_text(results / ref / "table.md")
    yield Record(place, item["name"], paper, tags={"prefopt.level": "item", **shown, "mlflow.note.content": note})
    runs = {"exact": _no_runs, "grid": _grid_runs, "arms": _arm_runs}[kind_of(item)](item, manifest)
    numbers = item_numbers(item)
    end = times(manifest)[1]
    for arm in dict.fromkeys(arm for arm, *_ in runs):
        values = {a.removeprefix(f"{arm}/"): n.value for a, n in numbers.items() if a.startswith(f"{arm}/")}
        loss = item["arms"][arm]["loss"] if arm in item.get("arms", {}) else {}
        tags = {"prefopt.level": "arm", "prefopt.arm": arm, "prefopt.loss": canonical_json(loss) if loss else ""}
        yield Record(f"{place}/{arm}", arm, place, tags=tags, points=_estimates(values, end))
    for arm, name, trained, measured in runs:
        if trained in manifests:
            yield _run(results / trained, f"{place}/{arm}", name, manifests[trained], measured)
    result = _run(results / ref, place, f"result {manifest['id']}", manifest)
    outside = {a: n.value for a, n in numbers.items() if a.split("/")[0] not in item.get("arms", {})}
    result.points = _estimates(outside, end)
    result.tags |= shown
    drawn = sorted((results / ref / "figures").glob("*.svg")) or [results / ref / "figure.svg"]
    result.files = [*((path, "figures") for path in drawn), (results / ref / "table.csv", "")]
    yield result


Run = tuple[str, str, str, Mapping[str, Any]]  # arm, name, stage/id, what the item measured of it


def _no_runs(item: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Run]:
    return []


def _arm_runs(item: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Run]:
    return [
        (name, f"seed {seed}", run["policy"], run["values"] or {})
        for name, arm in item["arms"].items()
        for seed, run in arm["seeds"].items()
        if run["policy"]
    ]


def _grid_runs(item: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Run]:
    """The trials of every point, named by what varies over the grid; a trial holds its own evaluation."""
    runs: list[Run] = [
        ("reference", f"seed {role.split('.')[1]}", ref, {})
        for role, ref in manifest["parents"].items()
        if role.startswith("reference.")
    ]
    every = [point["settings"] for point in item["points"]]
    varying = [key for key in dict.fromkeys(k for s in every for k in s) if len({str(s.get(key)) for s in every}) > 1]
    for point in item["points"]:
        words = [point["condition"]] if len(item["conditions"]) > 1 else []
        words += [f"{key} {point['settings'][key]:g}" for key in varying if key in point["settings"]]
        runs += [(point["arm"], ", ".join([*words, f"seed {seed}"]), ref, {}) for seed, ref in point["runs"].items()]
    return runs


def _run(
    folder: Path, place: str, name: str, manifest: Mapping[str, Any], values: Mapping[str, Any] | None = None
) -> Record:
    """The record of the artifact in ``folder``."""
    ref = f"{manifest['stage']}/{manifest['id']}"
    record = Record(place, name, place, ref, manifest["spec"], _tags(folder, manifest), span=times(manifest))
    record.content = outputs_digest(folder)
    if manifest["stage"] in TRAINING_STAGES:
        record.points = training_points(folder, manifest)
    record.points += final_points(values or {}, record.span[1], 0)
    if manifest["stage"] in ("policy", "extrapolated") and (folder / "weights").is_dir():
        record.weights = folder / "weights"
    return record


def _spread_times(found: Mapping[str, Record]) -> None:
    """Give places the time from the first start to the last end below them; children stand after their parents."""
    for record in reversed(list(found.values())):
        above = found[record.parent] if record.parent else None
        if above is not None and record.span != (0, 0):
            start, end = above.span if above.span != (0, 0) else record.span
            above.span = (min(start, record.span[0]), max(end, record.span[1]))


def training_points(folder: Path, manifest: Mapping[str, Any]) -> list[Point]:
    """The learning curve, its steps spread over the run's time, and the numbers of the summary at the end."""
    start, end = times(manifest)
    curve = read_lines(folder / "metrics.jsonl")
    if manifest["stage"] in ("trials", "vote_trials"):
        curve = curve[-1 :: -max(1, len(curve) // TRIAL_POINTS)][::-1]  # evenly spaced, the last step among them
    points = []
    for position, row in enumerate(curve, start=1):
        at = start + (end - start) * position // len(curve)
        points += [(key_of(k), float(v), at, int(row["step"])) for k, v in row.items() if k != "step" and is_number(v)]
    return points + final_points(manifest["summary"], end, int(curve[-1]["step"]) if curve else 0, "final/")


def _estimates(values: Mapping[str, Mapping[str, Any]], at: int) -> list[Point]:
    """Mean of every number under its address, its limits below that."""
    flat: dict[str, Any] = {}
    for address, value in values.items():
        flat |= {address: value["mean"], f"{address}/low": value["low"], f"{address}/high": value["high"]}
    return final_points(flat, at, 0)


def final_points(values: Mapping[str, Any], at: int, step: int, prefix: str = "") -> list[Point]:
    """Every number in nested ``values`` as one point."""
    return [(key_of(prefix + key), float(v), at, step) for key, v in _flat(values, "/") if is_number(v)]


def is_number(value: Any) -> bool:
    """Whether it can be a metric: truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + str(key), value


def flat_params(spec: Mapping[str, Any]) -> dict[str, str]:
    """A spec as parameters: dotted keys, JSON for lists; what exceeds MLflow's limits ends with ``…``."""
    return {
        key_of(key): cut(value if isinstance(value, str) else canonical_json(value), PARAM_LENGTH)
        for key, value in _flat(spec, ".")
    }


def key_of(text: str) -> str:
    """``text`` as MLflow allows it: letters, digits and ``_-. :/``."""
    return cut(re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII), KEY_LENGTH, mark="..")


def cut(text: str, length: int, mark: str = "…") -> str:
    """``text``, or as much of it as fits in front of ``mark``."""
    return text if len(text) <= length else text[: length - len(mark)] + mark


def _tags(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Where the artifact comes from; ``prefopt.dvc_md5`` is how DVC calls its manifest in the listing of a folder."""
    commit = manifest["git"]["commit"] or ""
    return {
        "prefopt.level": "run" if manifest["stage"] in TRAINING_STAGES else "result",
        "prefopt.stage": manifest["stage"],
        "prefopt.parents": canonical_json(manifest["parents"]),
        "prefopt.git_commit": commit,
        "prefopt.git_dirty": str(manifest["git"]["dirty"]),
        "prefopt.device": str(manifest["device"]),
        "prefopt.dvc_md5": file_md5(folder / MANIFEST),
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": f"{manifest['stage']}/{manifest['id']}",
        "mlflow.source.type": "LOCAL",
    }


def times(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Start and end in ms since 1970, taken from the manifest so that a second import has the same ones."""
    end = round(datetime.fromisoformat(manifest["finished"]).timestamp() * 1000)
    return end - round(manifest["wall_seconds"] * 1000), end
