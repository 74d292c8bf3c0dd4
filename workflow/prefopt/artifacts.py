"""Artifacts as they are named and described: nodes and their ids, spec files, manifests.

An artifact is a folder ``results/<stage>/<name>-<8 hex>/`` with its manifest in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt.digests import digest, short_digest
from prefopt.errors import BadInput
from prefopt.files import read_json

MANIFEST = "manifest.json"
_NOT_CONTENT = frozenset({MANIFEST, ".snakemake_timestamp"})  # the second is what Snakemake leaves in folders
_NODE_KEYS = {"stage": str, "version": int, "name": str, "spec": Mapping, "parents": Mapping, "execution": Mapping}
MANIFEST_KEYS = {"stage": str, "spec": dict, "parents": dict, "summary": dict, "inputs": dict, "outputs": dict}
_REF = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # relative, and never above the results folder


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


def results_of(spec_file: Path) -> Path:
    """``results`` of a spec file ``results/specs/<stage>/<id>.json``; BadInput where it lies elsewhere."""
    for folder in spec_file.resolve().parents:
        if folder.name == "specs":
            return folder.parent
    raise BadInput(f"{spec_file}: spec files lie in <results>/specs/<stage>/, so that parents can be found beside them")


def read_manifest(path: Path, *needed: str) -> dict[str, Any]:
    """Read a manifest; BadInput names the file where it is missing or broken, or where a part is not what it should be.

    Parts that are not ``needed`` may be missing.
    """
    return checked_manifest(read_json(path), path, *needed)


def checked_manifest(content: Any, path: Path, *needed: str) -> dict[str, Any]:
    """The same for a manifest that was read already, from the file that ``path`` names."""
    if not isinstance(content, dict):
        raise BadInput(f"{path}: no manifest but {type(content).__name__}; remove the folder and run again")
    for key, kind in MANIFEST_KEYS.items():
        if (key in content or key in needed) and not isinstance(content.get(key), kind):
            raise BadInput(f"{path}: no manifest, '{key}' is {content.get(key)!r:.40}; remove the folder and run again")
    for key, kind in {"parents": str, "inputs": str, "outputs": dict}.items():
        if wrong := [name for name, value in content.get(key, {}).items() if not isinstance(value, kind)]:
            raise BadInput(f"{path}: no manifest, '{key}.{wrong[0]:.40}' is damaged; remove the folder and run again")
    return content


def tree_files(folder: Path) -> list[Path]:
    """Every file of an artifact's content below ``folder``, in sorted order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _NOT_CONTENT)


def outputs_digest(folder: Path) -> str:
    """sha256 over the outputs an artifact's manifest records: equal for a re-made artifact with the same bytes."""
    return digest(read_manifest(folder / MANIFEST, "outputs")["outputs"])
