"""Artifacts against their manifests and their parents: sizes before they are read, every byte when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, MANIFEST_KEYS, Node, outputs_digest, read_manifest, tree_files
from prefopt.digests import file_sha256
from prefopt.errors import BadInput, FailedCheck


def check_parents(node: Node, results: Path) -> None:
    """Every parent is there, and its files have the sizes that its manifest says: cheap enough for every job.

    Raises BadInput where a parent has no manifest, FailedCheck where a file of it is missing or cut.
    """
    for ref in sorted(set(node.parents.values())):
        target = results / ref / MANIFEST
        if not target.is_file():
            raise BadInput(f"{target}: not there, and {node.ref} is made from it; make it first: snakemake {target}")
        for name, recorded in read_manifest(target)["outputs"].items():
            _check_size(results / ref / name, recorded)


def _check_size(path: Path, recorded: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != recorded.get("bytes", size):
        raise FailedCheck(
            f"{path}: {size} bytes, and its manifest says {recorded['bytes']}; `python -m prefopt verify "
            "--remake` removes what is damaged and what was made from it, then run again"
        )


def verify_artifact(results: Path, node: Node) -> list[str]:
    """What is wrong with a finished artifact: one line per finding, none where it is sound.

    Re-hashes every output and the manifests of the parents it was made from, and looks for files that the manifest
    does not know.
    """
    folder = results / node.ref
    if not (folder / MANIFEST).is_file():
        return [f"{folder}: not made yet (no {MANIFEST})"]
    try:
        manifest = read_manifest(folder / MANIFEST, *MANIFEST_KEYS)
    except BadInput as error:
        return [str(error)]
    return [
        *_wrong_identity(folder, manifest),
        *(f"{folder / name}: {what}" for name, what in wrong_outputs(folder, manifest["outputs"])),
        *_wrong_inputs(results, node, manifest["inputs"]),
    ]


def _wrong_identity(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        Node.from_json(manifest)
    except BadInput as error:
        yield f"{folder / MANIFEST}: {error}"


def wrong_outputs(folder: Path, outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Files below a folder that are not the ``outputs`` of a manifest, each with what is wrong; every byte is read."""
    for name, recorded in outputs.items():
        path = folder / name
        if not path.is_file():
            yield name, "missing, though the manifest lists it"
        elif file_sha256(path) != recorded.get("sha256"):
            yield name, "content is not what the manifest recorded"
    for found in (str(path.relative_to(folder)) for path in tree_files(folder)):
        if found not in outputs:
            yield found, "not in the manifest"


def _wrong_inputs(results: Path, node: Node, inputs: Mapping[str, str]) -> Iterator[str]:
    for ref, recorded in inputs.items():
        path = results / ref / MANIFEST
        if not path.is_file():
            yield f"{path}: missing, though {node.ref} was made from it"
        elif _is_manifest(path) and outputs_digest(path.parent) != recorded:
            yield f"{path.parent}: was made again, with another result, after {node.ref} had read it"


def _is_manifest(path: Path) -> bool:
    """Whether the file can be read; where not, that is a finding of the artifact that it belongs to."""
    try:
        read_manifest(path, "outputs")
    except BadInput:
        return False
    return True
