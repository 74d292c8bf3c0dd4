"""Import into MLflow: complete, once, and never in the way of the workflow."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

import finished_results
from prefopt import tracking
from prefopt.artifacts import outputs_digest, read_json, read_lines, write_json, write_lines

MlflowClient = pytest.importorskip("mlflow", reason="mlflow is not installed").MlflowClient


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    refs = finished_results.finished(folder)
    return folder, refs, tracking.publish(folder, refs)


@pytest.fixture(autouse=True)
def no_user_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def runs_of(folder: Path) -> dict:
    """Artifact -> the run with the full history of each of its metrics."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    found = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        history = {
            key: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        assert run.data.tags[tracking.ARTIFACT_TAG] not in found
        found[run.data.tags[tracking.ARTIFACT_TAG]] = (run, history)
    return found


def test_every_training_run_and_item_becomes_one_run(published):
    folder, refs, outcome = published
    trained = {str(p.relative_to(folder)) for stage in tracking.TRAINING_STAGES for p in folder.glob(f"{stage}/*")}
    runs = runs_of(folder)
    assert set(runs) == trained | set(refs)
    assert set(outcome["imported"]) == set(runs)
    assert outcome["unchanged"] == outcome["failed"] == outcome["warnings"] == []
    assert all(run.info.status == "FINISHED" for run, _ in runs.values())


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
    assert run.info.run_name == ref.split("/")[1]
    assert run.info.end_time - run.info.start_time == pytest.approx(1000 * manifest["wall_seconds"], abs=1)
    assert history["final/last_tenth/loss"] == [(finished_results.STEPS, 0.45, run.info.end_time)]
    item = read_json(folder / refs[0] / "item.json")
    win_rate = item["arms"]["mallows-theta"]["seeds"]["0"]["values"]["win_rate"]
    assert history["mallowspo/win-rates/win_rate"][0][1] == pytest.approx(win_rate)


def test_items_carry_their_estimates_and_verdict(published):
    folder, refs, _ = published
    run, history = runs_of(folder)[refs[0]]
    item = read_json(folder / refs[0] / "item.json")
    summary = item["arms"]["mallows-theta"]["summary"]["win_rate"]
    assert history["mallows-theta/win_rate/low"][0][1] == pytest.approx(summary["low"])
    assert history["claim1/difference/mean"][0][1] == pytest.approx(item["expect"][0]["difference"]["mean"])
    assert run.data.tags["prefopt.verdict"] == item["verdict"]


def test_an_exact_item_carries_its_numbers(tmp_path):
    ref = finished_results.exact_item(tmp_path).ref
    assert tracking.publish(tmp_path, [ref])["imported"] == [ref]
    run, history = runs_of(tmp_path)[ref]
    found = {key: [value for _, value, _ in points] for key, points in history.items()}
    assert found["claim1/value"] == [1.25]
    assert found["claim1/reported"] == [1.2]
    assert found["claim3/difference"] == [0.25]
    assert "claim3/reported" not in found  # an order has no reported number
    assert run.data.params["study.params.places"] == "[1,2]"
    assert run.data.tags["prefopt.verdict"] == "not reproduced"


def test_importing_twice_changes_nothing(published):
    folder, refs, first = published

    def state():
        return {
            ref: (run.info.run_id, run.info.end_time, run.data.params, run.data.tags, history)
            for ref, (run, history) in runs_of(folder).items()
        }

    before = state()
    second = tracking.publish(folder, refs)
    assert second["imported"] == second["failed"] == []
    assert set(second["unchanged"]) == set(first["imported"])
    assert state() == before


def test_artifacts_go_beside_the_database_and_not_into_the_current_folder(published):
    folder, _, outcome = published
    assert outcome["tracking_uri"] == f"sqlite:///{folder / 'mlflow.db'}"
    experiment = MlflowClient(outcome["tracking_uri"]).get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()


def test_an_import_cut_short_is_completed_without_doubles(published):
    folder, refs, outcome = published
    before = runs_of(folder)
    client = MlflowClient(outcome["tracking_uri"])
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

    def breaks(client, experiment, record, known):
        if record.ref == refs[0]:
            raise RuntimeError("disk\nfull")
        return real(client, experiment, record, known)

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


@pytest.mark.slow
def test_a_new_database_is_made_in_silence_by_several_at_once(tmp_path):
    refs = finished_results.finished(tmp_path)
    code = "import sys; from pathlib import Path; from prefopt.tracking import publish; "
    code += "print(len(publish(Path(sys.argv[1]), sys.argv[2:])['failed']))"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}

    def start(_):
        command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path), *refs]
        return subprocess.run(command, capture_output=True, text=True, env=clean, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    assert [(d.returncode, d.stdout, d.stderr) for d in done] == [(0, "0\n", "")] * 2
    assert len(runs_of(tmp_path)) == len(tracking.publish(tmp_path, refs)["unchanged"])


def test_params_are_flat_and_cut_visibly():
    spec = {"loss": {"name": "dpo", "params": {}}, "seeds": [0, 1], "note": None, "long": "x" * 7000, "a[b]": 1.5}
    params = tracking.flat_params(spec)
    assert params["loss.name"] == "dpo"
    assert params["loss.params"] == "{}"
    assert params["seeds"] == "[0,1]"
    assert params["note"] == "null"
    assert params["a_b_"] == "1.5"
    assert len(params["long"]) == tracking.PARAM_LENGTH
    assert params["long"].endswith("x…")
    assert max(map(len, tracking.flat_params({"k" * 300: 1}))) == tracking.KEY_LENGTH


def test_batches_stay_within_the_limit():
    sizes = [len(chunk) for chunk in tracking._chunks(list(range(2500)), tracking.METRICS_PER_CALL)]
    assert sizes == [1000, 1000, 500]


def test_only_numbers_become_metrics():
    points = tracking._final_points({"a": 1, "b": True, "c": "x", "d": {"e": 2.5, "f": None}, "g": math.nan}, 5, 7)
    assert [(key, step) for key, _, _, step in points] == [("a", 7), ("d/e", 7), ("g", 7)]


def test_the_curve_of_a_trial_is_thinned_and_keeps_its_last_step(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0 / step} for step in range(1, 64)])
    manifest = {
        "stage": "trials",
        "summary": {},
        "finished": "2026-01-01T00:00:10+00:00",
        "wall_seconds": 10.0,
    }
    steps = [step for key, _, _, step in tracking._training_points(tmp_path, manifest) if key == "loss"]
    assert len(steps) <= 63 / (63 // tracking.TRIAL_POINTS) + 1
    assert steps[-1] == 63
    assert {b - a for a, b in pairwise(steps)} == {63 // tracking.TRIAL_POINTS}
    whole = tracking._training_points(tmp_path, manifest | {"stage": "policy"})
    assert len([key for key, *_ in whole if key == "loss"]) == 63
