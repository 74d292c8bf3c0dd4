"""A chat server on loopback that counts what it is asked, answers or forwards it, and fails on the way as told."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]
Faults = Callable[[str, int], str | None]
"""(what is asked, how often it was asked before) -> the fault to inject, or none."""

SLOW_SECONDS = 3.0


def shown(request: Request) -> tuple[str, str, str]:
    """Request, first and second answer that a judge's prompt quotes."""
    text = request["messages"][-1]["content"]
    quoted = json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])
    return quoted["request"], *(answer["answer"] for answer in quoted["answers"])


def longer_wins(request: Request) -> dict[str, Any]:
    """A judge that likes the longer answer: log-odds of 'M' are a tenth of the difference in characters."""
    _, first, second = shown(request)
    odds = (len(second) - len(first)) / 10
    return completion("M" if odds > 0 else "m", {"m": -1.0, "M": odds - 1.0, "other": -9.0})


def completion(text: str, top: dict[str, float] | None = None) -> dict[str, Any]:
    """A chat completion as OpenAI's servers write it."""
    entries = [{"token": token, "logprob": logp} for token, logp in (top or {}).items()]
    logprobs = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": entries}]} if top else None
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}


class JudgeServer(ThreadingHTTPServer):
    """``answered`` counts replies by what was asked, ``asked`` every request; ``reply`` or ``upstream`` answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        reply: Callable[[Request], dict[str, Any]] = longer_wins,
        faults: Faults = lambda asked, before: None,
        upstream: str | None = None,
        seconds: float = 0.0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.faults, self.upstream, self.seconds = reply, faults, upstream, seconds
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.times: list[float] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or has lost patience is part of the tests; anything else is told."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.dumps(json.loads(body)["messages"])
        server = self.server
        with server.lock:
            before = server.asked[asked]
            server.asked[asked] += 1
            server.keys.add(self.headers.get("authorization"))
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.seconds)
            fault = server.faults(asked, before)
            if fault is None or fault == "slow":
                time.sleep(SLOW_SECONDS if fault else 0.0)
                self._answer(asked, body)
            else:
                getattr(self, f"_fault_{fault}")()
        except OSError:
            self.close_connection = True  # the client has hung up
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, asked: str, body: bytes) -> None:
        status, content = 200, None
        if self.server.upstream is None:
            content = json.dumps(self.server.reply(json.loads(body))).encode()
        else:
            url, headers = f"{self.server.upstream}/chat/completions", {"content-type": "application/json"}
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as reply:
                    content = reply.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
        self._send(status, content)
        with self.server.lock:
            self.server.answered[asked] += 1

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _fault_busy(self) -> None:
        self._send(429, b'{"error": "slow down"}', retry_after="0.3")

    def _fault_error(self) -> None:
        self._send(500, b"oops")

    def _fault_cut(self) -> None:
        """Half of a reply, then nothing."""
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.wfile.flush()
        self.close_connection = True

    def _fault_drip(self) -> None:
        """A reply that never ends and never pauses for long."""
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)

    def _fault_garbage(self) -> None:
        self._send(200, b'{"choices": [{"mess')

    def _fault_empty(self) -> None:
        self._send(200, b'{"choices": []}')

    def _fault_tomorrow(self) -> None:
        self._send(429, b'{"error": "quota"}', retry_after="86400")

    def _fault_long(self) -> None:
        """As OpenAI, vLLM and llama.cpp say it."""
        error = {"message": "This model's maximum context length is 64 tokens.", "code": "context_length_exceeded"}
        self._send(400, json.dumps({"error": error}).encode())

    def _fault_refuse(self) -> None:
        self._send(401, b'{"error": "bad key ' + (self.headers.get("authorization") or "").encode() + b'"}')


@contextmanager
def serving(server: JudgeServer):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
