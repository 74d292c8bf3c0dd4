"""The warm server asked as its clients ask it: which process does a job, and what is left of those before."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefopt.processes import warm_server
from prefopt.processes.warm import SOCKET_VARIABLE, STREAMS, send

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server of these tests' own: others would make it give up processes."""
    words = [sys.executable, "-m", "prefopt", "launch", "--", "sh", "-c", f"echo ${SOCKET_VARIABLE}; exec cat"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder = tmp_path_factory.mktemp("server")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(words, cwd=folder, env=environment, **pipes)
    yield server.stdout.readline().strip()
    server.communicate(timeout=60)
    assert server.returncode == 0


@contextmanager
def asked(address, folder, *argv, **environment):
    """The server's further answers to one who asks for a job, and the process that does it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, (folder / "out").open("w") as out:
        connection.connect(f"\0{address}")
        job = {"argv": argv, "cwd": str(folder), "environment": {"PATH": os.environ["PATH"], **environment}}
        send(connection, json.dumps(job).encode(), [out.fileno()] * len(STREAMS))
        connection.settimeout(60)
        with connection.makefile("r") as answers:
            yield answers, int(answers.readline())


def done(address, folder, *argv, **environment):
    """The process that did the job, its exit code, and what it wrote."""
    with asked(address, folder, *argv, **environment) as (answers, pid):
        code = int(answers.readline())
    time.sleep(0.1)  # the server hears that we are gone
    return pid, code, (folder / "out").read_text()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()


def wait_for_the_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_of_one_kind_are_done_by_one_process_and_write_to_their_own_streams(address, tmp_path):
    first, code, text = done(address, tmp_path, "losses")
    assert code == 0
    assert "2405.14953" in text
    assert done(address, tmp_path, "losses") == (first, 0, text)


def test_specs_make_no_difference(address, tmp_path):
    """Help is asked for, since it ends well whatever else is said."""
    pids = {done(address, tmp_path, "train-sft", "--spec", f"{name}.json", "--help")[0] for name in "abc"}
    assert len(pids) == 1


def test_another_command_folder_or_environment_takes_another_process(address, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    kinds = [((tmp_path, "losses"), {}), ((tmp_path, "losses", "--help"), {}), ((folder, "losses"), {})]
    kinds.append(((tmp_path, "losses"), {"PREFOPT_ANY": "1"}))
    assert len({done(address, *words, **environment)[0] for words, environment in kinds}) == len(kinds)


def test_as_many_processes_wait_as_there_are_cores(address, tmp_path):
    pids = [done(address, tmp_path, "losses", NUMBER=str(number))[0] for number in range(os.cpu_count() + 3)]
    for pid in pids[:3]:
        wait_for_the_end(pid)
    assert all(is_alive(pid) for pid in pids[3:])


def test_a_process_that_failed_is_not_asked_again(address, tmp_path):
    pid, code, text = done(address, tmp_path, "train-sft", "--spec", "gone.json")
    assert (code, text) == (2, "prefopt train-sft: gone.json: no such file\n")
    wait_for_the_end(pid)
    assert done(address, tmp_path, "train-sft", "--spec", "gone.json")[0] != pid


def test_the_process_of_a_client_that_left_in_the_middle_is_killed(address, tmp_path):
    os.mkfifo(tmp_path / "never.json")
    with asked(address, tmp_path, "train-sft", "--spec", "never.json") as (_, pid):
        time.sleep(0.2)
        assert is_alive(pid)
    wait_for_the_end(pid)


def test_a_process_that_is_killed_is_told_by_its_signal(address, tmp_path):
    os.mkfifo(tmp_path / "never.json")
    with asked(address, tmp_path, "train-sft", "--spec", "never.json") as (answers, pid):
        os.kill(pid, signal.SIGKILL)
        assert answers.readline() == f"{128 + signal.SIGKILL}\n"


def test_a_waiting_process_that_is_killed_is_missed_by_nobody(address, tmp_path):
    pid = done(address, tmp_path, "losses")[0]
    os.kill(pid, signal.SIGKILL)
    wait_for_the_end(pid)
    other, code, _ = done(address, tmp_path, "losses")
    assert (other != pid, code) == (True, 0)


def test_nothing_waits_where_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_server, "_IDLE_SECONDS", 0.2)
    monkeypatch.setattr(warm_server, "load", lambda: importlib.import_module("torch"))  # all that listing needs
    name, listener = f"prefopt-{os.urandom(8).hex()}", socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen()
    lifeline, held = os.pipe()
    server = os.fork()
    if server == 0:
        os.close(held)
        try:
            warm_server.Server(listener, lifeline).serve()
        finally:
            os._exit(0)
    listener.close()
    try:
        pid = done(name, tmp_path, "losses")[0]
        wait_for_the_end(pid)
        again = done(name, tmp_path, "losses")
    finally:
        os.close(held)
    assert os.waitpid(server, 0) == (server, 0)
    assert (again[0] != pid, again[1]) == (True, 0)


def test_what_is_no_request_disturbs_nobody(address, tmp_path):
    pid = done(address, tmp_path, "losses")[0]
    for junk in (b"", b"junk", (9).to_bytes(8, "big") + b"short"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(f"\0{address}")
            connection.sendall(junk)
    assert done(address, tmp_path, "losses")[0] == pid
