"""Finished runs as MLflow runs. The only module that knows MLflow; importing twice changes nothing."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.contexts import environment, locked, quiet
from prefopt.redaction import redacted
from prefopt.reporting.logged_models import is_whole_model, model_folder
from prefopt.reporting.tracked import TAG_LENGTH, Record, cut, flat_params, records

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "prefopt"
KEY_TAG = "prefopt.key"
ARTIFACT_TAG = "prefopt.artifact_id"
DIGEST_TAG = "prefopt.digest"
IMPORTED_TAG = "prefopt.imported_ns"
PARENT_TAG = "mlflow.parentRunId"
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100

# A server that does not answer costs seconds, not the minutes of MLflow's defaults; nothing is reported to its makers.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# The first makes the web page show runs and models, not traces of language-model applications.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Paper, item, arm, seed: each below the one before. `python -m prefopt trace RUN_ID` tells "
    "where a run comes from.",
}

Weights = Literal["reference", "copy"]


def publish(
    results_dir: Path, item_refs: list[str], *, tracking_uri: str | None = None, weights: Weights = "reference"
) -> dict[str, Any]:
    """Import every finished training run and item that the items reach, as a tree: paper, item, arm, seed.

    Runs are found again by their tag ``prefopt.key`` and left alone while ``prefopt.digest`` is the same; an artifact
    made again adds its values, with later times, to the same run. Policies also become logged models: ``reference``
    leaves their weights where they are, ``copy`` puts them into the artifact store as well. ``tracking_uri`` defaults
    to MLFLOW_TRACKING_URI, then to ``<results>/mlflow.db``.

    Returns the references ``imported``, ``unchanged`` and ``failed``, ``warnings`` (one line each) and the
    ``tracking_uri`` without its credentials. A server that cannot be reached is a warning, not an error: results do not
    depend on it.
    """
    results = results_dir.resolve()
    uri = store_uri(results, tracking_uri)
    wanted = records(results, item_refs)
    called = redacted(uri)
    outcome: dict[str, Any] = {"imported": [], "unchanged": [], "failed": [], "warnings": [], "tracking_uri": called}
    with ExitStack() as stack:
        stack.enter_context(_mlflow())
        stack.enter_context(locked(results / ".mlflow.lock"))
        try:
            store = _open(uri, results)
        except Exception as error:  # whatever a database driver or an HTTP client raises
            outcome["failed"] = list(dict.fromkeys(record.ref for record in wanted if record.ref))
            outcome["warnings"].append(f"MLflow at {called} cannot be used, nothing was published: {_one_line(error)}")
            return outcome
        for record in wanted:
            try:
                answer = _import(store, record, weights)
            except Exception as error:
                answer = "failed"
                outcome["warnings"].append(f"{record.ref or record.place}: not published: {_one_line(error)}")
            outcome[answer].append(record.ref)
        try:
            _settle(store, wanted)
        except Exception as error:
            outcome["warnings"].append(f"MLflow at {called} went away at the end: {_one_line(error)}; publish again")
    for answer in ("imported", "unchanged", "failed"):
        outcome[answer] = list(dict.fromkeys(filter(None, outcome[answer])))
    return outcome


def store_uri(results: Path, given: str | None = None) -> str:
    """The tracking store: as given, or MLFLOW_TRACKING_URI, or the database in the results folder."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.resolve() / 'mlflow.db'}"


def find_runs(results: Path, *, tag: str | None = None, value: str = "") -> list[dict[str, str]]:
    """Runs of the store: those whose ``tag`` begins with ``value``, or whose own id does where no tag is named.

    Each with ``run_id``, ``name``, ``key`` and ``artifact``. A store that is not there has none; one that cannot be
    reached raises what its client raises.
    """
    uri = store_uri(results)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return []
    with _mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        runs = _all_pages(client.search_runs, experiment.experiment_id) if experiment else []
    wanted = [r for r in runs if (r.data.tags.get(tag, "") if tag else r.info.run_id).startswith(value)]
    return [
        {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "key": run.data.tags.get(KEY_TAG, ""),
            "artifact": run.data.tags.get(ARTIFACT_TAG, ""),
        }
        for run in wanted
    ]


@dataclass
class _Known:
    """What is there already under one key."""

    run_id: str
    digest: str | None
    parent: str | None
    imported: int = 0
    mine: bool = False

    @property
    def age(self) -> tuple[int, str]:
        """Of several runs with one key the one with the least age stays."""
        return self.imported, self.run_id


@dataclass
class _Store:
    client: MlflowClient
    experiment: str
    runs: dict[str, list[_Known]]
    models: set[tuple[str, str]] = field(default_factory=set)  # artifact, digest of its outputs

    def run_id(self, key: str) -> str:
        return self.runs[key][0].run_id


