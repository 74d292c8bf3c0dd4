"""Addresses of numbers, what two versions differ in, what is damaged, and what nothing asks for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fake_grids
import finished_results
from prefopt.artifacts import Node
from prefopt.errors import BadInput
from prefopt.files import read_json, write_json
from prefopt.reporting import versions
from prefopt.reporting.addresses import claimed, find_numbers, item_numbers
from prefopt.reporting.paper_metrics import metrics_of, write_paper_metrics
from prefopt.reporting.trace import Tracer, as_text
from prefopt.store import inventory
from prefopt.store.builds import BUILDING, SCRATCH, building


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Two finished items with arms and an exact one; tests must not change it."""
    folder = tmp_path_factory.mktemp("versions") / "results"
    finished_results.finished(folder)
    finished_results.exact_item(folder)
    return folder


def content(results: Path, name: str) -> dict:
    (path,) = results.glob(f"papers/*/{name}-*/item.json")
    return read_json(path)


def test_every_number_has_an_address_and_its_sources(results):
    item = content(results, "win-rates")
    numbers = item_numbers(item)
    arm = item["arms"]["mallows-theta"]
    number = numbers["mallows-theta/win_rate"]
    assert number.value == arm["summary"]["win_rate"]
    assert set(number.sources) == {run[key] for run in arm["seeds"].values() for key in ("policy", "metrics")}
    assert numbers["claim1"].value == item["expect"][0]["difference"]
    assert set(number.sources) < set(numbers["claim1"].sources)
    assert "claim3" not in numbers, "the claim's arm has not run"


def test_a_grids_numbers_are_those_of_selected_points():
    item = fake_grids.item("by_condition")
    found = {address for address in item_numbers(item) if "/" in address}
    selected = [point for point in item["points"] if point["selected"]]
    assert {tuple(address.split("/")[:2]) for address in found} == {(p["arm"], p["condition"]) for p in selected}
    point = selected[0]
    name, metrics = next(iter(point["sets"].items()))
    metric = next(key for key, value in metrics.items() if value is not None)
    number = item_numbers(item)[f"{point['arm']}/{point['condition']}/{name}/{metric}"]
    assert number.value == metrics[metric]
    assert number.sources == tuple(point["runs"].values())


def test_parts_of_an_address_may_be_left_out(results):
    item = content(results, "win-rates")
    assert [n.address for n in find_numbers(item, "win_rate")] == [
        f"{arm}/win_rate" for arm in item["arms"] if "win_rate" in item["arms"][arm]["summary"]
    ]
    assert len(find_numbers(item, "")) == len(item_numbers(item))
    with pytest.raises(BadInput, match="'win_rat': did you mean 'win_rate'"):
        find_numbers(item, "dpo/win_rat")


def test_metrics_for_dvc_are_the_claimed_numbers_and_the_claims(results, tmp_path):
    item = content(results, "win-rates")
    found = metrics_of(item)
    assert sum(found["claims"].values()) == len(item["expect"])
    mean = item["arms"]["mallows-theta"]["summary"]["win_rate"]["mean"]
    assert found["numbers"]["mallows-theta"]["win_rate"] == pytest.approx(mean, rel=1e-5)
    assert "avg_tokens" not in found["numbers"]["mallows-theta"], "no claim is about lengths"
    assert set(claimed(item)) < set(item_numbers(item))
    for name in ("mallowspo/win-rates", "own/exact"):
        write_json(tmp_path / name / "item.json", content(results, name.split("/")[1]))
    written = write_paper_metrics(tmp_path, ["mallowspo/win-rates", "own/exact"])
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "mallowspo/metrics.json",
        "mallowspo/claims.csv",
        "own/metrics.json",
        "own/claims.csv",
    ]
    lines = (tmp_path / "own" / "claims.csv").read_text().splitlines()
    assert lines[0] == "number,mean,low,high,verdict"
    assert lines[3] == "exact 3: margin,1.25,1.1,1.4,reproduced"


def test_compare_names_what_was_declared_anew_and_marks_what_moved(results, tmp_path):
    other = tmp_path / "results"
    gains = {"dpo": 0.0, "mallows-theta": 0.0, "distill": 0.05, "ipo": None}
    claims = [finished_results.claim("mallows-theta", "dpo")]
    finished_results.item(other, "win-rates", gains, claims, (0, 1), title="Another title")
    one, two = versions.in_results(results), versions.in_results(other)
    found = versions.compare_versions(one, two, ["mallowspo/win-rates"])["items"][0]
    assert not found["same"]
    changed = {row["key"]: (row["a"], row["b"]) for row in found["changed"]}
    assert changed["item.title"] == ("Win rates against DPO", "Another title")
    assert not any(key.startswith("policy.") for key in changed)
    rows = {row["address"]: row for row in found["numbers"]}
    low, high = (
        content(side, "win-rates")["arms"]["mallows-theta"]["summary"]["win_rate"] for side in (other, results)
    )
    assert low["high"] < high["low"]
    assert rows["mallows-theta/win_rate"]["apart"] is True
    assert rows["dpo/win_rate"]["apart"] is None, "the baseline's rate holds by definition"
    text = versions.as_text(versions.compare_versions(one, two))
    assert "declared  item.title: Win rates against DPO -> Another title" in text
    assert versions.compare_versions(one, one, ["own/*"])["items"][0]["same"]
    with pytest.raises(BadInput, match="no item nothing/"):
        versions.compare_versions(one, two, ["nothing/*"])


