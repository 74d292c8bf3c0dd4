"""A full or closed disk, too little memory, a power cut: one line with the way out, nothing half made, same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from killing import VERBS, Everything, Hurt, drawn
from safetensors.numpy import load_file

import forked_commands
from marks import LONG
from prefopt import storage
from prefopt.artifacts import MANIFEST, Node
from prefopt.errors import TryAgain
from prefopt.files import read_json, read_lines
from prefopt.planning.costs import WORK
from prefopt.store.builds import building

PAGE = 4096  # what a tmpfs gives a file at least
# One for each way in which files are written: Arrow, safetensors and checkpoints, Rust tokenizers, texts.
SOME = ("pairs", "policy", "base", "metrics")


@pytest.fixture(scope="module")
def on_tmpfs(everything, tmp_path_factory) -> Iterator[Everything]:
    """The project with its results on a file system of their own; skipped where none may be mounted."""
    folder = tmp_path_factory.mktemp("tmpfs") / "project"
    results = folder / "results"
    shutil.copytree(everything.folder, folder, ignore=shutil.ignore_patterns("results"))
    results.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(results)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        shutil.copytree(everything.results, results, dirs_exist_ok=True)
        yield replace(everything, folder=folder)
    finally:
        subprocess.run(["umount", str(results)], check=True)


def told(everything: Everything, node: Node) -> str:
    """The one line of a job that failed."""
    lines = everything.log(node).read_text().splitlines()
    said = [line for line in lines if line.startswith(f"prefopt {VERBS[node.stage.split('/')[0]]}: ")]
    assert len(said) == 1, lines
    assert not any("Traceback" in line for line in lines), lines
    assert lines[-1] == said[0]
    return said[0]


def pages(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def leave_free(results: Path, free: int) -> Path:
    """Fill the disk up to so many pages."""
    ballast = results / "ballast"
    left = os.statvfs(results)
    ballast.write_bytes(b"\0" * (left.f_bavail * left.f_frsize - free * PAGE))
    return ballast


@pytest.mark.parametrize("stage", WORK if LONG else SOME)
def test_a_full_disk_is_told_and_leaves_nothing_half_made(on_tmpfs, stage):
    """Room for a drawn share of what the artifact takes, its manifest and folders not counted."""
    node, before = on_tmpfs.first(stage), on_tmpfs.files()
    artifact = on_tmpfs.results / node.ref
    room = int(drawn(stage, 0).uniform(0, 1) * pages(artifact))
    shutil.rmtree(artifact)
    ballast = leave_free(on_tmpfs.results, room)
    try:
        code = on_tmpfs.run(node)
        line = told(on_tmpfs, node)
        assert code == 75, line
        assert "No space left on device; free some space" in line
        assert not artifact.exists()
        on_tmpfs.check_between(node)
    finally:
        ballast.unlink()
    assert on_tmpfs.run(node) == 0, on_tmpfs.log(node).read_text()
    on_tmpfs.check_after(node, before)


@pytest.mark.parametrize("stage", ["policy", "tokens"])
def test_a_limit_on_the_size_of_files_is_a_full_disk(everything, stage):
    """Half of the artifact's largest file may be written; this needs no mount."""
    node, before = everything.first(stage), everything.files()
    artifact = everything.results / node.ref
    largest = max(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    shutil.rmtree(artifact)
    assert everything.run(node, Hurt(file_bytes=largest // 2)) == 75
    assert "File too large; free some space" in told(everything, node)
    assert not artifact.exists()
    assert everything.run(node) == 0
    everything.check_after(node, before)


@pytest.mark.parametrize("stage", WORK if LONG else SOME[:1])
def test_a_read_only_results_folder_is_told(on_tmpfs, stage):
    node, before = on_tmpfs.first(stage), on_tmpfs.files()
    subprocess.run(["mount", "-o", "remount,ro", str(on_tmpfs.results)], check=True)
    try:
        assert on_tmpfs.run(node) == 2
        line = told(on_tmpfs, node)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(on_tmpfs.results)], check=True)
    assert f"{node.ref}: Read-only file system; give this user access to it, or name another folder" in line
    assert on_tmpfs.files() == before


def test_the_workflow_tells_of_a_read_only_results_folder(on_tmpfs):
    """Planning has a spec to write there."""
    spec = on_tmpfs.results / "specs" / f"{on_tmpfs.first('tokens').ref}.json"
    text = spec.read_text()
    spec.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(on_tmpfs.results)], check=True)
    root = Path(__file__).resolve().parents[2]
    try:
        words = ["snakemake", "-n", "-s", str(root / "Snakefile"), "--cores", "1"]
        run = forked_commands.run(words, on_tmpfs.folder, os.environ)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(on_tmpfs.results)], check=True)
        spec.write_text(text)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("prefopt plan: ")]
    assert "Read-only file system; give this user access" in line


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_step_without_memory_is_tried_again_with_half_the_rows(everything):
    """The sixth step gets no page more than the process has: 75, and the state of the third is kept.

    Half the micro-batch only adds the same numbers in another order.
    """
    node, before = everything.first("policy"), everything.files()
    artifact = everything.results / node.ref
    undisturbed = everything.undisturbed / node.ref
    shutil.rmtree(artifact)
    try:
        assert everything.run(node, Hurt(memory=0, at_step=5), "--micro-batch", "8") == 75
        line = told(everything, node)
        assert "out of memory" in line
        assert "smaller" in line
        kept = everything.results / ".scratch" / node.ref / "checkpoints"
        assert [path.name for path in kept.iterdir()] == ["step-000000003.pt"]
        assert everything.run(node, None, "--micro-batch", "4") == 0, everything.log(node).read_text()
        assert everything.files() == before
        curves = [read_lines(folder / "metrics.jsonl") for folder in (artifact, undisturbed)]
        for ours, theirs in zip(*curves, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        weights = [load_file(folder / "weights" / "model.safetensors") for folder in (artifact, undisturbed)]
        for name, values in weights[0].items():
            np.testing.assert_allclose(values, weights[1][name], atol=1e-5)
    finally:
        everything.restore(node)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=["Python", "torch", "C++"],
)
def test_every_kind_of_missing_memory_is_tried_again(error):
    assert isinstance(storage.told(error, "x.json"), TryAgain)
    wrapped = ValueError("shape")
    wrapped.__cause__ = error
    assert isinstance(storage.told(wrapped, "x.json"), TryAgain)
    assert storage.told(ValueError("shape"), "x.json") is None


