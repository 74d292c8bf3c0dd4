"""What git and DVC know of an artifact: commits, and the hashes in ``dvc.lock`` and DVC's cache. Only reads."""

from __future__ import annotations

import configparser
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST
from prefopt.digests import file_md5
from prefopt.errors import BadInput
from prefopt.files import read_json, read_text

LOCK = "dvc.lock"


def git(folder: Path, *words: str) -> str:
    """Output of a git command in ``folder``; BadInput with git's own last line where it fails."""
    try:
        run = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BadInput("git is not installed") from None
    if run.returncode:
        raise BadInput(f"git {' '.join(words[:2])}: {(run.stderr.strip().splitlines() or ['failed'])[-1]}")
    return run.stdout


@cache
def checkout_of(folder: Path) -> Path | None:
    """Root of the git checkout that ``folder`` is in; None where it is in none."""
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel").strip())
    except BadInput:
        return None


def file_at(checkout: Path, revision: str, path: str) -> str | None:
    """Text of a file at a revision (the working tree for ``.``); None where it is not there."""
    if revision == ".":
        return read_text(checkout / path) if (checkout / path).is_file() else None
    try:
        return git(checkout, "show", f"{revision}:{path}")
    except BadInput:
        return None


def lock_outs(text: str) -> dict[str, str]:
    """Output path -> md5 of a ``dvc.lock``."""
    import yaml

    stages = (yaml.safe_load(text) or {}).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ()) if "md5" in out}


@cache
def dvc_outs(checkout: Path) -> dict[str, str]:
    """Output path -> md5 of the checkout's ``dvc.lock``; empty without one."""
    return lock_outs(read_text(checkout / LOCK)) if (checkout / LOCK).is_file() else {}


@cache
def cache_folder(checkout: Path) -> Path:
    """DVC's cache, where its configuration puts it."""
    config = configparser.ConfigParser()
    folder = checkout / ".dvc"
    config.read([folder / "config", folder / "config.local"], encoding="utf-8")
    return folder / config.get("cache", "dir", fallback="cache") / "files" / "md5"


@cache
def listing(checkout: Path, md5: str) -> dict[str, str] | None:
    """Path below a folder that DVC holds -> md5 of the file; None where the cache does not have the listing."""
    path = cache_folder(checkout) / md5[:2] / md5[2:]
    return {entry["relpath"]: entry["md5"] for entry in read_json(path)} if path.is_file() else None


def out_of(checkout: Path, path: Path) -> tuple[str, str] | None:
    """The DVC output that holds ``path``: its path and its md5, as ``dvc.lock`` has it."""
    outs = dvc_outs(checkout)
    inside = path.resolve().relative_to(checkout.resolve()).as_posix() if _is_inside(checkout, path) else ""
    holder = next((out for out in outs if inside == out or inside.startswith(f"{out}/")), None)
    return (holder, outs[holder]) if holder else None


def _is_inside(checkout: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(checkout.resolve())


def dvc_facts(results: Path, ref: str) -> dict[str, Any]:
    """How DVC calls an artifact: its manifest's md5, the folder that holds it, and whether that is what is here."""
    manifest = results / ref / MANIFEST
    facts: dict[str, Any] = {"manifest_md5": file_md5(manifest), "out": None, "out_md5": None, "recorded": False}
    checkout = checkout_of(results.resolve())
    held = out_of(checkout, results / ref) if checkout else None
    if checkout is None or held is None:
        return facts
    out, md5 = held
    entries = listing(checkout, md5)
    inside = manifest.resolve().relative_to((checkout / out).resolve()).as_posix()
    recorded = None if entries is None else entries.get(inside) == facts["manifest_md5"]
    return facts | {"out": out, "out_md5": md5, "recorded": recorded}


@cache
def recording_commits(checkout: Path, md5: str) -> list[str]:
    """Commits in which ``dvc.lock`` took up a hash or gave it up, the first one first."""
    try:
        return git(checkout, "log", "--reverse", "--format=%H", f"-S{md5}", "--", LOCK).split()
    except BadInput:
        return []


def refs_with_md5(results: Path, refs: Sequence[str], wanted: str) -> Iterator[tuple[str, str]]:
    """``stage/id`` and file of what DVC calls ``wanted`` (or what begins so): listings first, else the files here."""
    checkout = checkout_of(results.resolve())
    for ref in refs:
        held = out_of(checkout, results / ref) if checkout else None
        entries = listing(checkout, held[1]) if held else None
        for name, md5 in _files(results, ref, held, entries).items():
            if md5.startswith(wanted):
                yield ref, name


def _files(results: Path, ref: str, held: tuple[str, str] | None, entries: Mapping[str, str] | None) -> dict[str, str]:
    checkout = checkout_of(results.resolve())
    if checkout is None or held is None or entries is None:
        folder = results / ref
        return {path.relative_to(folder).as_posix(): file_md5(path) for path in folder.rglob("*") if path.is_file()}
    prefix = (results / ref).resolve().relative_to((checkout / held[0]).resolve()).as_posix()
    return {name[len(prefix) + 1 :]: md5 for name, md5 in entries.items() if name.startswith(f"{prefix}/")}
