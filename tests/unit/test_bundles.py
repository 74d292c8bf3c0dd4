"""Artifacts as one file each: the same bytes, taken out whole and checked or not at all, and told by name."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from prefopt.artifacts import MANIFEST, Node
from prefopt.cli import main
from prefopt.errors import BadInput, FailedCheck
from prefopt.files import json_text, write_json
from prefopt.store.builds import building
from prefopt.store.bundles import store_of, unpack, unpack_from, write_bundle
from prefopt.store.verification import verify_artifact

PARENT = Node(stage="pairs", version=1, name="p", spec={"seed": 0})
CHILD = Node(stage="tokens", version=1, name="t", spec={}, parents={"pairs": PARENT.ref})


@pytest.fixture
def made(tmp_path) -> Path:
    """A results folder with an artifact and its parent, and the bundles of both in ``store`` beside it."""
    results = tmp_path / "here"
    for node in (PARENT, CHILD):
        with building(node, results) as build:
            (build.work / "folder").mkdir()
            (build.work / "folder" / "a.txt").write_text(f"content of {node.ref}" * 200)
        path = tmp_path / "store" / f"{node.ref}.tar"
        path.parent.mkdir(parents=True)
        write_bundle(results, node.ref, path)
    return results


@pytest.fixture
def store(made) -> Path:
    return made.parent / "store"


def bundle_of(store: Path, node: Node) -> Path:
    return store / f"{node.ref}.tar"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_artifact_with_all_that_it_was_made_from_comes_out_as_it_went_in(made, store, tmp_path):
    unpack([bundle_of(store, CHILD)], tmp_path / "there")
    assert files(tmp_path / "there") == {n: b for n, b in files(made).items() if not n.startswith(".scratch")}
    assert verify_artifact(tmp_path / "there", CHILD) == verify_artifact(tmp_path / "there", PARENT) == []


def test_the_same_artifact_gives_the_same_bundle_whatever_the_clock_says(made, store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy, copy_function=shutil.copyfile)  # other times
    write_bundle(copy, CHILD.ref, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == bundle_of(store, CHILD).read_bytes()


def test_what_is_there_stays_and_what_is_another_result_is_replaced(made, store):
    before = (made / CHILD.ref).stat().st_ino, (made / PARENT.ref).stat().st_ino
    manifest = made / CHILD.ref / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    unpack_from(store, [CHILD.ref], made)
    assert (made / PARENT.ref).stat().st_ino == before[1], "the parent was there and is not written again"
    assert (made / CHILD.ref).stat().st_ino != before[0]
    assert manifest.read_bytes().endswith(b"}\n")
    assert not manifest.read_bytes().endswith(b"}\n\n")


def test_every_flipped_byte_and_every_cut_is_told_by_the_bundles_name_and_leaves_nothing(store, tmp_path):
    path = bundle_of(store, CHILD)
    sound = path.read_bytes()
    with tarfile.open(path) as tar:
        places = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
    manifest, content = places[MANIFEST], places["folder/a.txt"]
    flips = [manifest[0], manifest[0] + manifest[1] // 2, content[0], content[0] + content[1] - 1]
    damaged = [sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :] for place in flips]
    damaged += [sound[:length] for length in (0, 100, manifest[0] + 10, content[0] + 10, content[0] + content[1] - 1)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(FailedCheck, match=rf"{CHILD.ref}\.tar: damaged.*remove it from the storage"):
            unpack_from(store, [CHILD.ref], tmp_path / "there")
        assert not any(path.is_file() for path in (tmp_path / "there").rglob("*"))
    path.write_bytes(sound)
    unpack_from(store, [CHILD.ref], tmp_path / "there")


def forged(path: Path, *extra: tuple[str, bytes]) -> None:
    """The bundle with files that its manifest does not know."""
    with tarfile.open(path, "a") as tar:
        for name, data in extra:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_files_that_no_manifest_names_are_not_taken_in_nor_written_elsewhere(store, tmp_path):
    path = bundle_of(store, PARENT)
    sound = path.read_bytes()
    for name in ("more.txt", "../../../../escaped.txt", "/escaped.txt"):
        path.write_bytes(sound)
        forged(path, (name, b"x"))
        with pytest.raises(FailedCheck, match="damaged"):
            unpack_from(store, [PARENT.ref], tmp_path / "there")
        assert not (tmp_path / "there" / PARENT.ref).exists()
        assert not list(tmp_path.rglob("escaped.txt"))
        assert not Path("/escaped.txt").exists()


def test_a_bundle_of_another_artifact_under_the_name_is_refused(store, tmp_path):
    shutil.copyfile(bundle_of(store, CHILD), bundle_of(store, PARENT))
    with pytest.raises(FailedCheck, match=f"it is the bundle of {CHILD.ref}"):
        unpack_from(store, [PARENT.ref], tmp_path / "there")


def test_a_missing_bundle_and_one_that_is_called_otherwise_are_bad_input(store, tmp_path):
    bundle_of(store, PARENT).unlink()
    with pytest.raises(BadInput, match=f"{PARENT.ref}.tar: no such bundle"):
        unpack_from(store, [CHILD.ref], tmp_path / "there")
    with pytest.raises(BadInput, match=f"has to be called .../{CHILD.ref}.tar"):
        store_of(tmp_path / "store" / "other.tar", CHILD.ref)
    assert store_of(bundle_of(store, CHILD), CHILD.ref) == store


def test_a_bundle_that_cannot_be_finished_leaves_the_one_that_was_there(made, store):
    before = bundle_of(store, CHILD).read_bytes()
    (made / CHILD.ref / "folder" / "a.txt").unlink()
    with pytest.raises(FileNotFoundError):
        write_bundle(made, CHILD.ref, bundle_of(store, CHILD))
    assert files(store / "tokens") == {bundle_of(store, CHILD).name: before}


# A stage's command as a job runs it: it makes the child out of its parent, as any stage does.
STAGE = """
import sys
from pathlib import Path
from prefopt.artifacts import node_of
from prefopt.store.builds import building
print("runs", file=sys.stderr)
with building(node_of(Path(sys.argv[1])), Path(sys.argv[2])) as build:
    (build.work / "b.txt").write_text((build.parent("pairs") / "folder" / "a.txt").read_text())
