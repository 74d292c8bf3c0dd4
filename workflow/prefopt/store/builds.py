"""Building an artifact: parents checked, one process at a time, a scratch folder, and one rename at the end.

An artifact is built in an undeclared scratch folder and renamed into place when it is whole, manifest included: a
folder under its final name is always complete.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefopt import team
from prefopt.artifacts import MANIFEST, Node, outputs_digest, tree_files
from prefopt.contexts import locked
from prefopt.digests import file_sha256
from prefopt.errors import AlreadyMade
from prefopt.files import write_json
from prefopt.storage import flush_tree, swap_in
from prefopt.store.provenance import code_state, peak_memory_mb, torch_threads
from prefopt.store.verification import check_parents

SCRATCH = ".scratch"
BUILDING = ".building"  # locked in the scratch folder for as long as a process builds there
_log = logging.getLogger(__name__)


@dataclass
class Build:
    """An artifact under construction: parents to read, a folder to write, a scratch folder that survives a kill."""

    node: Node
    results: Path
    work: Path
    scratch: Path
    summary: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def parent(self, role: str) -> Path:
        """Folder of the parent artifact in that role."""
        return self.results / self.node.parents[role]

    def has_parent(self, role: str) -> bool:
        """Whether the plan wired a parent in that role."""
        return role in self.node.parents

    def parents_like(self, prefix: str) -> dict[str, Path]:
        """Folders of all parents whose role starts with ``prefix``, in the roles' natural order."""
        roles = [r for r in self.node.parents if r.startswith(prefix)]
        return {r: self.results / self.node.parents[r] for r in sorted(roles, key=lambda r: (len(r), r))}


@contextmanager
def building(node: Node, results: Path) -> Iterator[Build]:
    """Build one artifact: write into ``build.work``; on success it becomes ``results/<stage>/<id>`` in one rename.

    Everything is on disk before the rename, so a power cut leaves all of it or nothing. On any failure nothing new
    stands under the final name; ``build.scratch`` (checkpoints) stays for the next attempt, until one succeeds.
    One process builds an artifact at a time: another waits, and raises AlreadyMade where there is nothing left to do.
    Raises BadInput where a parent has no manifest, FailedCheck where a parent is damaged.
    """
    out = (results / node.ref).resolve()
    check_parents(node, results)
    scratch = results / SCRATCH / node.ref
    work, aside = scratch / "out", scratch / "replaced"
    before = _stamp(out)
    waited: list[Any] = []
    with locked(scratch / BUILDING, on_wait=partial(_tell_wait, node, waited)):
        if waited and _stamp(out) not in (None, before):
            let_go(scratch)
            raise AlreadyMade(f"{out}: {waited[0]} has made it meanwhile")
        for leftover in (work, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        started, cpu_started = time.monotonic(), time.process_time()
        build = Build(node=node, results=results, work=work, scratch=scratch)
        try:
            yield build
            write_json(work / MANIFEST, _manifest(build, started, cpu_started))
            flush_tree(work)
            swap_in(work, out, aside)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            let_go(scratch)
            raise
        _empty(scratch)
        let_go(scratch)


def _empty(scratch: Path) -> None:
    """Remove what served the finished build, checkpoints above all; the lock is still held."""
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != BUILDING:
            path.unlink()


def _stamp(artifact: Path) -> tuple[int, int] | None:
    """What changes when an artifact is made anew; None where there is none."""
    try:
        found = (artifact / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _tell_wait(node: Node, waited: list[str], holder: str) -> None:
    """Say it once; TryAgain where this process is asked to end meanwhile."""
    team.check()
    if not waited:
        waited.append(holder)
        _log.info("%s: %s builds it; waiting", node.ref, holder)


def let_go(scratch: Path) -> None:
    """Remove the lock that this process holds, and the folder where nothing else is in it.

    The lock goes last: as long as it is there, no other process takes the folder for its own.
    """
    if {path.name for path in scratch.iterdir()} <= {BUILDING}:
        (scratch / BUILDING).unlink(missing_ok=True)
        with suppress(OSError):  # another process has begun there since
            scratch.rmdir()


def _manifest(build: Build, started: float, cpu_started: float) -> dict[str, Any]:
    node = build.node
    inputs = {ref: outputs_digest(build.results / ref) for ref in sorted(set(node.parents.values()))}
    outputs = {
        str(p.relative_to(build.work)): {"sha256": file_sha256(p), "bytes": p.stat().st_size}
        for p in tree_files(build.work)
    }
    return {
        **node.to_json(),
        "summary": build.summary,
        "inputs": inputs,
        "outputs": outputs,
        **code_state(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": build.device,
        "threads": torch_threads(),
        "wall_seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu_started, 3),
        "peak_memory_mb": peak_memory_mb(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
