"""Exported results: the small files of finished items, their index, and the README's table that is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

import fake_grids
import finished_results
from prefopt.errors import BadInput
from prefopt.files import read_json
from prefopt.report import ancestors, cost
from prefopt.reporting.exports import (
    BEGIN,
    END,
    _without_most_curves,
    export_items,
    results_table,
    update_readme,
    with_table,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    refs = {}
    for ref in [*finished_results.finished(folder / "results"), finished_results.exact_item(folder / "results").ref]:
        item = read_json(folder / "results" / ref / "item.json")
        refs[f"{item['paper']}/{item['name']}"] = ref
    export_items(folder / "results", refs, folder / "out")
    return folder, refs


def test_every_item_has_its_small_files_and_no_other(exported):
    folder, refs = exported
    for name, ref in refs.items():
        artifact, copy = folder / "results" / ref, folder / "out" / name
        names = {path.name for path in copy.iterdir()}
        assert {"item.json", "table.csv", "table.md", "figure.svg", "manifest.json"} <= names
        assert read_json(copy / "item.json") == read_json(artifact / "item.json")


def test_a_grid_keeps_the_learning_curves_of_selected_points_alone():
    item = fake_grids.item("by_condition")
    kept = _without_most_curves(item)
    assert {point["selected"] for point in item["points"]} == {True, False}
    for before, after in zip(item["points"], kept["points"], strict=True):
        assert after == (before if before["selected"] else {k: v for k, v in before.items() if k != "curve"})


def test_the_index_counts_claims_and_costs(exported):
    folder, refs = exported
    for entry in read_json(folder / "out" / "index.json"):
        item = read_json(folder / "results" / refs[entry["item"]] / "item.json")
        manifests = {}
        ancestors(folder / "results", refs[entry["item"]], manifests, set())
        assert sum(entry["claims"].values()) == len(item["expect"])
        assert entry["cpu_seconds"] == round(cost(manifests.values())["cpu_seconds"], 1)
        assert entry["artifacts"] == len(manifests)


def test_the_table_has_one_row_per_item_and_its_first_claim(exported):
    folder, refs = exported
    table = results_table(folder / "out")
    assert len(table.splitlines()) == 2 + len(refs)
    for entry in read_json(folder / "out" / "index.json"):
        (row,) = [line for line in table.splitlines() if f"[{entry['item']}]" in line]
        if entry["headline"]:
            assert entry["headline"]["reported"] in row
            assert entry["headline"]["found"] in row


def test_exporting_one_item_again_keeps_the_others(exported):
    folder, refs = exported
    before = read_json(folder / "out" / "index.json")
    name = next(iter(refs))
    (folder / "out" / name / "leftover.txt").write_text("of an older version")
    export_items(folder / "results", {name: refs[name]}, folder / "out")
    assert read_json(folder / "out" / "index.json") == before
    assert not (folder / "out" / name / "leftover.txt").exists()


def test_an_item_without_a_result_is_refused(exported):
    folder, _ = exported
    with pytest.raises(BadInput, match=r"not made yet; run `make reproduce` for p/n"):
        export_items(folder / "results", {"p/n": "papers/p/n-00000000"}, folder / "out")


def test_the_table_goes_between_the_markers(tmp_path, exported):
    readme = tmp_path / "README.md"
    readme.write_text(f"# title\n\n{BEGIN}\nold\n{END}\n\nend\n")
    assert update_readme(readme, exported[0] / "out")
    text = readme.read_text()
    assert text.startswith("# title\n")
    assert text.endswith("\n\nend\n")
    assert "old" not in text
    assert not update_readme(readme, exported[0] / "out"), "a second time changes nothing"
    with pytest.raises(BadInput, match="needs one line"):
        with_table("no markers", "table")


def test_the_projects_own_readme_shows_the_exported_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text, results_table(Path("docs/results"))) == text, (
        "run: python -m prefopt export --full --readme README.md"
    )
