"""Keys, passwords and tokens of the environment: in no log, manifest, spec, store, report or message."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import finished_results
from judge_results import waiting_judgement
from judge_server import JudgeServer, serving
from marks import long
from prefopt.cli import main
from prefopt.errors import BadInput
from prefopt.planning.config import load_item
from prefopt.redaction import RedactingFormatter, redacted
from prefopt.specs import ServerJudgeSpec
from prefopt.tracking import find_runs, publish
from small_project import ROOT, Project, item

SECRETS = {
    "TEST_JUDGE_KEY": "sk-planted-91ab77c2",
    "OPENAI_API_KEY": "sk-planted-openai-44",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/0d1e2f",
    "AWS_SESSION_TOKEN": "planted-session-5a5a",
    "HF_TOKEN": "hf_plantedplanted99",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-pass",
}
URI_PASSWORD = "planted-uri-pass"


@pytest.fixture
def planted(monkeypatch) -> str:
    """All of them in the environment; the address of a tracking server with a password that nobody answers at."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    uri = f"http://user:{URI_PASSWORD}@127.0.0.1:9/path?token={URI_PASSWORD}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def leaks(folder: Path, *told: str) -> list[str]:
    """Where one of the secrets stands, in the bytes of any file or in what was printed."""
    values = [value.encode() for value in (*SECRETS.values(), URI_PASSWORD)]
    found = [f"printed: {v.decode()}" for v in values if any(v in text.encode() for text in told)]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return found + [f"{path}: {v.decode()}" for path in files for v in values if v in path.read_bytes()]


def test_the_search_of_these_tests_finds_what_is_there(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"\x00\xff" + SECRETS["HF_TOKEN"].encode() + b"\x00")
    assert len(leaks(tmp_path)) == 1
    assert len(leaks(tmp_path, f"a {URI_PASSWORD}")) == 2


# --- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://user:pw@host:5000/a", "http://***@host:5000/a"),
        ("at postgresql+psycopg://me:p/w@x@db/name, twice", "at postgresql+psycopg://***@db/name, twice"),
        ("https://token@host", "https://***@host"),
        ("https://host/a?key=abc&b=c (again)", "https://host/a?*** (again)"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("mail me@host, is it so?", "mail me@host, is it so?"),
        ("key sk-planted-91ab77c2.", "key ***."),
    ],
)
def test_addresses_are_shown_without_credentials(planted, given, shown):
    assert redacted(given) == shown


def test_short_values_hide_no_common_words(monkeypatch):
    monkeypatch.setenv("SORT_KEY", "loss")
    assert redacted("the loss is 1") == "the loss is 1"


def test_log_lines_and_tracebacks_are_shown_without_secrets(planted):
    try:
        raise ValueError(f"server said {SECRETS['TEST_JUDGE_KEY']}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s", (planted,), sys.exc_info())
    line = RedactingFormatter("%(message)s").format(record)
    assert "at http://***@127.0.0.1:9/path?***" in line
    assert "server said ***" in line
    assert not any(value in line for value in (*SECRETS.values(), URI_PASSWORD))


# --- declarations ---------------------------------------------------------------------------------------------------


def judged_item(project: Project, **judge) -> Path:
    content = item()
    content["evaluate"]["judge"] = "far"
    judge = {"kind": "server", "base_url": "http://127.0.0.1:9/v1", "model_name": "m"} | judge
    (project.folder / "config" / "judges.yaml").write_text(yaml.safe_dump({"far": judge}))
    project.declare(content)
    return project.folder / "config" / "experiments" / "own" / "tiny.yaml"


@pytest.mark.parametrize("key", ["sk-planted-91ab77c2", "hf_plantedplanted99", "planted/aws+secret", "a b", ""])
def test_a_key_in_the_place_of_its_variables_name_is_refused_and_not_repeated(project, key):
    path = judged_item(project, api_key_env=key)
    with pytest.raises(BadInput, match="in capitals such as JUDGE_API_KEY") as caught:
        load_item(path)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("address", ["http://u:planted-uri-pass@h/v1", "http://h/v1?key=planted-uri-pass"])