def test_trace_names_an_artifact_outside_git_and_dvc(results):
    tracer = Tracer(results)
    ref = next(iter(content(results, "win-rates")["arms"]["mallows-theta"]["seeds"].values()))["policy"]
    text = as_text(tracer.trace("mallowspo/win-rates:mallows-theta/win_rate"))
    assert ref in text
    assert "not in dvc.lock" in text
    below = tracer.trace(next(r for r in tracer.manifests if r.startswith("sft/")))
    assert {row["address"] for row in below["numbers"]} == {"mallowspo/win-rates", "mallowspo/reference"}
    with pytest.raises(BadInput, match="no number"):
        tracer.trace("nothing-at-all")


def copied(results: Path, folder: Path) -> Path:
    return Path(shutil.copytree(results, folder / "results"))


def test_what_was_made_from_a_damaged_artifact_goes_with_it(results, tmp_path):
    folder = copied(results, tmp_path)
    manifests = inventory.artifacts(folder)
    (damaged,) = (ref for ref in manifests if ref.startswith("policy/distill-s0"))
    (folder / damaged / "metrics.jsonl").write_text("")
    nodes = [Node.from_json(manifest) for manifest in manifests.values()]
    assert list(inventory.damaged(folder, nodes)) == [damaged]
    gone = inventory.remove_for_remake(folder, [damaged])
    assert [ref.rsplit("-", 1)[0] for ref in gone] == [
        "generations/distill-s0",
        "judgements/distill-s0",
        "metrics/distill-s0",
        "papers/mallowspo/win-rates",
        "policy/distill-s0",
    ]
    assert set(inventory.artifacts(folder)) == set(manifests) - set(gone)


def test_a_broken_manifest_is_a_finding_of_its_own_artifact(results, tmp_path):
    folder = copied(results, tmp_path)
    manifests = inventory.artifacts(folder)
    (broken,) = (ref for ref in manifests if ref.startswith("sft/"))
    (folder / broken / "manifest.json").write_text("{")
    found = inventory.damaged(folder, [Node.from_json(manifest) for manifest in manifests.values()])
    assert list(found) == [broken]
    assert "not JSON" in found[broken][0]


def test_what_no_item_reaches_is_listed_and_removed_with_what_lies_beside_it(results, tmp_path):
    folder = copied(results, tmp_path)
    manifests = inventory.artifacts(folder)
    (kept,) = (ref for ref in manifests if "papers/mallowspo/reference" in ref)
    (other,) = (ref for ref in manifests if "papers/mallowspo/win-rates" in ref)
    (folder / "logs" / other).parent.mkdir(parents=True)
    (folder / "logs" / f"{other}.log").write_text("a line")
    (folder / SCRATCH / "sft" / "old-00000000").mkdir(parents=True)
    found = inventory.unreached(folder, [kept], ["own/exact"])
    assert other in found.artifacts
    assert not {*inventory.below(manifests, [kept])} & found.artifacts.keys()
    assert not [ref for ref in found.artifacts if "exact" in ref or ref.startswith("studies/")]
    assert set(found.leftovers) == {f"logs/{other}.log", f"{SCRATCH}/sft/old-00000000"}
    assert found.size == sum(found.artifacts.values()) + len("a line")
    inventory.remove(folder, found)
    left = inventory.unreached(folder, [kept], ["own/exact"])
    assert (left.artifacts, left.leftovers) == ({}, {})


def test_what_a_living_process_builds_stays_with_what_it_reads(results, tmp_path):
    folder = copied(results, tmp_path)
    parent = next(ref for ref in inventory.artifacts(folder) if ref.startswith("sft/"))
    node = Node("policy", 1, "running", {"seed": 7}, {"model": parent})
    write_json(folder / "specs" / f"{node.ref}.json", node.to_json())
    code = "import sys, time; from pathlib import Path; from prefopt.artifacts import Node; "
    code += "from prefopt.store.builds import building; from prefopt.files import read_json; "
    code += "node = Node.from_json(read_json(Path(sys.argv[1]))); "
    code += "stack = building(node, Path(sys.argv[2])); stack.__enter__(); print('in', flush=True); time.sleep(600)"
    words = [sys.executable, "-c", code, str(folder / "specs" / f"{node.ref}.json"), str(folder)]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "in\n"
        found = inventory.unreached(folder, [])
        assert found.running == [node.ref]
        assert parent not in found.artifacts
        assert not [name for name in found.leftovers if node.id in name]
    finally:
        job.kill()
        job.wait()
    found = inventory.unreached(folder, [])
    assert found.running == []
    assert parent in found.artifacts
    assert f"{SCRATCH}/{node.ref}" in found.leftovers


def test_a_build_leaves_no_lock_behind(tmp_path):
    node = Node("pairs", 1, "some", {"seed": 1})
    with building(node, tmp_path) as build:
        assert (build.scratch / BUILDING).is_file()
    assert not list((tmp_path / SCRATCH).rglob("*.*"))
    with pytest.raises(RuntimeError), building(node, tmp_path):
        raise RuntimeError
    assert not list((tmp_path / SCRATCH).rglob("*.*"))
