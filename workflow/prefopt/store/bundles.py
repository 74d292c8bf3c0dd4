"""An artifact as one file, ``<stage>/<id>.tar``: what a storage without folders and renames can keep.

A storage puts one object under its name whole or not at all, and says nothing of the kind about several. So an artifact
travels as one: its manifest first, with the manifest's sha256 as a comment (pax), then the outputs that it names.
Nothing of time, owner or place is in it: the same artifact gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, Node, checked_manifest, read_manifest
from prefopt.contexts import locked
from prefopt.digests import file_sha256
from prefopt.errors import BadInput, FailedCheck
from prefopt.json_text import parsed_json
from prefopt.storage import flush_tree, swap_in
from prefopt.store.builds import BUILDING, SCRATCH, let_go
from prefopt.store.verification import wrong_outputs

SUFFIX = ".tar"


def store_of(bundle: Path, ref: str) -> Path:
    """The folder that the bundle of ``stage/id`` lies in as ``stage/id.tar``; BadInput where it is called otherwise."""
    name = f"/{ref}{SUFFIX}"
    if not bundle.absolute().as_posix().endswith(name):
        raise BadInput(f"{bundle}: the bundle of {ref} has to be called ...{name}")
    return bundle.absolute().parents[ref.count("/")]


def write_bundle(results: Path, ref: str, path: Path) -> None:
    """Write a finished artifact as one file, which appears whole or not at all."""
    folder = results / ref
    names = [MANIFEST, *sorted(read_manifest(folder / MANIFEST, "outputs")["outputs"])]
    part = path.with_name(f".{path.name}.part")
    with locked(part) as handle:
        try:
            os.ftruncate(handle, 0)
            with os.fdopen(handle, "wb", closefd=False) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
                for name in names:
                    _add(tar, folder / name, name, {"comment": file_sha256(folder / name)} if name == MANIFEST else {})
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _add(tar: tarfile.TarFile, path: Path, name: str, headers: dict[str, str]) -> None:
    member = tarfile.TarInfo(name)
    member.pax_headers = headers
    with path.open("rb") as stream:
        member.size = os.fstat(stream.fileno()).st_size
        tar.addfile(member, stream)


def unpack(bundles: Iterable[Path], results: Path) -> None:
    """Put finished artifacts, and everything that they were made from, from the bundles of one store into ``results``.

    What lies there already with the bundle's manifest stays. Raises BadInput where a bundle is missing, and FailedCheck
    where one is damaged; nothing of it then stands under the artifact's name.
    """
    for path in bundles:
        ref = Node.from_json(_manifest(path)[1]).ref
        unpack_from(store_of(path, ref), [ref], results)


def unpack_from(store: Path, refs: Iterable[str], results: Path) -> None:
    """As ``unpack``, for artifacts by ``stage/id``."""
    waiting, seen = list(refs), set()
    while waiting:
        ref = waiting.pop()
        if ref not in seen:
            seen.add(ref)
            waiting += _unpack_one(store / f"{ref}{SUFFIX}", results, ref)


def _unpack_one(path: Path, results: Path, ref: str) -> list[str]:
    """Put one artifact into ``results``, where it is not there; what it was made from."""
    text, manifest = _manifest(path)
    node = Node.from_json(manifest)
    if node.ref != ref:
        raise _damaged(path, f"it is the bundle of {node.ref}")
    if not _says(results / ref / MANIFEST, text):
        _place(path, results / ref, results / SCRATCH / ref, manifest, text)
    return list(node.parents.values())


def _place(path: Path, folder: Path, scratch: Path, manifest: Mapping[str, Any], text: bytes) -> None:
    work, aside = scratch / "unpacked", scratch / "replaced"
    with locked(scratch / BUILDING):
        try:
            for leftover in (work, aside):
                shutil.rmtree(leftover, ignore_errors=True)
            if not _says(folder / MANIFEST, text):  # another process may have been faster
                _extract(path, work, manifest)
                swap_in(work, folder, aside)
        finally:
            for leftover in (work, aside):
                shutil.rmtree(leftover, ignore_errors=True)
            let_go(scratch)


def _damaged(path: Path, what: object) -> FailedCheck:
    return FailedCheck(f"{path}: damaged, {what}; remove it from the storage, and the next run makes it again")


def _manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The manifest that a bundle begins with, as text and checked: that of a node."""
    try:
        with tarfile.open(path, "r:") as tar:
            first = tar.next()
            stream = tar.extractfile(first) if first is not None and first.name == MANIFEST else None
            if first is None or stream is None:
                raise _damaged(path, f"it does not begin with {MANIFEST}")
            text = stream.read()
            if first.pax_headers.get("comment") != hashlib.sha256(text).hexdigest():
                raise _damaged(path, f"{MANIFEST}: content is not what was stored")
        manifest = checked_manifest(parsed_json(text, finite=True), path, "parents", "outputs")
        Node.from_json(manifest)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such bundle; make it first, in a run with the same storage") from None
    except (tarfile.TarError, EOFError, ValueError, BadInput) as error:
        raise _damaged(path, f"its manifest cannot be read ({error})") from None
    return text, manifest


def _says(path: Path, text: bytes) -> bool:
    return path.is_file() and path.read_bytes() == text


def _extract(path: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Unpack and check every byte; on disk when this returns."""
    try:
        with tarfile.open(path, "r:") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, error) from None
    found = list(wrong_outputs(folder, manifest["outputs"]))
    if found:
        name, what = found[0]
        raise _damaged(path, f"{name}: {what} ({len(found)} findings)")
    flush_tree(folder)
