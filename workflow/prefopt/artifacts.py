"""Content-addressed artifacts on disk: identity, atomic appearance, manifests and their verification.

An artifact is a folder ``results/<stage>/<name>-<8 hex>/``. It is built in an undeclared scratch folder and renamed
into place when it is whole, manifest included: a folder under its final name is always complete.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from prefopt import team
from prefopt.contexts import locked
from prefopt.errors import AlreadyMade, BadInput, FailedCheck
from prefopt.json_text import parsed_json
from prefopt.storage import flush_tree, swap_in, write_whole

MANIFEST = "manifest.json"
SCRATCH = ".scratch"
BUILDING = ".building"  # locked in the scratch folder for as long as a process builds there
_log = logging.getLogger(__name__)
_NODE_KEYS = {"stage": str, "version": int, "name": str, "spec": Mapping, "parents": Mapping, "execution": Mapping}
_MANIFEST_KEYS = {"stage": str, "spec": dict, "parents": dict, "summary": dict, "inputs": dict, "outputs": dict}
_REF = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # relative, and never above the results folder
_NOT_CONTENT = frozenset({MANIFEST, ".snakemake_timestamp"})  # the second is what Snakemake leaves in folders
_MANY = {"pair_id": "pairs", "prompt_id": "prompts"}
_RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "snakemake",
)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, which is what gets hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def short_digest(value: Any) -> str:
    """First 8 hex digits of the sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:8]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_md5(path: Path) -> str:
    """md5 of a file's bytes, in hex: the name that DVC gives it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def tree_files(folder: Path) -> list[Path]:
    """Every file of an artifact's content below ``folder``, in sorted order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _NOT_CONTENT)


def outputs_digest(folder: Path) -> str:
    """sha256 over the outputs an artifact's manifest records: equal for a re-made artifact with the same bytes."""
    return hashlib.sha256(canonical_json(read_manifest(folder / MANIFEST, "outputs")["outputs"]).encode()).hexdigest()


def write_text(path: Path, text: str, *, flush: bool = False) -> None:
    """Write a file so that it appears whole or not at all; ``flush``: and stays after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text, flush=flush)


def json_text(value: Any) -> str:
    """Indented JSON as files have it; NaN and infinity are refused, since they are no JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any, *, flush: bool = False) -> None:
    """Write ``json_text`` as ``write_text`` does."""
    write_text(path, json_text(value), flush=flush)


def read_json(path: Path) -> Any:
    """Read a JSON file; BadInput names the file where it is missing or broken."""
    try:
        return parsed_json(read_text(path), finite=True)
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); remove the file and run again") from None


def read_manifest(path: Path, *needed: str) -> dict[str, Any]:
    """Read a manifest; BadInput names the file where it is missing or broken, or where a part is not what it should be.

    Parts that are not ``needed`` may be missing.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path}: no manifest but {type(content).__name__}; remove the folder and run again")
    for key, kind in _MANIFEST_KEYS.items():
        if (key in content or key in needed) and not isinstance(content.get(key), kind):
            raise BadInput(f"{path}: no manifest, '{key}' is {content.get(key)!r:.40}; remove the folder and run again")
    for key, kind in {"parents": str, "inputs": str, "outputs": dict}.items():
        if wrong := [name for name, value in content.get(key, {}).items() if not isinstance(value, kind)]:
            raise BadInput(f"{path}: no manifest, '{key}.{wrong[0]:.40}' is damaged; remove the folder and run again")
    return content


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSONL atomically."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSONL that ``write_lines`` wrote."""
    lines = read_text(path).split("\n")  # splitlines would cut texts at characters such as U+2028
    try:
        return [parsed_json(line) for line in lines if line]
    except ValueError as error:
        raise BadInput(f"{path}: not one JSON object per line ({error}); remove the folder and run again") from None


