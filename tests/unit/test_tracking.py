"""Import into MLflow: complete, once, and never in the way of the workflow."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import finished_results
from marks import long
from prefopt import tracking
from prefopt.artifacts import outputs_digest
from prefopt.files import read_json, read_lines, write_json, write_lines
from prefopt.reporting.tracked import (
    KEY_LENGTH,
    PARAM_LENGTH,
    TRAINING_STAGES,
    TRIAL_POINTS,
    final_points,
    flat_params,
    training_points,
)


def client_of(uri: str):
    """MLflow's client of a store; imported here, since every process that collects this file would wait for it."""
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    refs = finished_results.finished(folder)
    return folder, refs, tracking.publish(folder, refs)


def all_runs(folder: Path) -> dict:
    """Key -> the run with the full history of each of its metrics."""
    client = client_of(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    found = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        history = {
            key: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        assert run.data.tags[tracking.KEY_TAG] not in found
        found[run.data.tags[tracking.KEY_TAG]] = (run, history)
    return found


def runs_of(folder: Path) -> dict:
    """Artifact -> its run; of an artifact in several items the first one's."""
    found = {}
    for run, history in all_runs(folder).values():
        if tracking.ARTIFACT_TAG in run.data.tags:
            found.setdefault(run.data.tags[tracking.ARTIFACT_TAG], (run, history))
    return found


def test_every_training_run_and_item_becomes_a_run(published):
    folder, refs, outcome = published
    trained = {str(p.relative_to(folder)) for stage in TRAINING_STAGES for p in folder.glob(f"{stage}/*")}
    runs = runs_of(folder)
    assert set(runs) == trained | set(refs)
    assert set(outcome["imported"]) == set(runs)
    assert outcome["unchanged"] == outcome["failed"] == outcome["warnings"] == []
    assert all(run.info.status == "FINISHED" for run, _ in all_runs(folder).values())


def test_runs_stand_below_paper_item_and_arm(published):
    folder, _, _ = published
    runs = all_runs(folder)
    key_of = {run.info.run_id: key for key, (run, _) in runs.items()}
    above = {key: key_of.get(run.data.tags.get(tracking.PARENT_TAG)) for key, (run, _) in runs.items()}
    seeds = [key for key in runs if key.startswith("mallowspo/win-rates/mallows-theta|")]
    assert len(seeds) == 2
    assert {above[key] for key in seeds} == {"mallowspo/win-rates/mallows-theta"}
    assert above["mallowspo/win-rates/mallows-theta"] == "mallowspo/win-rates"
    assert above["mallowspo/win-rates"] == "mallowspo"
    assert above["mallowspo"] is None
    assert sorted(runs[key][0].info.run_name for key in seeds) == ["seed 0", "seed 1"]
    # the same policy is an arm of both items
    shared = [key for key in runs if key.split("|")[-1].startswith("policy/dpo-s0")]
    assert sorted(above[key] for key in shared) == ["mallowspo/reference/dpo", "mallowspo/win-rates/dpo"]
    assert {above[k] for k in runs if k.split("|")[-1].startswith(("sft/", "reward/"))} == {"shared models"}


def test_an_item_has_its_page_its_figure_and_its_table(published):
    folder, refs, outcome = published
    runs = all_runs(folder)
    client = client_of(outcome["tracking_uri"])
    result, _ = runs[f"mallowspo/win-rates|{refs[0]}"]
    assert [f.path for f in client.list_artifacts(result.info.run_id, "figures")] == ["figures/figure.svg"]
    assert "table.csv" in [f.path for f in client.list_artifacts(result.info.run_id)]
    item, _ = runs["mallowspo/win-rates"]
    assert item.data.tags["mlflow.note.content"] == (folder / refs[0] / "table.md").read_text()


def test_curves_params_tags_and_results_are_the_artifacts_own(published):
    folder, refs, _ = published
    ref = next(r for r in runs_of(folder) if r.startswith("policy/mallows_theta-s0"))
    run, history = runs_of(folder)[ref]
    manifest = read_json(folder / ref / "manifest.json")
    curve = read_lines(folder / ref / "metrics.jsonl")
    assert [(step, value) for step, value, _ in history["loss"]] == [(row["step"], row["loss"]) for row in curve]
    assert run.data.params["loss.name"] == "mallows_theta"
    assert run.data.params["loss.params.beta"] == "0.1"
    assert run.data.tags["prefopt.stage"] == "policy"
    assert run.data.tags["prefopt.git_commit"] == str(manifest["git"]["commit"])
    assert run.data.tags["prefopt.git_dirty"] == str(manifest["git"]["dirty"])
    assert manifest["parents"]["dispersion"] in run.data.tags["prefopt.parents"]
    assert run.data.tags["prefopt.dvc_md5"] == hashlib.md5((folder / ref / "manifest.json").read_bytes()).hexdigest()
    assert run.info.end_time - run.info.start_time == pytest.approx(1000 * manifest["wall_seconds"], abs=1)
    assert history["final/last_tenth/loss"] == [(finished_results.STEPS, 0.45, run.info.end_time)]
    item = read_json(folder / refs[0] / "item.json")
    win_rate = item["arms"]["mallows-theta"]["seeds"]["0"]["values"]["win_rate"]
    assert history["win_rate"][0][1] == pytest.approx(win_rate)


def test_items_carry_their_estimates_and_verdict(published):
    folder, refs, _ = published
    run, history = runs_of(folder)[refs[0]]
    item = read_json(folder / refs[0] / "item.json")
    summary = item["arms"]["mallows-theta"]["summary"]["win_rate"]
    assert history["claim1"][0][1] == pytest.approx(item["expect"][0]["difference"]["mean"])
    assert history["claim1/low"][0][1] == pytest.approx(item["expect"][0]["difference"]["low"])
    _, arm = all_runs(folder)["mallowspo/win-rates/mallows-theta"]
    assert arm["win_rate"][0][1] == pytest.approx(summary["mean"])
    assert arm["win_rate/low"][0][1] == pytest.approx(summary["low"])
    assert run.data.tags["prefopt.verdict"] == item["verdict"]


def test_an_exact_item_carries_its_numbers(tmp_path):
    ref = finished_results.exact_item(tmp_path).ref
    assert tracking.publish(tmp_path, [ref])["imported"] == [ref]
    run, history = runs_of(tmp_path)[ref]
    found = {key: [value for _, value, _ in points] for key, points in history.items()}
    assert found == {"margin": [1.25], "margin/low": [1.1], "margin/high": [1.4]}
    assert run.data.params["study.params.places"] == "[1,2]"
    assert run.data.tags["prefopt.verdict"] == "not reproduced"


def test_importing_twice_changes_nothing(published):
    folder, refs, first = published

    def state():
        return {
            ref: (run.info.run_id, run.info.end_time, run.data.params, run.data.tags, history)
            for ref, (run, history) in all_runs(folder).items()
        }

    before = state()
    second = tracking.publish(folder, refs)
    assert second["imported"] == second["failed"] == []
    assert set(second["unchanged"]) == set(first["imported"])
    assert state() == before


def test_artifacts_go_beside_the_database_and_not_into_the_current_folder(published):
    folder, _, outcome = published
    assert outcome["tracking_uri"] == f"sqlite:///{folder / 'mlflow.db'}"
    experiment = client_of(outcome["tracking_uri"]).get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()


def test_an_import_cut_short_is_completed_without_doubles(published):
    folder, refs, outcome = published
    before = runs_of(folder)
    client = client_of(outcome["tracking_uri"])
    ref = next(r for r in before if r.startswith("policy/"))
    client.delete_tag(before[ref][0].info.run_id, tracking.DIGEST_TAG)
    again = tracking.publish(folder, refs)
    assert again["imported"] == [ref]
    after = runs_of(folder)
    assert after[ref][0].info.run_id == before[ref][0].info.run_id
    assert after[ref][1] == before[ref][1]


def test_a_changed_artifact_goes_into_the_same_run(published):
    folder, refs, _ = published
    before = runs_of(folder)
    ref = next(r for r in before if r.startswith("sft/"))
    path = folder / ref / "manifest.json"
    kept = read_json(path)
    changed = dict(kept, outputs={**kept["outputs"], "metrics.jsonl": {"sha256": "0" * 64, "bytes": 1}})
    write_json(path, changed)
    try:
        assert tracking.publish(folder, refs)["imported"] == [ref]
        assert outputs_digest(folder / ref)
        after = runs_of(folder)
        assert set(after) == set(before)
        assert after[ref][0].info.run_id == before[ref][0].info.run_id
        assert after[ref][0].data.tags[tracking.DIGEST_TAG] != before[ref][0].data.tags[tracking.DIGEST_TAG]
    finally:
        write_json(path, kept)
        tracking.publish(folder, refs)


def test_an_unreachable_server_is_one_line_and_no_error(published, monkeypatch):
    folder, refs, outcome = published
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    answer = tracking.publish(folder, refs)
    assert answer["imported"] == answer["unchanged"] == []
    assert set(answer["failed"]) == set(outcome["imported"])
    assert len(answer["warnings"]) == 1
    assert "\n" not in answer["warnings"][0]
    assert "http://127.0.0.1:9 cannot be used" in answer["warnings"][0]


def test_one_bad_run_does_not_stop_the_others(published, monkeypatch, tmp_path):
    folder, refs, _ = published
    real = tracking._import

    def breaks(store, record, weights):
        if record.ref == refs[0]:
            raise RuntimeError("disk\nfull")
        return real(store, record, weights)

    monkeypatch.setattr(tracking, "_import", breaks)
    outcome = tracking.publish(folder, refs)
    assert outcome["failed"] == [refs[0]]
    assert outcome["warnings"] == [f"{refs[0]}: not published: disk full"]
    assert refs[1] in outcome["unchanged"]


def test_environment_and_loggers_are_left_as_they_were(published):
    folder, refs, _ = published
    before = dict(os.environ), logging.getLogger("mlflow").level, logging.getLogger("alembic").level
    tracking.publish(folder, refs)
    assert (dict(os.environ), logging.getLogger("mlflow").level, logging.getLogger("alembic").level) == before


PUBLISH = """
import sys
from pathlib import Path
from prefopt.tracking import publish
print(len(publish(Path(sys.argv[1]), sys.argv[2:])["failed"]))
"""


def import_at_once(folders: list[Path], refs: list[str], **variables: str) -> None:
    """Import into MLflow from one process per folder, all at the same time; none may complain."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    words = [sys.executable, "-W", "error::UserWarning", "-c", PUBLISH]
    jobs = [
        subprocess.Popen(
            [*words, str(folder), *refs],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, **variables},
        )
        for folder in folders
    ]
    assert [(*job.communicate(), job.returncode) for job in jobs] == [("0\n", "", 0)] * len(jobs)


def test_a_new_database_is_made_in_silence_by_two_importers_at_once(tmp_path):
    refs = finished_results.finished(tmp_path)
    import_at_once([tmp_path, tmp_path], refs)
    assert len(runs_of(tmp_path)) == len(tracking.publish(tmp_path, refs)["unchanged"])


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_two_importers_without_a_common_lock_leave_one_run_each(published, tmp_path):
    """Two clones and one database: who comes second by the clock gives way, and the tree stays whole."""
    folder, refs, _ = published
    clones = [tmp_path / "one", tmp_path / "two"]
    for clone in clones:
        shutil.copytree(folder, clone, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", ".mlflow.lock"))
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking.publish(clones[0], refs[1:], tracking_uri=store)  # the schema is there before the two start
    import_at_once(clones, refs, MLFLOW_TRACKING_URI=store)
    last = tracking.publish(clones[1], refs, tracking_uri=store)
    assert last["imported"] == last["failed"] == []
    runs = all_runs(tmp_path)  # which fails where a key stands twice
    assert set(runs) == set(all_runs(folder))
    ids = {run.info.run_id for run, _ in runs.values()}
    assert {run.data.tags.get(tracking.PARENT_TAG, run.info.run_id) for run, _ in runs.values()} <= ids


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Address of a tracking server on this machine."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@long("half a minute of processor time or more")
@pytest.mark.slow
def test_a_server_gets_what_it_missed(published, server, monkeypatch):
    """Not reachable at first: all of it is imported later, with its tree and its figures."""
    folder, refs, _ = published
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    missed = tracking.publish(folder, refs)["failed"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    caught_up = tracking.publish(folder, refs)
    assert caught_up["warnings"] == []
    assert set(caught_up["imported"]) == set(missed)
    assert tracking.publish(folder, refs)["imported"] == []
    client = client_of(server)
    runs = client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id], max_results=1000)
    assert {run.data.tags[tracking.KEY_TAG] for run in runs} == set(all_runs(folder))
    result = next(run for run in runs if run.data.tags.get(tracking.ARTIFACT_TAG) == refs[0])
    assert [f.path for f in client.list_artifacts(result.info.run_id, "figures")] == ["figures/figure.svg"]


def with_weights(folder: Path, ref: str) -> str:
    """The item's first policy, made again with the weights of a tiny model; its reference."""
    import tiny
    from prefopt.models import save_model

    policy = next(iter(read_json(folder / ref / "item.json")["arms"].values()))["seeds"]["0"]["policy"]
    save_model(tiny.causal_lm(), tiny.tokenizer(), folder / policy / "weights")
    return policy


@pytest.mark.parametrize("weights", ["reference", "copy"])
def test_a_policy_is_a_model_that_mlflow_and_transformers_load(published, tmp_path, weights):
    folder, refs, _ = published
    shutil.copytree(folder, tmp_path / "results", ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    results = tmp_path / "results"
    policy = with_weights(results, refs[0])
    uri = tracking.publish(results, refs, weights=weights)["tracking_uri"]
    tracking.publish(results, refs, weights=weights)
    client = client_of(uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    (model,) = client.search_logged_models([experiment])
    assert model.tags[tracking.ARTIFACT_TAG] == policy
    stored = Path(model.artifact_location.removeprefix("file://"))
    copies = list(stored.rglob("*.safetensors"))
    assert len(copies) == (weights == "copy")
    import mlflow
    from transformers import AutoModelForCausalLM

    mlflow.set_tracking_uri(uri)
    parts = mlflow.transformers.load_model(f"models:/{model.model_id}", return_type="components")
    plain = AutoModelForCausalLM.from_pretrained(copies[0].parent if copies else results / policy / "weights")
    for ours, theirs in zip(parts["model"].parameters(), plain.parameters(), strict=True):
        assert (ours == theirs).all()
    assert parts["tokenizer"]("w1 w2").input_ids == [4, 5]


def test_params_are_flat_and_cut_visibly():
    spec = {"loss": {"name": "dpo", "params": {}}, "seeds": [0, 1], "note": None, "long": "x" * 7000, "a[b]": 1.5}
    params = flat_params(spec)
    assert params["loss.name"] == "dpo"
    assert params["loss.params"] == "{}"
    assert params["seeds"] == "[0,1]"
    assert params["note"] == "null"
    assert params["a_b_"] == "1.5"
    assert len(params["long"]) == PARAM_LENGTH
    assert params["long"].endswith("x…")
    assert max(map(len, flat_params({"k" * 300: 1}))) == KEY_LENGTH


def test_batches_stay_within_the_limit():
    sizes = [len(chunk) for chunk in tracking._chunks(list(range(2500)), tracking.METRICS_PER_CALL)]
    assert sizes == [1000, 1000, 500]


def test_only_numbers_become_metrics():
    points = final_points({"a": 1, "b": True, "c": "x", "d": {"e": 2.5, "f": None}, "g": math.nan}, 5, 7)
    assert [(key, step) for key, _, _, step in points] == [("a", 7), ("d/e", 7), ("g", 7)]


def test_the_curve_of_a_trial_is_thinned_and_keeps_its_last_step(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0 / step} for step in range(1, 64)])
    manifest = {
        "stage": "trials",
        "summary": {},
        "finished": "2026-01-01T00:00:10+00:00",
        "wall_seconds": 10.0,
    }
    steps = [step for key, _, _, step in training_points(tmp_path, manifest) if key == "loss"]
    assert len(steps) <= 63 / (63 // TRIAL_POINTS) + 1
    assert steps[-1] == 63
    assert {b - a for a, b in pairwise(steps)} == {63 // TRIAL_POINTS}
    whole = training_points(tmp_path, manifest | {"stage": "policy"})
    assert len([key for key, *_ in whole if key == "loss"]) == 63
