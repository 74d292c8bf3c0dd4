"""One job as several processes over its rows: the bytes of one process, what a kill leaves and what it costs."""

from __future__ import annotations

import os
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt import generation, models, team
from prefopt.artifacts import Node
from prefopt.cli import main
from prefopt.engine import bulk
from prefopt.errors import BadInput, FailedCheck
from prefopt.files import read_json
from prefopt.processes import rows
from prefopt.processes.shares import gpu_of, has_divisible_rows, row_processes, shares
from prefopt.specs import ExecutionSpec
from prefopt.tables import read_table
from row_jobs import PAIRS, VERBS, RowJobs

ROWS_AT_A_TIME = 4  # two pairs
GROUPING_BAND = 2e-6  # nats: float32 sums over batches of other rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> RowJobs:
    """Everything made by single processes; tests must not change it."""
    jobs = RowJobs(tmp_path_factory.mktemp("rows") / "results")
    for job in ("baseline", *VERBS):
        made(jobs, job)
    return jobs


@pytest.fixture
def jobs(alone, tmp_path, monkeypatch) -> RowJobs:
    """A copy of it to make things in again."""
    copy = object.__new__(RowJobs)
    copy.results, copy.nodes = tmp_path / "results", alone.nodes
    shutil.copytree(alone.results, copy.results)
    shutil.rmtree(copy.results / ".judge_cache")
    return copy


def made(jobs: RowJobs, job: str, processes: int = 1, micro_batch: int = ROWS_AT_A_TIME) -> int:
    """Make an artifact anew; the exit code."""
    shutil.rmtree(jobs.out(job), ignore_errors=True)
    verb = VERBS.get(job, "generate")
    words = [verb, "--spec", jobs.spec(job), "--device", "cpu", "--processes", processes]
    words += [] if verb == "generate" else ["--micro-batch", micro_batch]
    return main([*map(str, words)])


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("job", "processes"), [("reference", 2), *((job, 3) for job in VERBS)])
def test_several_processes_leave_the_bytes_of_one(jobs, alone, job, processes):
    assert made(jobs, job, processes) == 0
    assert jobs.outputs(job) == alone.outputs(job)
    told, before = (read_json(one.out(job) / "manifest.json")["summary"] for one in (jobs, alone))
    assert told == before | {"processes": processes}
    assert not (jobs.results / ".scratch" / jobs.nodes[job].ref).exists()


def test_more_processes_than_batches_are_not_needed_and_do_no_harm(jobs, alone):
    assert made(jobs, "samples", 4) == 0
    assert jobs.outputs("samples") == alone.outputs("samples")


def test_every_process_loads_one_model_and_computes_its_share(jobs, monkeypatch, tmp_path):
    def told(path, function):
        def wrapped(*args, **kwargs):
            with (tmp_path / path).open("a") as stream:
                stream.write(f"{team.rank()}\n")
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(models, "load_causal_lm", told("loads", models.load_causal_lm))
    monkeypatch.setattr(bulk, "response_scores", told("batches", bulk.response_scores))
    assert made(jobs, "reference", 3) == 0
    assert sorted((tmp_path / "loads").read_text().split()) == ["0", "1", "2"]
    batches = (tmp_path / "batches").read_text().split()
    assert len(batches) == 6  # 11 pairs, two at a time
    assert {batches.count(rank) for rank in "012"} == {2}


def test_values_of_rows_in_other_batches_are_within_a_band(jobs, alone):
    assert made(jobs, "reference", 2, micro_batch=22) == 0
    found, expected = (read_table(one.out("reference") / "scores.parquet") for one in (jobs, alone))
    for name in ("chosen_logp", "rejected_entropy"):
        assert np.abs(found[name] - expected[name]).max() <= GROUPING_BAND


# --- ends -------------------------------------------------------------------------------------------------------------


def struck(monkeypatch, where, rank, strike, after=1):
    """Let a function strike in one process, after it has done its work so many times."""
    module, name = where
    done, function = [], getattr(module, name)

    def wrapped(*args, **kwargs):
        if team.size() > 1 and team.rank() == rank and len(done) == after:
            strike()
        done.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)
    monkeypatch.setattr(rows, "_KEEP_SECONDS", 0.0)


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(5)


def err_lines(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("prefopt ")]


