"""One server of warm jobs for all test processes: a job that need not be cold is forked from it, and imports nothing.

The process that starts the tests starts the server, and the server imports when the first job asks. It ends with that
process, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.processes.warm import SOCKET_VARIABLE

_ADDRESS = "PREFOPT_TESTS_WARM"  # not the product's own variable: what tests start by other ways stays cold
_ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def warm_server() -> Iterator[None]:
    """A server that this process and those that it starts find."""
    tell_and_wait = f"echo ${SOCKET_VARIABLE}; exec cat"  # until the pipe to this process ends
    command = [sys.executable, "-m", "prefopt", "launch", "--", "sh", "-c", tell_and_wait]
    paths = [str(_ROOT / "workflow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:  # launching locks its folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        os.environ[_ADDRESS] = server.stdout.readline().strip()
        try:
            yield
        finally:
            del os.environ[_ADDRESS]
            server.communicate()


def beside_server() -> dict[str, str]:
    """What a command has to have in its environment for its jobs to be forked."""
    return {SOCKET_VARIABLE: os.environ[_ADDRESS]} if _ADDRESS in os.environ else {}
