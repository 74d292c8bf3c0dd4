"""Finished runs as MLflow runs. The only module that knows MLflow; importing twice changes nothing."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.artifacts import canonical_json, outputs_digest, read_json, read_lines
from prefopt.report import ancestors

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "prefopt"
TRAINING_STAGES = ("sft", "reward", "policy", "trials")
TRIAL_POINTS = 16  # of a trial's learning curve: a grid has over a thousand of them
ARTIFACT_TAG = "prefopt.artifact_id"
DIGEST_TAG = "prefopt.digest"

# MLflow's own limits; what is longer is cut with a visible mark.
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100

# A server that does not answer costs seconds, not the minutes of MLflow's defaults; nothing is reported to its makers.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Point = tuple[str, float, int, int]  # key, value, time in ms, step


@dataclass
class _Record:
    """One MLflow run to be: an artifact with its parameters, curves and results."""

    ref: str
    manifest: Mapping[str, Any]
    digest: str
    points: list[Point] = field(default_factory=list)


def publish(results_dir: Path, item_refs: list[str], *, tracking_uri: str | None = None) -> dict[str, Any]:
    """Import every finished training run and item that the items reach; one MLflow run per artifact.

    Runs are found again by their tag ``prefopt.artifact_id`` and left alone while ``prefopt.digest`` (outputs and
    evaluations) is the same; an artifact made again adds its values, with later times, to the same run.
    ``tracking_uri`` defaults to MLFLOW_TRACKING_URI, then to ``<results>/mlflow.db``.

    Returns the references ``imported``, ``unchanged`` and ``failed``, ``warnings`` (one line each) and the
    ``tracking_uri``. A server that cannot be reached is a warning, not an error: results do not depend on it.
    """
    results = results_dir.resolve()
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results / 'mlflow.db'}"
    records = _records(results, item_refs)
    outcome: dict[str, Any] = {"imported": [], "unchanged": [], "failed": [], "warnings": [], "tracking_uri": uri}
    with ExitStack() as stack:
        stack.enter_context(_environment(_ENVIRONMENT))
        importlib.import_module("mlflow")  # it sets its loggers' levels when imported: before they are quietened
        stack.enter_context(_quiet("mlflow", "alembic", "urllib3"))
        stack.enter_context(_alone(results / ".mlflow.lock"))
        try:
            client, experiment, known = _open(uri, results)
        except Exception as error:  # whatever a database driver or an HTTP client raises
            outcome["failed"] = [record.ref for record in records]
            outcome["warnings"].append(f"MLflow at {uri} cannot be used, nothing was published: {_one_line(error)}")
            return outcome
        for record in records:
            try:
                outcome[_import(client, experiment, record, known)].append(record.ref)
            except Exception as error:
                outcome["failed"].append(record.ref)
                outcome["warnings"].append(f"{record.ref}: not published: {_one_line(error)}")
    return outcome


def _open(uri: str, results: Path) -> tuple[MlflowClient, str, dict[str, tuple[str, str | None]]]:
    """Client, experiment id, and the runs that are there: artifact -> (run id, digest).

    A new database gets its schema here, by the one process that holds the lock.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        local = uri.startswith("sqlite:")
        location = (results / "mlartifacts").as_uri() if local else None
        return client, client.create_experiment(EXPERIMENT, artifact_location=location), {}
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    known: dict[str, tuple[str, str | None]] = {}
    token = None
    while True:
        page = client.search_runs([found.experiment_id], max_results=1000, page_token=token)
        for run in page:
            if ARTIFACT_TAG in run.data.tags:
                known[run.data.tags[ARTIFACT_TAG]] = (run.info.run_id, run.data.tags.get(DIGEST_TAG))
        token = page.token
        if not token:
            return client, found.experiment_id, known


def _import(client: MlflowClient, experiment: str, record: _Record, known: Mapping[str, tuple[str, str | None]]) -> str:
    """Write one run; the digest goes last, so that an import cut short is done again."""
    from mlflow.entities import Metric, Param, RunTag

    run_id, digest = known.get(record.ref, (None, None))
    if digest == record.digest:
        return "unchanged"
    start, end = _times(record.manifest)
    tags = _tags(record)
    if run_id is None:
        name = record.ref.rsplit("/", 1)[-1]
        run = client.create_run(experiment, start_time=start, run_name=name, tags={ARTIFACT_TAG: record.ref})
        run_id = run.info.run_id
    params = [Param(key, value) for key, value in flat_params(record.manifest["spec"]).items()]
    for chunk in _chunks(params, PARAMS_PER_CALL):
        client.log_batch(run_id, params=chunk)
    for chunk in _chunks([Metric(*point) for point in record.points], METRICS_PER_CALL):
        client.log_batch(run_id, metrics=chunk)
    client.set_terminated(run_id, "FINISHED", end_time=end)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.set_tag(run_id, DIGEST_TAG, record.digest)
    return "imported"


