"""Real chat servers in processes of their own, on loopback, for as long as a test module needs them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefopt.judges.cache import AnswerCache
from prefopt.judges.client import ChatClient
from prefopt.judges.pairwise import PairwiseJudge
from prefopt.judges.server import ServerJudge
from prefopt.judges.templates import TEMPLATES

LABELS = ["m", "M"]
START_SECONDS = 300


def lacking(python: Path | None, modules: str) -> str | None:
    """Why an interpreter cannot import the modules, if so."""
    if python is None or not python.is_file():
        return "no interpreter is named" if python is None else f"no {python.name} there"
    done = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@contextmanager
def served(words: Callable[[int], Sequence[object]], ready: str, log: Path) -> Iterator[str]:
    """Run the command that ``words`` gives for a free port, until the path ``ready`` answers; gives its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as stream:
        process = subprocess.Popen([*map(str, words(port))], stdout=stream, stderr=stream, env=environment)
    try:
        _wait_for(address + ready, process, log)
        yield address
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def judge_at(base_url: str, name: str, cache: Path, **settings: int) -> PairwiseJudge:
    """The server judge, as a configuration would make it."""
    client = ChatClient(base_url, first_wait=0.05, timeout_seconds=120.0, concurrency=4)
    asker = ServerJudge(client, name, TEMPLATES["ranking"], LABELS, settings.get("top_logprobs", 5), 1)
    return PairwiseJudge(asker, LABELS, AnswerCache(cache, {"model_name": name}))
