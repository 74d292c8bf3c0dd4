"""An S3 server on this machine, from an environment with envs/s3.txt."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

S3_TOOLS = "PREFOPT_S3_TOOLS"  # bin folder of that environment


def s3_tools() -> Path:
    """The environment's programs; the test is skipped where none is named."""
    if not os.environ.get(S3_TOOLS):
        pytest.skip(f"needs {S3_TOOLS}=<bin folder of an environment with envs/s3.txt>")
    return Path(os.environ[S3_TOOLS])


@contextmanager
def s3_server(tools: Path) -> Iterator[str]:
    """Address of an S3 server on this machine that forgets everything at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [tools / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