def _records(results: Path, item_refs: Sequence[str]) -> list[_Record]:
    """Training runs and items below the given items that are finished here, parents first."""
    manifests: dict[str, dict[str, Any]] = {}
    for ref in item_refs:
        ancestors(results, ref, manifests, set())
    evaluations = _evaluations(results, manifests)
    records = []
    for ref, manifest in manifests.items():
        folder = results / ref
        is_item = ref in item_refs
        if not is_item and manifest["stage"] not in TRAINING_STAGES:
            continue
        points = (
            _item_points(read_json(folder / "item.json"), manifest) if is_item else _training_points(folder, manifest)
        )
        points += evaluations.get(ref, [])
        identity = {"outputs": outputs_digest(folder), "evaluations": evaluations.get(ref, [])}
        digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
        records.append(_Record(ref, manifest, digest, points))
    return records


def _evaluations(results: Path, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Win rates and the like of every policy, so that runs can be compared by them: policy -> points."""
    found: dict[str, list[Point]] = {}
    for ref, manifest in manifests.items():
        if manifest["stage"].split("/")[0] != "papers":
            continue
        item = read_json(results / ref / "item.json")
        if item.get("kind") == "grid":  # a trial holds its own evaluation
            continue
        _, end = _times(manifest)
        for arm in item.get("arms", {}).values():
            for run in arm["seeds"].values():
                prefix = f"{item['paper']}/{item['name']}/"
                points = _final_points(run["values"] or {}, end, 0, prefix)
                found.setdefault(run["policy"], []).extend(points)
    return found


def _training_points(folder: Path, manifest: Mapping[str, Any]) -> list[Point]:
    """The learning curve, its steps spread over the run's time, and the numbers of the summary at the end."""
    start, end = _times(manifest)
    curve = read_lines(folder / "metrics.jsonl")
    if manifest["stage"] == "trials":
        curve = curve[-1 :: -max(1, len(curve) // TRIAL_POINTS)][::-1]  # evenly spaced, the last step among them
    points = []
    for position, row in enumerate(curve, start=1):
        at = start + (end - start) * position // len(curve)
        points += [(_key(k), float(v), at, int(row["step"])) for k, v in row.items() if k != "step" and _is_number(v)]
    return points + _final_points(manifest["summary"], end, int(curve[-1]["step"]) if curve else 0, "final/")


def _item_points(item: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Point]:
    """Mean and interval of every arm's metrics and the difference of every claim; of an exact item its numbers."""
    _, end = _times(manifest)
    if item["scale"] == "exact":
        return _final_points(_exact_values(item), end, 0)
    if item.get("kind") == "grid":
        return _final_points(_grid_values(item), end, 0)
    values = {
        f"{arm}/{metric}": numbers
        for arm, found in item["arms"].items()
        for metric, numbers in found["summary"].items()
    }
    values |= {f"claim{n}/difference": row["difference"] or {} for n, row in enumerate(item["expect"], start=1)}
    return _final_points(values, end, 0)


def _grid_values(item: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of every arm's selected points by condition and set, and the differences of the claims."""
    selected = [point for point in item["points"] if point["selected"]]
    values = {f"{p['condition']}/{p['arm']}": p["sets"] for p in selected}
    return values | {f"claim{n}/difference": row["difference"] or {} for n, row in enumerate(item["expect"], start=1)}


def _exact_values(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"claim{n}/{key}": row[key]
        for n, row in enumerate(item["expect"], start=1)
        for key in ("value", "reported", "difference")
    }


def _final_points(values: Mapping[str, Any], at: int, step: int, prefix: str = "") -> list[Point]:
    return [(_key(prefix + key), float(v), at, step) for key, v in _flat(values, "/") if _is_number(v)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + str(key), value


def flat_params(spec: Mapping[str, Any]) -> dict[str, str]:
    """A spec as MLflow parameters: dotted keys, JSON for lists; what exceeds MLflow's limits ends with ``…``."""
    return {
        _key(key): _cut(value if isinstance(value, str) else canonical_json(value), PARAM_LENGTH)
        for key, value in _flat(spec, ".")
    }


def _key(text: str) -> str:
    """``text`` as MLflow allows it: letters, digits and ``_-. :/``."""
    return _cut(re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII), KEY_LENGTH, mark="..")


def _cut(text: str, length: int, mark: str = "…") -> str:
    return text if len(text) <= length else text[: length - len(mark)] + mark


def _tags(record: _Record) -> dict[str, str]:
    manifest = record.manifest
    tags = {
        "prefopt.stage": manifest["stage"],
        "prefopt.parents": canonical_json(manifest["parents"]),
        "prefopt.git_commit": str(manifest["git"]["commit"]),
        "prefopt.git_dirty": str(manifest["git"]["dirty"]),
        "prefopt.device": str(manifest["device"]),
        "prefopt.verdict": str(manifest["summary"].get("verdict", "")),
        "mlflow.source.git.commit": manifest["git"]["commit"] or "",
    }
    return {key: _cut(value, TAG_LENGTH) for key, value in tags.items() if value}


def _times(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Start and end in ms since 1970, taken from the manifest so that a second import has the same ones."""
    end = round(datetime.fromisoformat(manifest["finished"]).timestamp() * 1000)
    return end - round(manifest["wall_seconds"] * 1000), end


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _one_line(error: Exception) -> str:
    return _cut(" ".join(str(error).split()) or type(error).__name__, 300)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that the user has not set, for the duration of the block."""
    added = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Only errors from these loggers, for the duration of the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One importer at a time: neither the schema nor a run is made twice."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
