"""What lies in a results folder: artifacts, who was made from whom, the damaged ones, and what nothing asks for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, Node, read_manifest
from prefopt.contexts import is_locked
from prefopt.errors import BadInput
from prefopt.files import read_json
from prefopt.store.builds import BUILDING, SCRATCH
from prefopt.store.verification import verify_artifact

_BESIDE = {"specs": ".json", "logs": ".log", "benchmarks": ".tsv"}


def artifacts(results: Path) -> dict[str, dict[str, Any]]:
    """Manifests of every artifact that is here: stage/id -> content; empty where one cannot be read."""
    found = {}
    for pattern in (f"*/*/{MANIFEST}", f"papers/*/*/{MANIFEST}"):
        for path in sorted(results.glob(pattern)):
            ref = path.parent.relative_to(results).as_posix()
            if not ref.startswith("."):
                found[ref] = _readable(path)
    return found


def _readable(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except BadInput:
        return {}


def made_from(manifests: Mapping[str, Mapping[str, Any]], refs: Iterable[str]) -> list[str]:
    """``refs`` and everything that was made from them, directly or not."""
    children: dict[str, list[str]] = {}
    for ref, manifest in manifests.items():
        for parent in set(manifest.get("parents", {}).values()):
            children.setdefault(parent, []).append(ref)
    return _closure(refs, children)


def below(manifests: Mapping[str, Mapping[str, Any]], refs: Iterable[str]) -> list[str]:
    """``refs`` and everything that they were made from."""
    return _closure(refs, {ref: list(m.get("parents", {}).values()) for ref, m in manifests.items()})


def _closure(refs: Iterable[str], edges: Mapping[str, Sequence[str]]) -> list[str]:
    found: dict[str, None] = {}
    stack = list(refs)
    while stack:
        ref = stack.pop()
        if ref not in found:
            found[ref] = None
            stack += edges.get(ref, ())
    return list(found)


def damaged(results: Path, nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Findings of ``verify_artifact`` by artifact, those without one left out."""
    return {node.ref: lines for node in nodes if (lines := verify_artifact(results, node))}


def remove_for_remake(results: Path, refs: Iterable[str]) -> list[str]:
    """Remove artifacts and all that was made from them, so that the next run makes them; returns what was removed."""
    manifests = artifacts(results)
    gone = [ref for ref in made_from(manifests, refs) if (results / ref).is_dir()]
    for ref in gone:
        shutil.rmtree(results / ref)
    return sorted(gone)


@dataclass(frozen=True)
class Unreached:
    """What no declaration asks for: artifact folders, and files and scratch folders of no artifact that stays."""

    artifacts: dict[str, int]  # stage/id -> bytes
    leftovers: dict[str, int]  # path below the results folder -> bytes
    running: list[str]  # stage/id that living processes build

    @property
    def size(self) -> int:
        """Bytes of everything."""
        return sum(self.artifacts.values()) + sum(self.leftovers.values())


def unreached(results: Path, wanted: Iterable[str], kept_items: Sequence[str] = ()) -> Unreached:
    """What is neither among ``wanted`` (stage/id) nor below a finished item of ``kept_items`` (paper/name) nor in use.

    What living processes build is in use, with everything below it.
    """
    manifests = artifacts(results)
    folders = {p.relative_to(results).as_posix() for p in [*results.glob("*/*-????????"), *results.glob("papers/*/*")]}
    running = building_now(results)
    keep = {*wanted, *running}
    for ref in running:
        spec = results / "specs" / f"{ref}.json"
        keep |= set(read_json(spec)["parents"].values()) if spec.is_file() else set()
    keep |= {ref for ref, m in manifests.items() if m.get("stage", "").startswith("papers/") and _named(m, kept_items)}
    keep |= set(below(manifests, keep))
    gone = {ref for ref in manifests if ref not in keep}
    gone |= {f for f in folders - keep - manifests.keys() if (results / "specs" / f"{f}.json").is_file()}
    leftovers = {
        path.relative_to(results).as_posix(): _size(path)
        for path in [*_beside(results, keep), *_idle_scratch(results, running)]
    }
    return Unreached({ref: _size(results / ref) for ref in sorted(gone)}, leftovers, sorted(running))


def _named(manifest: Mapping[str, Any], names: Sequence[str]) -> bool:
    head = manifest["spec"]["item"]
    return f"{head['paper']}/{head['name']}" in names


def building_now(results: Path) -> set[str]:
    """stage/id of the artifacts that living processes build."""
    scratch = results / SCRATCH
    return {p.parent.relative_to(scratch).as_posix() for p in scratch.rglob(BUILDING) if is_locked(p)}


def _idle_scratch(results: Path, running: set[str]) -> list[Path]:
    """Scratch folders that no living process works in: checkpoints of runs that were killed and never resumed."""
    scratch = results / SCRATCH
    found = [*scratch.glob("*/*-????????"), *scratch.glob("papers/*/*")]
    return sorted(path for path in found if path.relative_to(scratch).as_posix() not in running)


def _beside(results: Path, keep: set[str]) -> list[Path]:
    """Spec, log and benchmark files of artifacts that do not stay."""
    return [
        path
        for folder, suffix in _BESIDE.items()
        for path in sorted((results / folder).rglob(f"*-????????{suffix}"))
        if path.relative_to(results / folder).with_suffix("").as_posix() not in keep
    ]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def remove(results: Path, found: Unreached) -> None:
    """Delete what ``unreached`` named, artifacts from the top down: an interruption leaves nothing half made."""
    manifests = artifacts(results)
    order = sorted(found.artifacts, key=lambda ref: len(made_from(manifests, [ref])))
    for name in [*order, *found.leftovers]:
        path = results / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
