"""The report page and its figures over real artifacts: complete, escaped, self-contained, the same every time."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

import fake_grids
import finished_grids
import finished_results
from prefopt import figures
from prefopt.files import read_json
from prefopt.grids import pages
from prefopt.report import collect_report, cost
from prefopt.reporting.report_page import NOT_MADE, render_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Balanced tags, ids, links, scripts and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.scripts, self.text, self.images = [], [], [], 0, [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        if tag == "svg":
            self.images.append(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder, finished_results.finished(folder)


@pytest.fixture(scope="module")
def page(results):
    return render_report(collect_report(*results))


def test_page_is_well_formed_and_its_ids_are_unique(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert len(page) < 10e6


def test_links_lead_to_manifests_and_anchors_that_exist(results, page):
    folder, refs = results
    parsed = Page(page)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    files = {link for link in parsed.links if not link.startswith(("#", "https://arxiv.org/"))}
    assert all((folder / link).is_file() for link in files)
    manifests = {str(path.relative_to(folder)) for path in folder.glob("**/manifest.json")}
    unused = {link for link in manifests - files if not link.startswith("dispersion/shuffled")}
    assert unused == set()  # every artifact that an item was made from is linked
    assert {f"{ref}/manifest.json" for ref in refs} <= files


def test_nothing_is_fetched_from_outside(page):
    assert re.findall(r"""(?:src|@import|url\()\s*=?\s*["']?(?:https?:)?//""", page) == []
    outside = set(re.findall(r"https?://[^\"'<\s]+", page))
    assert {url for url in outside if "w3.org" not in url} == {"https://arxiv.org/abs/2405.14953"}


def test_text_from_outside_is_escaped(page):
    parsed = Page(page)
    assert parsed.scripts == 1  # the page's own
    assert "<script>alert" not in page
    assert finished_results.HOSTILE in parsed.words  # shown as text
    assert "<b>markup</b>" in parsed.words


def test_hostile_titles_and_claims_are_escaped(results):
    folder, refs = results
    data = collect_report(folder, refs)
    item = data["items"][0]["item"]
    item["title"] = item["expect"][0]["claim"] = item["expect"][0]["reported"] = '"><script>x</script>'
    item["arms"]["<i>arm"] = item["arms"].pop("ipo")
    parsed = Page(render_report(data))
    assert parsed.scripts == 1
    assert any('"><script>x</script>' in image["aria-label"] for image in parsed.images)


def test_every_figure_has_a_text_alternative(page):
    images = Page(page).images
    assert len(images) == 2 + 2 + 1  # arms and curves of two items, one histogram
    assert all(image["role"] == "img" and len(image["aria-label"]) > 20 for image in images)


def test_page_says_what_the_reader_must_know(page):
    words = Page(page).words
    for text in (
        "such items can show the direction of a claim and nothing more",
        "54.1 vs 50.0",
        "direction only",
        "not run at this scale",
        "make reproduce ITEMS=mallowspo/win-rates",
        "both responses are the same: 7",
        "train 200 0.700",
        "0.2914",
        "0.710, 0.700, 0.680",
        "name a colour, number 39",
    ):
        assert text in words, text


def test_same_artifacts_same_page(results, page):
    assert render_report(collect_report(*results)) == page


def test_cost_adds_time_and_takes_the_largest_memory():
    rows = [
        {"wall_seconds": 2.0, "cpu_seconds": 1.0, "peak_memory_mb": 300.0},
        {"wall_seconds": 3.0, "cpu_seconds": 2.5, "peak_memory_mb": 200.0},
    ]
    assert cost(rows) == {"artifacts": 2, "wall_seconds": 5.0, "cpu_seconds": 3.5, "peak_memory_mb": 300.0}


def test_shared_artifacts_are_counted_once_in_the_total(results):
    folder, refs = results
    data = collect_report(folder, refs)
    first, second = (set(entry["reachable"]) for entry in data["items"])
    assert first & second
    assert set(data["artifacts"]) == first | second
    assert not data["absent"]


def test_parents_come_before_children(results):
    folder, refs = results
    data = collect_report(folder, refs)
    order = data["items"][0]["reachable"]
    for place, ref in enumerate(order):
        parents = read_json(folder / ref / "manifest.json")["parents"].values()
        assert all(order.index(parent) < place for parent in parents)


def test_half_a_results_folder_still_gives_a_page(results, tmp_path):
    folder, refs = results
    copy = tmp_path / "results"
    shutil.copytree(folder, copy)
    for stage in ("policy", "generations", "dispersion", "pairs"):
        shutil.rmtree(copy / stage)
    data = collect_report(copy, [*refs, "papers/mallowspo/later-00000000"])
    assert any(ref.startswith("policy/") for ref in data["absent"])
    words = Page(render_report(data)).words
    assert NOT_MADE in words
    assert "papers/mallowspo/later-00000000" in words


@pytest.fixture(scope="module")
def with_exact(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "results"
    shutil.copytree(results[0], folder)
    return folder, [*results[1], finished_results.exact_item(folder).ref]


def test_an_exact_item_has_its_figures_tables_numbers_and_parameters(with_exact):
    folder, refs = with_exact
    page = render_report(collect_report(folder, refs))
    parsed = Page(page)
    for text in (
        "compute a paper's mathematics itself",
        "Exact margins",
        "2 reproduced",
        "1 not reproduced",
        "a stricter margin table 4 1.2 1.25 margin: difference +0.05, tolerance 0.01 not reproduced",
        "1.25 [1.1, 1.4]",
        "above 1",
        "beta 0.1; places [1, 2]",
        "make reproduce ITEMS=own/exact",
        "Table: all rows (50 rows)",
        "0.333333",
        finished_results.HOSTILE,
    ):
        assert text in parsed.words, text
    assert parsed.words.index("Second by name.") < parsed.words.index("Drawn first.")
    assert len(parsed.images) == 5 + 2
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.scripts == 1
    files = {link for link in parsed.links if link.endswith((".csv", "manifest.json"))}
    assert any(link.endswith("tables/all_rows.csv") for link in files)
    assert all((folder / link).is_file() for link in files)


def test_the_sections_of_other_items_are_the_same_beside_an_exact_one(with_exact, page):
    sections = page[page.index('<section class="item"') : page.index('<section aria-labelledby="shared-title"')]
    assert sections.strip() in render_report(collect_report(*with_exact))


def test_an_exact_item_without_its_study_shows_its_own_figure(with_exact, tmp_path):
    folder, refs = with_exact
    shutil.copytree(folder / "papers", tmp_path / "papers")
    data = collect_report(tmp_path, refs[-1:])
    assert [ref.split("/")[0] for ref in data["absent"]] == ["studies"]
    parsed = Page(render_report(data))
    assert len(parsed.images) == 1
    assert "a stricter margin" in parsed.words


@pytest.fixture(scope="module")
def with_grids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids") / "results"
    layouts = ("by_condition", "gains", "histogram")
    items = [finished_grids.grid_item(folder, fake_grids.item(layout)) for layout in layouts]
    return folder, [node.ref for node in items]


def light(data):
    """The same data without curves: nothing but the main figures is drawn."""
    for entry in data["items"]:
        for point in entry["item"]["points"]:
            point["curve"] = {}
    return data


@pytest.fixture(scope="module")
def grid_page(with_grids):
    return render_report(collect_report(*with_grids))


def test_a_grid_section_has_claims_figures_points_and_samples(grid_page):
    parsed = Page(grid_page)
    for text in (
        "tier quick · seeds 0, 1, 2",
        "conditions 2, arms 3, points 12; runs finished 36 of 36; answers per prompt 1",
        "direction only the interval [0.25, 0.75] lies above 0.",
        "+0.50 [+0.25, +0.75], p = 0.031",
        "reward: theta − dpo",
        "skewness: wide − narrow",
        "Selected by reward on validation",
        "Table of points (12 rows)",
        "Mallows θ β 0.5",
        "make reproduce ITEMS=mallowspo/gains",
        "Figure: collapse",
    ):
        assert text in parsed.words, text
    assert len(parsed.images) == 5 + 2 + 1
    assert len(parsed.ids) == len(set(parsed.ids))


def test_grid_samples_are_last_answers_of_the_selected_points(grid_page):
    words = Page(grid_page).words
    assert f"say 2 {finished_results.HOSTILE}" in words  # the middle of five prompts
    for text in ("reference at 10 to 0", "theta 0.1 at 10 to 4", "dpo 0.1 at 10 to 2"):
        assert text in words, text
    assert "at 0 to" not in words
    assert "theta 0.5 at" not in words  # not selected
    assert "SFT reference 0.50" in words  # the score of prompt 2: 2/4


def test_texts_of_grid_items_are_escaped(with_grids, grid_page):
    assert Page(grid_page).scripts == 1
    assert "lowest <i>prompt</i>" in Page(grid_page).words
    data = light(collect_report(*with_grids))
    item = data["items"][0]["item"]
    for held in (item["arms"]["dpo"], item["conditions"]["c0"]):
        held["label"] = "</text><script>x</script>"
    item["expect"][0]["reason"] = item["method"] = "<script>y</script>"
    assert Page(render_report(data)).scripts == 1


def test_links_of_grid_items_lead_to_files(with_grids, grid_page):
    folder, refs = with_grids
    files = {link for link in Page(grid_page).links if not link.startswith(("#", "https://arxiv.org/"))}
    assert all((folder / link).is_file() for link in files)
    assert {f"{ref}/table.csv" for ref in refs} <= files


def test_long_lists_and_tables_are_folded(with_grids):
    data = light(collect_report(*with_grids))
    entry = data["items"][0]
    trials = [ref for ref in entry["reachable"] if ref.startswith("trials/")]
    entry["reachable"] += trials * 2
    data["absent"] = [f"trials/gone-{n}" for n in range(700)]
    entry["item"]["points"] *= 4
    words = Page(render_report(data)).words
    assert f"and {3 * len(trials) - 60} more" in words
    assert "and 640 more" in words
    assert "The first 40 of 48 rows, selected points first." in words


def test_grid_items_without_their_trials_still_have_a_section(with_grids, tmp_path):
    folder, refs = with_grids
    shutil.copytree(folder / "papers", tmp_path / "papers")
    data = light(collect_report(tmp_path, refs))
    assert {ref.split("/")[0] for ref in data["absent"]} == {"trials", "pairs"}
    parsed = Page(render_report(data))
    assert len(parsed.images) == 2 + 1 + 1  # by_condition with what was selected, gains, histogram
    assert "Answers to" not in parsed.words


def test_the_reference_stands_between_random_and_best(with_grids):
    data = light(collect_report(*with_grids))
    data["items"][0]["item"]["reference"]["test"]["bounds"] = {"random": -1.0, "written": 1.0, "best": 2.0}
    words = Page(render_report(data)).words
    # the reference's reward is 0.5: (0.5 + 1) / (2 + 1) of the way
    assert "reward 0.50 [0.25, 0.75]; random words -1.00, the oracle's best 2.00: 50 % of the way (an answer" in words


def test_the_same_grid_items_give_the_same_page(with_grids, grid_page):
    assert render_report(collect_report(*with_grids)) == grid_page


def test_a_claim_that_was_not_run_has_no_numbers():
    row = fake_grids.claim(difference=None, p=None, verdict="not run at this scale", than=None, part="low")
    line = pages.claim_line(row)
    assert line["ours"] == "–"
    assert line["detail"] == "reward: theta, low KL"
    assert pages.claim_line(fake_grids.claim(p=0.0))["ours"].endswith("p < 0.001")
    narrow = fake_grids.claim(difference=fake_grids.estimate(0.01, 0.004))
    assert pages.claim_line(narrow)["ours"].startswith("+0.010 [+0.006, +0.014]")


def test_no_items_no_crash(tmp_path):
    assert "0 items" in Page(render_report(collect_report(tmp_path, []))).words


def test_figures_are_deterministic_text_without_dates(results):
    folder, refs = results
    entry = collect_report(folder, refs)["items"][0]
    for draw in (
        lambda: figures.arms_figure(entry["item"]),
        lambda: figures.curves_figure(entry["curves"]),
        lambda: figures.histogram_figure({"token-entropy": [0.5, 1.0, 1.5]}, {"token-entropy": 0.29}),
    ):
        svg = draw()
        assert svg == draw()
        assert "dc:date" not in svg
        root = ET.fromstring(svg)
        assert len(root.findall(".//{http://www.w3.org/2000/svg}text")) > 3  # words stay words
        assert "#ffffff" not in svg  # nothing paints a background
        assert "#000000" not in svg


def test_arms_stand_in_declared_order_with_their_state(results):
    folder, refs = results
    item = collect_report(folder, refs)["items"][0]["item"]
    svg = figures.arms_figure(item)
    names = ["dpo (baseline)", "mallows-theta", "distill", "ipo (not run)"]
    places = [svg.index(f">{name}<") for name in names]
    assert places == sorted(places)


def test_long_curves_are_thinned_to_their_means():
    run = [{"step": t, "loss": float(t % 2), "accuracy": 0.5} for t in range(1, 30_001)]
    svg = figures.curves_figure({"dpo": [run, run]})
    assert len(svg) < 60_000
    steps, values = figures._binned([1, 2, 3, 4], [0.0, 1.0, 0.0, 1.0])
    assert list(values) == [0.0, 1.0, 0.0, 1.0]
    steps, values = figures._binned(range(800), [0.0, 1.0] * 400)
    assert set(values) == {0.5}
    assert steps[0] == 9.5  # the mean of steps 0..19: 800 steps in 40 groups


def test_inline_keeps_references_together():
    svg = figures.curves_figure({"dpo": [finished_results.curve(0)]})
    inlined = figures.inline(svg, 'a "label" & more', "x")
    ids = set(re.findall(r'\bid="([^"]+)"', inlined))
    assert ids
    assert all(name.startswith("x-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', inlined)) <= ids
    assert 'aria-label="a &quot;label&quot; &amp; more"' in inlined
    assert figures.INK not in inlined