def _open(uri: str, results: Path) -> _Store:
    """The store with what is in it; a new database gets its schema here, by the one process that holds the lock."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        location = (results / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
        try:
            made = client.create_experiment(EXPERIMENT, artifact_location=location, tags=_EXPERIMENT_TAGS)
            return _Store(client, made, {})
        except MlflowException:  # another importer was faster
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    store = _Store(client, found.experiment_id, _known_runs(client, found.experiment_id))
    found_models = _all_pages(client.search_logged_models, found.experiment_id)
    store.models = {(m.tags.get(ARTIFACT_TAG, ""), m.tags.get(DIGEST_TAG, "")) for m in found_models}
    return store


def _all_pages(search: Callable[..., Any], experiment: str) -> list[Any]:
    """What a client's search finds in an experiment, on all of its pages."""
    found: list[Any] = []
    token = None
    while True:
        page = search([experiment], max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _known_runs(client: MlflowClient, experiment: str) -> dict[str, list[_Known]]:
    """Runs by key; where two importers made the same one, the first to stay."""
    known: dict[str, list[_Known]] = {}
    for run in _all_pages(client.search_runs, experiment):
        tags = run.data.tags
        if KEY_TAG in tags:
            entry = _Known(run.info.run_id, tags.get(DIGEST_TAG), tags.get(PARENT_TAG), int(tags[IMPORTED_TAG]))
            known.setdefault(tags[KEY_TAG], []).append(entry)
    for entries in known.values():
        entries.sort(key=lambda entry: entry.age)
    return known


def _import(store: _Store, record: Record, weights: Weights) -> str:
    """Write one run; the digest goes last, so that an import cut short is done again."""
    from mlflow.entities import Metric, Param, RunTag

    client = store.client
    parent = store.run_id(record.parent) if record.parent else None
    known = store.runs.get(record.key, [None])[0]
    if known is not None and known.digest == record.digest and known.parent == parent:
        return "unchanged"
    tags = {KEY_TAG: record.key, **({ARTIFACT_TAG: record.ref} if record.ref else {})}
    tags |= {PARENT_TAG: parent} if parent else {}
    if known is None:
        imported = time.time_ns()
        first = {**tags, IMPORTED_TAG: str(imported)}
        run = client.create_run(store.experiment, start_time=record.span[0], run_name=record.name, tags=first)
        known = _Known(run.info.run_id, None, parent, imported, mine=True)
        store.runs[record.key] = [known]
    for chunk in _chunks([Param(key, value) for key, value in flat_params(record.spec).items()], PARAMS_PER_CALL):
        client.log_batch(known.run_id, params=chunk)
    for chunk in _chunks([Metric(*point) for point in record.points], METRICS_PER_CALL):
        client.log_batch(known.run_id, metrics=chunk)
    for path, folder in record.files:
        client.log_artifact(known.run_id, str(path), folder or None)
    if record.weights is not None:
        _log_model(store, record, known.run_id, weights)
    client.set_terminated(known.run_id, "FINISHED", end_time=record.span[1])
    tags |= {key: cut(value, TAG_LENGTH) for key, value in record.tags.items() if value}
    client.log_batch(known.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.set_tag(known.run_id, DIGEST_TAG, record.digest)
    known.digest, known.parent = record.digest, parent
    return "imported"


def _log_model(store: _Store, record: Record, run_id: str, weights: Weights) -> None:
    """The policy as a logged model of its first run, once per content. What holds only adapters is none by itself."""
    if (record.ref, record.content) in store.models or record.weights is None or not is_whole_model(record.weights):
        return
    tags = {ARTIFACT_TAG: record.ref, DIGEST_TAG: record.content, "prefopt.weights": weights}
    name = record.ref.rsplit("/", 1)[-1].replace(".", "_")
    model = store.client.create_logged_model(store.experiment, name=name, source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory() as folder:
        model_folder(record.weights, Path(folder), model.model_id, copy=weights == "copy")
        store.client.log_model_artifacts(model.model_id, folder)
    store.client.finalize_logged_model(model.model_id, "READY")
    store.models.add((record.ref, record.content))


def _settle(store: _Store, wanted: list[Record]) -> None:
    """Leave one run per key, the first, where importers on several machines made the same ones at the same time.

    A run is taken away by who made it, or by anyone once it is complete; children move below the run that stays.
    """
    made = {entry.run_id for entries in store.runs.values() for entry in entries if entry.mine}
    if not made and all(len(entries) == 1 for entries in store.runs.values()):
        return
    client = store.client
    latest = _known_runs(client, store.experiment)
    gone = set()
    for entries in latest.values():
        for entry in entries[1:]:
            if entry.run_id in made or entry.digest:
                client.delete_run(entry.run_id)
                gone.add(entry.run_id)
    for record in wanted:
        if record.parent in latest and record.key in latest:
            parent, run = latest[record.parent][0].run_id, latest[record.key][0]
            if run.parent != parent:
                client.set_tag(run.run_id, PARENT_TAG, parent)
    for model in _all_pages(client.search_logged_models, store.experiment) if gone else ():
        if model.source_run_id in gone:
            client.delete_logged_model(model.model_id)


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _one_line(error: Exception) -> str:
    return cut(redacted(" ".join(str(error).split())) or type(error).__name__, 300)


@contextmanager
def _mlflow() -> Iterator[None]:
    """MLflow imported, patient for seconds only, and silent below errors."""
    with environment(_ENVIRONMENT):
        importlib.import_module("mlflow")  # it sets its loggers' levels when imported: before they are quietened
        with quiet("mlflow", "alembic", "urllib3"):
            yield
