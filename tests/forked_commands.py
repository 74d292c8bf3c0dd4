"""``python -m snakemake`` and ``python -m prefopt`` in processes forked from one that has imported both.

A dry run of a small project is a third of a second of work after a second of imports. Each command has a process, a
folder, an environment and streams of its own, as without a fork; only what importing does is shared.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Outcome of ``python -m WORDS`` in a folder."""
    with tempfile.TemporaryDirectory() as streams:
        said = [Path(streams) / name for name in ("out", "err")]
        request = {"words": list(words), "folder": str(folder), "environment": dict(environment), "said": said}
        code = _answer(json.dumps(request, default=str))
        out, err = (path.read_text() for path in said)
    return subprocess.CompletedProcess(["python", "-m", *words], code, out, err)


def _answer(request: str) -> int:
    server = _server()
    try:
        server.stdin.write(f"{request}\n")
        server.stdin.flush()
        return int(server.stdout.readline())
    except BaseException:  # such as a test's time limit: what is answered later would be taken for the next answer
        server.kill()
        _server.cache_clear()
        raise


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def serve() -> None:
    """Fork a process per line of standard input and answer with its exit code, until there are no more."""
    for name in ("prefopt.cli", "prefopt.plan", "smart_open", "snakemake.cli"):
        importlib.import_module(name)
    sys.modules["snakemake.cli"].get_argument_parser()  # imports the plugins, which add options

    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _become(**json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(words: list[str], folder: str, environment: dict[str, str], said: list[str]) -> None:
    """Be the process of a command, to its end."""
    import runpy

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[0] = words, folder
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve()