"""


def job(folder: Path, store: Path, *command: str) -> list[str]:
    spec = folder / "specs" / f"{CHILD.ref}.json"
    write_json(spec, CHILD.to_json())
    words = command or (sys.executable, "-c", STAGE, str(spec), str(folder))
    return ["stored", "--spec", str(spec), "--bundle", str(bundle_of(store, CHILD)), "--", *words]


def test_a_job_takes_its_parents_out_of_the_store_and_leaves_a_bundle(store, tmp_path, capfd):
    bundle_of(store, CHILD).unlink()
    assert main(job(tmp_path / "there", store)) == 0
    assert capfd.readouterr().err.count("runs") == 1
    unpack([bundle_of(store, CHILD)], tmp_path / "third")
    text = f"content of {PARENT.ref}" * 200
    assert (tmp_path / "third" / CHILD.ref / "b.txt").read_text() == text


def test_an_artifact_whose_upload_was_cut_off_is_stored_and_not_made_again(store, tmp_path, capfd):
    main(job(tmp_path / "there", store))
    sound = bundle_of(store, CHILD).read_bytes()
    bundle_of(store, CHILD).unlink()
    capfd.readouterr()
    assert main(job(tmp_path / "there", store)) == 0
    assert "runs" not in capfd.readouterr().err
    assert bundle_of(store, CHILD).read_bytes() == sound
    (tmp_path / "there" / CHILD.ref / "b.txt").write_text("damaged")
    assert main(job(tmp_path / "there", store)) == 0
    assert "runs" in capfd.readouterr().err, "what is damaged is made again"


@pytest.mark.parametrize(("command", "code"), [(("sh", "-c", "exit 75"), 75), (("sh", "-c", "kill -9 $$"), 137)])
def test_a_stage_that_fails_leaves_no_bundle_and_its_exit_code(store, tmp_path, command, code):
    bundle_of(store, CHILD).unlink()
    with pytest.raises(SystemExit) as ended:
        main(job(tmp_path / "there", store, *command))
    assert ended.value.code == code
    assert files(store / "tokens") == {}


def test_a_job_that_is_asked_to_end_hands_that_on(store, tmp_path):
    bundle_of(store, CHILD).unlink()
    waits = "trap 'exit 75' TERM; touch started; while :; do sleep 0.05; done"
    words = [sys.executable, "-m", "prefopt", *job(tmp_path / "there", store, "sh", "-c", waits)]
    process = subprocess.Popen(words, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    assert files(store / "tokens") == {}


def test_a_manifest_that_names_itself_a_parent_ends(store, tmp_path):
    """A forged store cannot keep a job busy: every bundle is opened once."""
    loop = Node(stage="pairs", version=1, name="loop", spec={}, parents={"x": CHILD.ref})
    write_json(tmp_path / "here" / loop.ref / MANIFEST, {**loop.to_json(), "outputs": {}, "inputs": {}, "summary": {}})
    write_bundle(tmp_path / "here", loop.ref, bundle_of(store, loop))
    unpack_from(store, [loop.ref, loop.ref, CHILD.ref], tmp_path / "there")
    assert (tmp_path / "there" / loop.ref / MANIFEST).read_text() == json_text(
        {**loop.to_json(), "outputs": {}, "inputs": {}, "summary": {}}
    )
