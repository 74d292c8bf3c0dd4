"""The Hugging Face hub at pinned commits: of models only the files that are needed, and only whole ones."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.inputs.sources import content_sha256

if TYPE_CHECKING:
    from datasets import Dataset

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # of a repository that may hold a model many times
_CODE = ("*.py",)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


def model_snapshot(repo: str, revision: str, *, code: bool = False) -> Path:
    """The folder of a repository's files at a commit: what the cache has, and what is missing there from the hub.

    ``code``: with its Python files. Every file is checked against the checksum under which the hub lists it. Raises
    BadInput where files cannot be had or are damaged, and where the repository has no safetensors.
    """
    from huggingface_hub import snapshot_download

    called = f"{repo} at {revision[:8]}"
    wanted = [*_FILES, *_CODE] if code else [*_FILES]
    elsewhere = None if code else ["*/*"]  # a folder below the top one holds another form of the same model
    try:
        found = snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=elsewhere)
    except Exception as error:  # the library's failures have no common base: network, licence, cache, names
        raise BadInput(f"{called}: {_reason(error)}") from None
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{called}: no safetensors in it, and pickled weights can run code when they are read; name another "
            "revision, or convert it once and declare the folder with 'kind: local'"
        )
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _check(path, called)
    return folder


def of_commit(rows: Dataset, revision: str) -> Dataset:
    """The rows of a data set, once it is seen that they are those of the pinned commit; else BadInput.

    Without a network the library takes whatever commit its cache has.
    """
    for file in rows.cache_files:
        if revision not in Path(file["filename"]).parts:
            raise BadInput("what was found is of another commit, and the hub cannot be reached")
    return rows


def _check(path: Path, called: str) -> None:
    """The cache names a file by the checksum that the hub told: sha256 of large files, git's sha1 of small ones."""
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name):
        found = content_sha256(blob)
    elif _GIT_SHA1.fullmatch(blob.name):
        content = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return  # a cache without links, which does not say
    if found != blob.name:
        raise BadInput(f"{called}: {path.name} has checksum {found[:12]}, the hub says {blob.name[:12]}; remove {blob}")


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its licence has to be accepted on the hub, and HF_TOKEN set"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private; correct the name, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such commit; pin one that it has"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "not (wholly) in this machine's cache, and the hub cannot be reached; run 'prepare-model' once where there "
            "is a network, without HF_HUB_OFFLINE, or copy the cache (HF_HOME) from there"
        )
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"cannot be loaded ({type(error).__name__}: {first}); run again to go on with what is there"