# --- power cuts -------------------------------------------------------------------------------------------------------

CUTS = {
    "before the manifest is begun": ("open", f".{MANIFEST}.part"),
    "before the manifest has its name": ("os.rename", f"/out/{MANIFEST}"),
    "before the old artifact goes": ("os.rename", "/replaced"),
    "before the new artifact comes": ("os.rename", ""),  # its own name, put in by the test
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("stage", WORK if LONG else ("tokens",))
def test_a_cut_between_outputs_and_manifest(everything, stage, cut):
    """Over an artifact that is there already: before its folder goes it stays, whole; afterwards nothing is there."""
    node, before = everything.first(stage), everything.files()
    event, end = CUTS[cut]
    hurt = Hurt(signal.SIGKILL, at_path=(event, end or f"/{node.ref}"))
    try:
        assert everything.run(node, hurt) == -signal.SIGKILL, everything.log(node).read_text()
        assert (everything.results / node.ref).exists() == bool(end)
        everything.check_between(node)
        assert everything.run(node) == 0
        everything.check_after(node, before)
    except BaseException:
        everything.restore(node)
        raise


def test_everything_is_on_disk_before_the_name_is_given(tmp_path, monkeypatch):
    """What an unflushed page cache loses is content whose name survived: so content first, then the name, then that."""
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(str(Path(f"/proc/self/fd/{h}").readlink())), fsync(h)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    node = Node("pairs", 1, "some", {"seed": 0})
    with building(node, tmp_path) as build:
        (build.work / "inner").mkdir()
        (build.work / "inner" / "a.txt").write_text("a")
        (build.work / "b.txt").write_text("b")
    work = tmp_path / ".scratch" / node.ref / "out"
    at = done.index("rename")
    flushed = {work, *(work / name for name in ("inner", "inner/a.txt", "b.txt", MANIFEST))}
    assert set(done[:at]) == {str(path) for path in flushed}
    assert done[at + 1 :] == [str(tmp_path / "pairs")]


def test_lost_content_is_noticed_before_it_is_read_and_made_again(everything):
    """Truncated to nothing, as by a disk that lied: the child refuses in one line, `verify --remake` puts it right."""
    parent, child = everything.first("tokens"), everything.first("sft")
    assert parent.ref in child.parents.values()
    table = everything.results / parent.ref / "tokens.parquet"
    table.write_bytes(b"")
    try:
        assert everything.run(child) == 3
        line = told(everything, child)
        assert f"{parent.ref}/tokens.parquet: 0 bytes, and its manifest says" in line
        assert "prefopt verify --remake" in line
        assert everything.run(parent) == 0
        assert everything.manifest(parent) == read_manifest(everything, parent)
        (everything.results / parent.ref / MANIFEST).write_bytes(b"")
        assert everything.run(child) == 2
        assert f"{parent.ref}/{MANIFEST}: not JSON" in told(everything, child)
    finally:
        everything.restore(parent)


def read_manifest(everything: Everything, node: Node) -> dict:
    undisturbed = replace(everything, folder=everything.undisturbed.parent / "project")
    assert read_json(undisturbed.results / node.ref / MANIFEST)["outputs"]
    return undisturbed.manifest(node)


def test_a_spec_that_lost_its_content_is_written_anew(everything, monkeypatch):
    from every_stage import planned

    spec = everything.results / "specs" / f"{everything.first('sft').ref}.json"
    text = spec.read_text()
    spec.write_bytes(b"")
    planned(everything.folder, monkeypatch).write_specs(everything.results)
    assert spec.read_text() == text
