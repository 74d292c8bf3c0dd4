"""What a process of the warm server's keeps between two jobs, and when it does not stay."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from prefopt.processes import warm_process
from prefopt.processes.warm import STREAMS, send
from prefopt.processes.warm_process import DONE


def answers(monkeypatch, job, requests):
    """What a process says that is sent these requests, byte by byte, what its jobs wrote, and its exit code."""
    monkeypatch.setattr(warm_process, "_job", job)
    mine, theirs = socket.socketpair()
    reader, writer = os.pipe()
    nowhere = os.open(os.devnull, os.O_RDWR)
    pid = os.fork()
    if pid == 0:
        mine.close()
        streams = [os.dup(writer) for _ in STREAMS]
        warm_process.work(theirs, requests[0], streams)
    theirs.close()
    os.close(writer)
    said = b""
    for request in [*requests[1:], None]:
        byte = mine.recv(1)
        said += byte
        if byte == DONE and request is not None:
            send(mine, json.dumps(request).encode(), [nowhere] * len(STREAMS))
    mine.close()
    os.close(nowhere)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as text:
        return said, text.read().split(), os.waitstatus_to_exitcode(status)


def writes(what):
    """A job that writes this number to the first job's stream, and ends with the code that is asked for."""
    places = []

    def job(request, streams):
        places.extend(streams)
        os.write(places[0], f"{what()} ".encode())
        return request["code"]

    return job


def test_random_numbers_start_over_with_every_job(monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(()).item()
    torch.manual_seed(3)
    said, numbers, code = answers(monkeypatch, writes(lambda: torch.rand(()).item()), [{"code": 0}] * 3)
    assert (said, code) == (DONE * 3, 0)
    assert list(map(float, numbers)) == [expected] * 3


def test_the_most_memory_is_that_of_the_job(monkeypatch):
    """The second job takes no memory; without a new count it would be told that of the first: 400 MB more."""
    sizes = iter([400, 1])

    def most():
        torch.ones(next(sizes), 1 << 18)
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    first, second = map(float, answers(monkeypatch, writes(most), [{"code": 0}] * 2)[1])
    assert first - second > 300


def test_a_job_that_fails_is_the_last(monkeypatch):
    said, texts, code = answers(monkeypatch, writes(lambda: 1), [{"code": 0}, {"code": 3}, {"code": 0}])
    assert (said, texts, code) == (DONE, ["1", "1"], 3)


def test_a_job_that_had_processes_of_its_own_is_the_last(monkeypatch):
    def had():
        subprocess.run([sys.executable, "-c", ""], check=True)
        return 1

    assert answers(monkeypatch, writes(had), [{"code": 0}] * 2) == (b"", ["1"], 0)


@pytest.mark.parametrize("left", ["gpu", "memory"])
def test_a_job_that_leaves_a_gpu_or_much_memory_is_the_last(monkeypatch, left):
    if left == "gpu":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    else:
        monkeypatch.setattr(warm_process, "_KEPT_BYTES", 1 << 20)
    assert answers(monkeypatch, writes(lambda: 1), [{"code": 0}] * 2) == (b"", ["1"], 0)


def test_a_job_ends_with_its_server(monkeypatch):
    """Nobody else could tell the client what becomes of it. The pipe ends when the job does, which would sleep on."""
    monkeypatch.setattr(warm_process, "_job", lambda request, streams: time.sleep(60))
    reader, writer = os.pipe()
    server = os.fork()
    if server == 0:
        if os.fork() == 0:
            warm_process.work(socket.socketpair()[0], {}, [])
        os.close(writer)
        signal.pause()
    os.close(writer)
    time.sleep(0.5)
    assert select.select([reader], [], [], 0)[0] == []
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    assert select.select([reader], [], [], 20)[0] == [reader]
    os.close(reader)


def test_what_a_job_did_at_a_signal_is_forgotten(monkeypatch):
    def handles():
        found = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: None)
        return int(found == signal.SIG_DFL)

    assert answers(monkeypatch, writes(handles), [{"code": 0}] * 2)[1] == ["1", "1"]