def kept_keys(jobs: RowJobs, job: str) -> list[int]:
    tables = (jobs.results / ".scratch" / jobs.nodes[job].ref).rglob("*/pairs/*.parquet")
    return [key for path in tables for key in read_table(path)["key"]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_with_a_line_and_its_rows_alone_are_computed_again(
    jobs, alone, monkeypatch, capfd, rank
):
    with monkeypatch.context() as patch:
        struck(patch, (bulk, "response_scores"), rank, kill, after=2)
        assert made(jobs, "reference", 2) == 75
    (line,) = err_lines(capfd)
    assert line.startswith(f"prefopt score-reference: process {rank} of 2 ended by SIGKILL (out of memory?)")
    assert not jobs.out("reference").exists()
    kept = kept_keys(jobs, "reference")
    assert len(kept) == len(set(kept)) < PAIRS
    computed = []
    scores = bulk.response_scores
    monkeypatch.setattr(bulk, "response_scores", lambda *a, **k: computed.append(a[1]) or scores(*a, **k))
    assert made(jobs, "reference") == 0  # by one process, so that this one sees what is computed
    assert sum(map(len, computed)) == PAIRS - len(kept)
    assert jobs.outputs("reference") == alone.outputs("reference")


def test_a_killed_process_of_a_generation_leaves_its_batches(jobs, alone, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        struck(patch, (generation, "_cut"), 1, kill)  # after the first of its two batches of one prompt
        assert made(jobs, "generations", 2) == 75
    assert len(err_lines(capfd)) == 1
    kept = list((jobs.results / ".scratch" / jobs.nodes["generations"].ref / "responses").glob("batch-*.json"))
    assert 0 < len(kept) < 4
    assert made(jobs, "generations", 3) == 0
    assert jobs.outputs("generations") == alone.outputs("generations")


def test_an_error_of_one_process_ends_the_job_as_a_failed_check(jobs, monkeypatch, capfd):
    def fail():
        raise ZeroDivisionError("planted")

    struck(monkeypatch, (bulk, "reward_scores"), 1, fail)
    assert made(jobs, "rewards", 2) == 3
    (line,) = err_lines(capfd)
    assert line == "prefopt score-rewards: ZeroDivisionError: planted (process 1, traceback above)"


def test_what_all_processes_find_wrong_is_said_once(jobs, capfd):
    shutil.rmtree(jobs.results / jobs.nodes["reference"].parents["model"] / "weights")
    assert made(jobs, "reference", 3) == 2
    assert len(err_lines(capfd)) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_keeps_what_is_finished(jobs, alone, monkeypatch, capfd, processes):
    """To the process that was started, which hands it on."""
    scores, started, times = bulk.response_scores, os.getpid(), []

    def terminated(*args, **kwargs):
        times.append(None)
        if team.is_first() and len(times) == 2:
            os.kill(started, signal.SIGTERM)
            time.sleep(0.2)
        return scores(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "response_scores", terminated)
        assert made(jobs, "reference", processes) == 75
    (line,) = err_lines(capfd)
    assert line.startswith("prefopt score-reference: terminated; what is finished is kept")
    kept = kept_keys(jobs, "reference")
    assert 0 < len(set(kept)) < PAIRS
    assert made(jobs, "reference", 2) == 0
    assert jobs.outputs("reference") == alone.outputs("reference")


def test_rows_of_other_weights_are_not_taken_up(jobs, monkeypatch):
    """What is kept is bound to the bytes of the parents, which an id is not."""
    with monkeypatch.context() as patch:
        struck(patch, (bulk, "response_scores"), 1, kill)
        assert made(jobs, "reference", 2) == 75
    assert kept_keys(jobs, "reference")
    parent = jobs.results / jobs.nodes["reference"].parents["model"] / "manifest.json"
    parent.write_text(parent.read_text().replace("sha256", "sha512"))
    computed, scores = [], bulk.response_scores
    monkeypatch.setattr(bulk, "response_scores", lambda *a, **k: computed.append(a[1]) or scores(*a, **k))
    assert made(jobs, "reference") == 0
    assert sum(map(len, computed)) == PAIRS


def test_workers_end_when_their_watcher_is_killed(tmp_path):
    def work():
        (tmp_path / str(team.rank())).write_text(str(os.getpid()))
        while True:
            team.check()
            time.sleep(0.01)

    watcher = os.fork()
    if watcher == 0:
        team.run(2, work)
        os._exit(1)
    wait_until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"))
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    wait_until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_leaves_the_others_waiting_is_an_error():
    with pytest.raises(FailedCheck, match="waited for others that had finished"):
        team.run(2, lambda: team.barrier() if team.is_first() else None)


# --- who takes what ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 500)), st.integers(1, 9))
def test_shares_have_every_piece_once_and_about_as_much(costs, size):
    found = shares(costs, size)
    assert sorted(piece for pieces in found for piece in pieces) == [*range(len(costs))]
    assert found == shares(costs, size)
    if costs:
        loads = [sum(costs[piece] for piece in pieces) for pieces in found]
        assert max(loads) <= sum(costs) / size + max(costs)


def test_every_process_has_a_gpu_of_its_own():
    assert [gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(BadInput, match="process 4 of this machine has no GPU: there are 4"):
        gpu_of(4, 4)


def node(stage: str, **spec) -> Node:
    return Node(stage, 1, stage, spec)


def test_only_jobs_that_run_a_model_of_ours_are_divided(alone):
    engine = {"sampling": {"engine": "vllm"}}
    divided = [node("rewards"), node("samples", sampling={}), node("judgements", judge="reward_model")]
    others = [node("policy"), node("samples", **engine), node("judgements", judge="oracle")]
    others.append(node("judgements", judge={"kind": "server"}))
    assert [has_divisible_rows(one) for one in divided + others] == [True] * 3 + [False] * 4
    three = ExecutionSpec(processes=2, row_processes=3)
    assert [row_processes(one, three) for one in (divided[0], others[0])] == [3, 1]
    assert row_processes(divided[0], ExecutionSpec(processes=2)) == 2


def test_a_judge_that_is_no_model_is_refused_as_several_processes(alone, capfd):
    spec = str(alone.spec("oracle"))
    assert main(["judge", "--spec", spec, "--processes", "2"]) == 2
    assert "runs no model of ours that 2 processes could share; use --processes 1" in capfd.readouterr().err
