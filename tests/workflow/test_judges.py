"""Items whose judge is a language model, in this process or behind a server, through the rules as a user runs them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from judge_models import folder_of, judge_tokenizer, torn
from judge_server import JudgeServer, serving
from small_project import Project, item, snakemake_words
from warm_server import beside_server

KEY = "sk-planted-1f5b"
CONCURRENCY = 2
LABELLED = 5


def declare_judged(project: Project, base_url: str) -> None:
    """Two items that share everything with the finished one but the judge."""
    folder = project.folder
    tokenizer = judge_tokenizer()
    folder_of(torn(tokenizer, ["m", "M"]), tokenizer, folder / "judge")
    server = {"kind": "server", "base_url": base_url, "model_name": "longer", "api_key_env": "TEST_JUDGE_KEY"}
    judges = {
        "near": {"kind": "lm", "model": {"kind": "local", "path": str(folder / "judge")}},
        "far": server
        | {"concurrency": CONCURRENCY, "prices": {"input": 1.0, "output": 2.0}, "labelled_pairs": LABELLED},
    }
    (folder / "config" / "judges.yaml").write_text(yaml.safe_dump(judges))
    for name in judges:
        content = item(item={"paper": "own", "name": name, "title": f"Judge {name}", "scale": "local"})
        content["arms"] = {"dpo": content["arms"]["dpo"]}
        content["evaluate"]["judge"] = name
        content["expect"] = [
            {"claim": "won at times", "arm": "dpo", "metric": "win_rate", "than": 0.0, "source": "made up"}
        ]
        project.declare(content)


def started(project: Project) -> subprocess.Popen:
    """The workflow in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *snakemake_words()],
        cwd=project.folder,
        env=project.environment() | beside_server(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_answers(server: JudgeServer, count: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while sum(server.answered.values()) < count:
        assert run.poll() is None, "the workflow ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def judged(finished, tmp_path_factory):
    """The project after a run that was killed in the middle of the server's judgements and run again; the server."""
    project = finished.copy(tmp_path_factory.mktemp("judged") / "project")
    with pytest.MonkeyPatch.context() as patch, serving(JudgeServer(seconds=0.2)) as server:
        patch.setenv("TEST_JUDGE_KEY", KEY)
        declare_judged(project, server.base_url)
        run = started(project)
        wait_for_answers(server, 3, run)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        time.sleep(0.5)  # replies that were on their way
        server.before_kill = server.answered.copy()
        project.launch(check=True)
        yield project, server


def artifact(project: Project, stage: str, name: str) -> Path:
    """The judgement or metrics that an item is made of."""
    parents = json.loads(project.spec("papers/own", name).read_text())["parents"]
    folder = project.folder / "results" / parents["metrics.dpo.0"]
    if stage == "metrics":
        return folder
    return project.folder / "results" / json.loads((folder / "manifest.json").read_text())["parents"]["judgements"]


def test_a_killed_run_goes_on_and_pays_for_no_answer_twice(judged):
    project, server = judged
    records = json.loads((artifact(project, "judgements", "far") / "annotations.json").read_text())
    differ = sum(record["output_1"] != record["output_2"] for record in records)
    assert differ >= 4
    assert 3 <= sum(server.before_kill.values()) < 2 * differ
    assert len(server.asked) == len(server.answered) == 2 * differ + 2 * LABELLED
    # What was on its way when the process died never reached it; nothing else may be asked for again.
    assert sum(server.asked.values()) <= 2 * differ + 2 * LABELLED + CONCURRENCY
    assert project.planned_jobs() == {}


def test_the_servers_win_rate_is_what_its_answers_say(judged):
    """Log-odds of a tenth of the difference in characters, the same in both orders."""
    project, _ = judged
    records = json.loads((artifact(project, "judgements", "far") / "annotations.json").read_text())
    expected = [1 / (1 + math.exp(-(len(r["output_2"]) - len(r["output_1"])) / 10)) for r in records]
    assert [r["preference"] - 1 for r in records] == pytest.approx(expected, abs=1e-9)
    assert {r["annotator"] for r in records} == {"longer"}
    metrics = json.loads((artifact(project, "metrics", "far") / "metrics.json").read_text())
    assert metrics["win_rate"] == pytest.approx(100 * sum(expected) / len(expected), abs=1e-6)
    table = json.loads((project.artifact("papers/own", "far") / "item.json").read_text())
    assert table["arms"]["dpo"]["summary"]["win_rate"]["mean"] == pytest.approx(metrics["win_rate"])


def test_a_model_of_this_machine_judges_in_both_orders(judged):
    project, _ = judged
    summary = json.loads((artifact(project, "judgements", "near") / "manifest.json").read_text())["summary"]
    assert sum(summary["answers"].values()) == 2 * summary["prompts"] == 24
    assert summary["answers"]["logprobs"] == summary["asked"] + summary["kept_before"]
    assert "cost" not in summary
    metrics = json.loads((artifact(project, "metrics", "near") / "metrics.json").read_text())
    assert 0 < metrics["win_rate"] < 100
    assert metrics["n_missing"] == 0


def test_cost_is_told_and_the_key_is_nowhere(judged):
    project, server = judged
    assert server.keys == {f"Bearer {KEY}"}
    summary = json.loads((artifact(project, "judgements", "far") / "manifest.json").read_text())["summary"]
    labels = summary["labelled_pairs"]
    assert summary["cost"] + labels["cost"] == pytest.approx(len(server.asked) * (100 * 1.0 + 1 * 2.0) / 1e6)
    assert labels["agreement"] == 1.0  # chosen answers are the longer ones
    assert (summary["position_consistency"], summary["second_shown"]) == (1.0, 0.5)
    holding = [path for path in project.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == []
    assert "TEST_JUDGE_KEY" in (project.folder / "config" / "judges.yaml").read_text()
    report = (project.folder / "results" / "report.html").read_text()
    assert "Judge near" in report
    assert "Judges that see two answers" in report
    assert "Judge far" in report
