"""Identity, atomic appearance, manifests, verification."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pytest

from prefopt.artifacts import MANIFEST, Node
from prefopt.errors import BadInput
from prefopt.files import read_json, write_json
from prefopt.store.builds import building
from prefopt.store.verification import verify_artifact
from prefopt.tables import join_one_to_one


def node(**changes):
    return Node(**{"stage": "pairs", "version": 1, "name": "demo", "spec": {"seed": 0}, **changes})


def make(results, made, text="content"):
    with building(made, results) as build:
        (build.work / "a.txt").write_text(text)
    return results / made.ref


def test_id_is_the_sha256_of_stage_version_spec_and_parent_digests():
    text = '{"parents":{"pairs":"0123abcd"},"spec":{"seed":0},"stage":"tokens","version":1}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:8]
    assert node(stage="tokens", parents={"pairs": "pairs/any-name-0123abcd"}).id == f"demo-{expected}"


def test_id_covers_what_changes_the_result_and_nothing_else():
    base = node().id.rsplit("-", 1)[1]
    assert node(name="other").id.rsplit("-", 1)[1] == base
    assert node(execution={"paths": ["x"]}).id == node().id
    changed = [
        node(spec={"seed": 1}),
        node(version=2),
        node(stage="tokens"),
        node(parents={"pairs": "pairs/demo-00000000"}),
    ]
    assert len({n.id for n in changed} | {node().id}) == 5


def test_spec_file_edited_by_hand_is_refused():
    content = node().to_json()
    assert Node.from_json(content) == node()
    content["spec"] = {"seed": 7}
    with pytest.raises(BadInput, match="edited by hand"):
        Node.from_json(content)


def test_an_artifact_appears_whole_with_its_manifest(tmp_path):
    folder = make(tmp_path, node())
    manifest = read_json(folder / MANIFEST)
    assert manifest["outputs"]["a.txt"] == {"sha256": hashlib.sha256(b"content").hexdigest(), "bytes": 7}
    assert manifest["id"] == node().id
    assert manifest["packages"]["torch"].startswith("2.13.0")
    assert not (tmp_path / ".scratch" / node().ref).exists()


def test_nothing_is_left_under_the_final_name_after_a_failure(tmp_path):
    def stopped_half_way():
        with building(node(), tmp_path) as build:
            (build.work / "a.txt").write_text("half")
            (build.scratch / "checkpoint").write_text("kept")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped_half_way()
    assert not (tmp_path / node().ref).exists()
    assert (tmp_path / ".scratch" / node().ref / "checkpoint").read_text() == "kept"


def test_rebuilding_replaces_the_folder_as_a_whole(tmp_path):
    folder = make(tmp_path, node())
    (folder / "stale.txt").write_text("old")
    make(tmp_path, node(), "new")
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", MANIFEST]


def test_a_missing_parent_is_named_with_the_command_that_makes_it(tmp_path):
    child = node(stage="tokens", parents={"pairs": node().ref})
    with (
        pytest.raises(BadInput, match=rf"make it first: snakemake .*{node().ref}/manifest.json"),
        building(child, tmp_path),
    ):
        pass


def test_verify_finds_every_kind_of_damage(tmp_path):
    child = node(stage="tokens", parents={"pairs": node().ref})
    assert "not made yet" in verify_artifact(tmp_path, node())[0]
    parent_folder, child_folder = make(tmp_path, node()), make(tmp_path, child)
    assert verify_artifact(tmp_path, node()) == verify_artifact(tmp_path, child) == []

    (child_folder / "a.txt").write_text("tampered")
    (child_folder / "b.txt").write_text("stranger")
    first, second = verify_artifact(tmp_path, child)
    assert "a.txt: content is not what the manifest recorded" in first
    assert "b.txt: not in the manifest" in second

    make(tmp_path, child)
    make(tmp_path, node())  # made again with the same bytes: still the parent it was
    assert verify_artifact(tmp_path, child) == []
    make(tmp_path, node(), "another result")
    assert "made again, with another result" in verify_artifact(tmp_path, child)[0]

    content = json.loads((parent_folder / MANIFEST).read_text())
    content["spec"] = {"seed": 5}
    (parent_folder / MANIFEST).write_text(json.dumps(content))
    assert any("edited by hand" in line for line in verify_artifact(tmp_path, node()))


def test_tables_join_on_pair_id_one_to_one():
    left = pd.DataFrame({"pair_id": [3, 1, 2]})
    right = pd.DataFrame({"pair_id": [1, 2, 3], "x": [10.0, 20.0, 30.0]})
    assert join_one_to_one(left, right, "t")["x"].tolist() == [30.0, 10.0, 20.0]
    with pytest.raises(BadInput, match="no row for pair_id 3"):
        join_one_to_one(left, right[right["pair_id"] < 3], "t")
    with pytest.raises(BadInput, match="pair_id 2 stands in more than one row"):
        join_one_to_one(left, pd.concat([right, right[right["pair_id"] == 2]]), "t")


def test_json_refuses_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