def write_table(path: Path, table: Any) -> None:
    """Write a pandas data frame as parquet, without its index, so that it appears whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    table.to_parquet(beside, index=False)
    os.replace(beside, path)


def read_table(path: Path, columns: Sequence[str] | None = None, split: str | None = None) -> Any:
    """Read a parquet table as a pandas data frame: all of it, or some columns, or the rows of one split."""
    import pandas as pd
    import pyarrow as pa

    kept = [("split", "==", split)] if split is not None else None
    try:
        return pd.read_parquet(path, columns=list(columns) if columns is not None else None, filters=kept)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except MemoryError:  # of the machine, and no finding about the file, though Arrow's is one of its own as well
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise BadInput(f"{path}: not the table that was written ({error}); remove the folder and run again") from None


def read_text(path: Path) -> str:
    """The text of a file that an artifact or a version-control tool keeps; BadInput names one that is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (IsADirectoryError, NotADirectoryError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: no text in it ({error})") from None


def read_rows(path: Path) -> list[list[str]]:
    """Read a CSV file as texts, the header first."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.reader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not CSV ({error}); remove the folder and run again") from None


def join_one_to_one(left: Any, right: Any, what: str, on: str = "pair_id") -> Any:
    """Join two tables on a key; every row of the left must be in both exactly once.

    Raises BadInput naming the first missing or repeated key: tables are never joined on row order.
    """
    for side in (left, right):
        repeated = side.loc[side[on].duplicated(), on]
        if len(repeated):
            raise BadInput(f"{what}: {on} {repeated.iloc[0]} stands in more than one row")
    missing = left.loc[~left[on].isin(right[on]), on]
    if len(missing):
        raise BadInput(f"{what}: no row for {on} {missing.iloc[0]} ({len(missing)} {_MANY.get(on, 'rows')} missing)")
    return left.merge(right, on=on, how="left", validate="one_to_one")


@dataclass(frozen=True)
class Node:
    """One planned artifact: a stage, its hashed spec, its parents, and settings that do not change the result."""

    stage: str
    version: int
    name: str
    spec: Mapping[str, Any]
    parents: Mapping[str, str] = field(default_factory=dict)  # role -> "stage/id"
    execution: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """``<name>-<8 hex>``; the hex covers stage, version, spec and parents, not the name."""
        identity = {
            "stage": self.stage,
            "version": self.version,
            "spec": self.spec,
            "parents": {role: ref.rsplit("-", 1)[-1] for role, ref in self.parents.items()},
        }
        return f"{self.name}-{short_digest(identity)}"

    @property
    def ref(self) -> str:
        """``stage/id``: the artifact's folder below results."""
        return f"{self.stage}/{self.id}"

    def to_json(self) -> dict[str, Any]:
        """The spec file's content, with the id spelled out for readers."""
        return {
            "stage": self.stage,
            "id": self.id,
            "version": self.version,
            "name": self.name,
            "spec": dict(self.spec),
            "parents": dict(self.parents),
            "execution": dict(self.execution),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Node:
        """Inverse of ``to_json``; BadInput where the recorded id is not the content's."""
        if not isinstance(content, Mapping):
            raise BadInput(f"spec file is {type(content).__name__}, expected an object; plan again to write it anew")
        for key, kind in _NODE_KEYS.items():
            if key not in content:
                raise BadInput(f"spec file without the key '{key}'; plan again to write it anew")
            if not isinstance(content[key], kind) or isinstance(content[key], bool):
                raise BadInput(f"spec file: '{key}' is {content[key]!r:.40}; plan again to write it anew")
        node = cls(**{key: content[key] for key in _NODE_KEYS})
        for ref in (node.stage, node.name, *node.parents.values()):
            if not isinstance(ref, str) or not _REF.fullmatch(ref):
                raise BadInput(f"spec file: {ref!r:.60} names no artifact; plan again to write it anew")
        try:
            made = node.id
        except ValueError as error:  # a number that is none, a text that is no Unicode
            raise BadInput(f"spec file with a value that is none ({error}); plan again to write it anew") from None
        if content.get("id") != made:
            raise BadInput(
                f"spec file says id '{content.get('id')}', its content has id '{made}': it was edited by hand"
            )
        return node


def node_of(path: Path) -> Node:
    """The artifact that a spec file or a manifest describes; BadInput names the file where it describes none."""
    content = read_json(path)
    try:
        return Node.from_json(content)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


@cache
def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that ``folder`` is in; nulls where it is none."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: metadata.version(name) for name in _RECORDED_PACKAGES}


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6, 1)


def torch_threads() -> int | None:
    """Threads that torch computes with in this process; None where it was not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


@dataclass
class Build:
    """An artifact under construction: parents to read, a folder to write, a scratch folder that survives a kill."""

    node: Node
    results: Path
    out: Path
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


def results_of(spec_file: Path) -> Path:
    """``results`` of a spec file ``results/specs/<stage>/<id>.json``; BadInput where it lies elsewhere."""
    for folder in spec_file.resolve().parents:
        if folder.name == "specs":
            return folder.parent
    raise BadInput(f"{spec_file}: spec files lie in <results>/specs/<stage>/, so that parents can be found beside them")


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
        "git": git_state(Path(__file__).resolve().parent),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": build.device,
        "threads": torch_threads(),
        "wall_seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu_started, 3),
        "peak_memory_mb": peak_memory_mb(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def building(node: Node, results: Path, out: Path | None = None) -> Iterator[Build]:
    """Build one artifact: write into ``build.work``; on success it becomes ``results/<stage>/<id>`` in one rename.

    Everything is on disk before the rename, so a power cut leaves all of it or nothing. On any failure nothing new
    stands under the final name; ``build.scratch`` (checkpoints) stays for the next attempt, until one succeeds.
    One process builds an artifact at a time: another waits, and raises AlreadyMade where there is nothing left to do.
    Raises BadInput where a parent has no manifest, FailedCheck where a parent is damaged.
    """
    out = (out or results / node.ref).resolve()
    _check_parents(node, results)
    scratch = results / SCRATCH / node.ref
    work, aside = scratch / "out", scratch / "replaced"
    before = _stamp(out)
    waited: list[Any] = []
    with locked(scratch / BUILDING, on_wait=partial(_tell_wait, node, waited)):
        if waited and _stamp(out) not in (None, before):
            _let_go(scratch)
            raise AlreadyMade(f"{out}: {waited[0]} has made it meanwhile")
        for leftover in (work, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        started, cpu_started = time.monotonic(), time.process_time()
        build = Build(node=node, results=results, out=out, work=work, scratch=scratch)
        try:
            yield build
            write_json(work / MANIFEST, _manifest(build, started, cpu_started))
            flush_tree(work)
            swap_in(work, out, aside)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            _let_go(scratch)
            raise
        for path in scratch.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != BUILDING:
                path.unlink()
        _let_go(scratch)


def _check_parents(node: Node, results: Path) -> None:
    for ref in sorted(set(node.parents.values())):
        target = results / ref / MANIFEST
        if not target.is_file():
            raise BadInput(f"{target}: not there, and {node.ref} is made from it; make it first: snakemake {target}")
        for name, recorded in read_manifest(target)["outputs"].items():
            path = results / ref / name
            size = path.stat().st_size if path.is_file() else 0
            if size != recorded.get("bytes", size):
                raise FailedCheck(
                    f"{path}: {size} bytes, and its manifest says {recorded['bytes']}; `python -m prefopt verify "
                    "--remake` removes what is damaged and what was made from it, then run again"
                )


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


def _let_go(scratch: Path) -> None:
    """Remove the lock that this process holds, and the folder where nothing else is in it.

    The lock goes last: as long as it is there, no other process takes the folder for its own.
    """
    if {path.name for path in scratch.iterdir()} <= {BUILDING}:
        (scratch / BUILDING).unlink(missing_ok=True)
        with suppress(OSError):  # another process has begun there since
            scratch.rmdir()


def _is_manifest(path: Path) -> bool:
    """Whether the file can be read; where not, that is a finding of the artifact that it belongs to."""
    try:
        read_manifest(path, "outputs")
    except BadInput:
        return False
    return True


def verify_artifact(results: Path, node: Node) -> list[str]:
    """What is wrong with a finished artifact: one line per finding, none where it is sound.

    Re-hashes every output and the manifests of the parents it was made from, and looks for files that the manifest
    does not know.
    """
    folder = results / node.ref
    if not (folder / MANIFEST).is_file():
        return [f"{folder}: not made yet (no {MANIFEST})"]
    found = []
    try:
        manifest = read_manifest(folder / MANIFEST, *_MANIFEST_KEYS)
    except BadInput as error:
        return [str(error)]
    try:
        Node.from_json(manifest)
    except BadInput as error:
        found.append(f"{folder / MANIFEST}: {error}")
    for name, recorded in manifest["outputs"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing, though the manifest lists it")
        elif file_sha256(path) != recorded.get("sha256"):
            found.append(f"{path}: content is not what the manifest recorded")
    known = set(manifest["outputs"])
    found += [f"{p}: not in the manifest" for p in tree_files(folder) if str(p.relative_to(folder)) not in known]
    for ref, digest in manifest["inputs"].items():
        path = results / ref / MANIFEST
        if not path.is_file():
            found.append(f"{path}: missing, though {node.ref} was made from it")
        elif _is_manifest(path) and outputs_digest(path.parent) != digest:
            found.append(f"{path.parent}: was made again, with another result, after {node.ref} had read it")
    return found
