"""A Hugging Face hub on loopback: repositories in memory, served as the hub's own client asks for them.

Only what downloads need: the tree and the information of a commit, and files with their checksums, sizes and ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".bin", ".parquet")  # kept by their sha256, as the hub's large files are


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files as the content of a repository."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def git_sha1(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class FakeHub:
    """Commits with their files, what went wrong with them on purpose, and what was asked for."""

    url: str
    commits: dict[tuple[str, str, str], dict[str, bytes]] = field(default_factory=dict)  # kind, repository, commit
    damaged: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent instead
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes sent before the connection ends, in turn
    gated: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range

    def add(self, repo: str, files: dict[str, bytes], *, kind: str = "models") -> str:
        """Put a commit into a repository; returns its name."""
        listing = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())})
        commit = hashlib.sha1(f"{kind}/{repo}{listing}".encode()).hexdigest()
        self.commits[kind, repo, commit] = files
        return commit

    def got(self, name: str) -> list[str]:
        """The ranges with which a file's content was asked for; '' is all of it."""
        return [bytes_ for method, path, bytes_ in self.asked if method == "GET" and path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        parts = path.split("/")
        if parts[0] == "api":
            self._api(parts[1], "/".join(parts[2:4]), parts[4:])
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) > 4 and parts[2] == "resolve":
            self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        paths = json.loads(body).get("paths", []) if body.startswith("{") else []
        self._api(parts[1], "/".join(parts[2:4]), parts[4:], paths)

    def _files(self, kind: str, repo: str, commit: str) -> dict[str, bytes] | None:
        """The files of a commit; None where it was answered that there are none."""
        if repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
            return None
        if (kind, repo, commit) not in self.hub.commits:
            known = any(key[:2] == (kind, repo) for key in self.hub.commits)
            self._refuse(404, "RevisionNotFound" if known else "RepoNotFound")
            return None
        return self.hub.commits[kind, repo, commit]

    def _api(self, kind: str, repo: str, rest: list[str], paths: list[str] | None = None) -> None:
        if len(rest) < 2:
            self._refuse(404, "EntryNotFound")
            return
        files = self._files(kind, repo, rest[1])
        if files is None:
            return
        if rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": rest[1], "private": False, "tags": [], "siblings": siblings})
            return
        if paths is not None:
            self._json([_entry(name, files[name]) for name in files if name in paths])
            return
        below = "".join(f"{part}/" for part in rest[2:])
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        self._json(_listing({name: files[name] for name in files if name.startswith(below)}, below, deep))

    def _file(self, kind: str, repo: str, commit: str, name: str) -> None:
        files = self._files(kind, repo, commit)
        if files is None:
            return
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        whole, sent = files[name], self.hub.damaged.get(name, files[name])
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if "Range" in self.headers else 0
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{_entry(name, whole)["lfs"]["oid"] if name.endswith(_LARGE) else git_sha1(whole)}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(sent) - start),
        }
        if name.endswith(_LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(whole))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(sent) - 1}/{len(sent)}"
        self._start(206 if start else 200, headers)
        if self.command == "HEAD":
            return
        cuts = self.hub.cut.get(name, [])
        if cuts:
            self.wfile.write(sent[start : start + cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)
            return
        self.wfile.write(sent[start:])

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self._start(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self._start(status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"})

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""


def _listing(files: dict[str, bytes], below: str, deep: bool) -> list[dict[str, Any]]:
    """All files, or what stands directly in the folder ``below``: its files and folders."""
    if deep:
        return [_entry(name, content) for name, content in files.items()]
    inside = {name.removeprefix(below).split("/")[0] for name in files}
    found = [(f"{below}{first}", files.get(f"{below}{first}")) for first in sorted(inside)]
    folder = {"type": "directory", "oid": "0" * 40, "size": 0}
    return [folder | {"path": path} if content is None else _entry(path, content) for path, content in found]


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
    if name.endswith(_LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers until the end of the block."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