def test_a_judges_address_holds_no_secret(project, address):
    with pytest.raises(BadInput, match="may hold a secret; use 'api_key_env'") as caught:
        load_item(judged_item(project, base_url=address))
    assert URI_PASSWORD not in str(caught.value)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_judge_that_fails_and_then_answers_leaves_no_secret(tmp_path, planted, capfd, caplog):
    """It refuses the key and quotes it, fails on the way, and answers at last."""
    caplog.set_level(logging.DEBUG)
    faults = {"now": "refuse"}
    server = JudgeServer(faults=lambda asked, before: faults["now"] if before < 3 else None)
    with serving(server):
        declared = ServerJudgeSpec(
            kind="server",
            base_url=server.base_url,
            model_name="judge-1",
            api_key_env="TEST_JUDGE_KEY",
            retries=1,
            concurrency=2,
        )
        spec = waiting_judgement(tmp_path, 4, declared)
        codes = []
        for fault in ("refuse", "error", None):
            faults["now"] = fault
            codes.append(main(["judge", "--spec", str(spec), "--device", "cpu"]))
    assert codes == [2, 75, 0]
    assert server.keys == {f"Bearer {SECRETS['TEST_JUDGE_KEY']}"}
    assert "environment variable TEST_JUDGE_KEY" in (told := "".join(capfd.readouterr()))
    assert leaks(tmp_path, told, caplog.text) == []
    assert "TEST_JUDGE_KEY" in spec.read_text()


def test_a_tracking_server_that_is_not_there_is_named_without_its_password(tmp_path, planted, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    refs = finished_results.finished(tmp_path)
    assert main(["publish", *(str(tmp_path / ref / "manifest.json") for ref in refs)]) == 0
    told = "".join(capfd.readouterr())
    assert "MLflow at http://***@127.0.0.1:9/path?*** cannot be used, nothing was published" in told
    assert leaks(tmp_path, told) == []
    assert "http://***@127.0.0.1:9" in (tmp_path / "published.json").read_text()


@long("half a minute of processor time or more")
def test_a_whole_run_leaves_no_secret(finished, tmp_path, planted):
    """Every byte of results, specs, logs, Snakemake's own files, store and report, and all that was printed."""
    project = finished.copy(tmp_path / "project")
    told = []

    def run(*words: str) -> int:
        environment = {**project.environment(), **SECRETS, "MLFLOW_TRACKING_URI": uri[0]}
        profile = ROOT / "workflow" / "profiles" / "local"
        command = [sys.executable, "-m", "prefopt", "launch", "--", sys.executable, "-m", "snakemake"]
        command += ["-s", str(ROOT / "Snakefile"), "--workflow-profile", str(profile), "--printshellcmds", *words]
        done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)
        told.extend([done.stdout, done.stderr])
        return done.returncode

    broken, uri = [True], [planted]
    refuse = lambda asked, before: ("refuse" if before % 2 else "error") if broken[0] else None  # noqa: E731
    with serving(JudgeServer(faults=refuse)) as server:
        declared = {"base_url": server.base_url, "api_key_env": "TEST_JUDGE_KEY", "retries": 0, "concurrency": 1}
        judged_item(project, **declared)
        assert run() != 0
        assert server.keys == {f"Bearer {SECRETS['TEST_JUDGE_KEY']}"}
        broken[0] = False
        assert run() == 0  # the tracking server is not there: told, and no failure
    uri[0] = ""
    (project.folder / "results" / "published.json").unlink()
    assert run() == 0
    results = project.folder / "results"
    assert publish(results, [])["failed"] == []
    shutil.rmtree(project.folder / "exported", ignore_errors=True)
    exported = project.prefopt("export", "--out", "exported", check=True)
    shown = project.prefopt("trace", "own/tiny", check=True)
    told += [exported.stdout, exported.stderr, shown.stdout, shown.stderr]
    assert (results / "mlflow.db").stat().st_size > 100_000
    assert (results / "report.html").is_file()
    assert list((results / "logs").rglob("*.log"))
    assert leaks(project.folder, *told) == []


def test_a_store_that_cannot_be_read_is_traced_without_its_password(tmp_path, planted):
    with pytest.raises(Exception, match=r"."):
        find_runs(tmp_path)
    from prefopt.reporting.trace import Tracer

    tracer = Tracer(tmp_path)
    assert tracer.runs == []
    assert tracer.notes[0].startswith("MLflow at http://***@127.0.0.1:9/path?*** cannot be read")
    assert not any(URI_PASSWORD in note for note in tracer.notes)
