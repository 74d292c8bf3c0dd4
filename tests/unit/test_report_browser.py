"""The report and the page of two versions in a real headless Chromium: phone, colour schemes, keyboard, contrast."""

from __future__ import annotations

import pytest

import fake_grids
import finished_grids
import finished_results
from browser import CHROMIUM, DESKTOP, PHONE, chromium
from prefopt.report import collect_report
from prefopt.reporting import versions
from prefopt.reporting.report_page import render_report
from prefopt.reporting.versions_page import render_versions

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on this machine (Debian: chromium)")

TAB, ENTER = ("Tab", 9), ("Enter", 13)
OPEN_ALL = "for (const part of document.querySelectorAll('details')) part.open = true"
# Text is read against the nearest background that is painted; drawn lines against the page.
CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c <= 10.31475 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => 0.2126 * light(c[0]) + 0.7152 * light(c[1]) + 0.0722 * light(c[2]);
  const ratio = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const behind = (element) => {
    for (let part = element; part; part = part.parentElement) {
      const found = rgb(getComputedStyle(part).backgroundColor);
      if (found.length === 3) return found;
    }
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const holder = node.parentElement;
    if (!node.data.trim() || !holder.getClientRects().length) continue;
    const style = getComputedStyle(holder);
    const colour = holder instanceof SVGElement ? style.fill : style.color;
    texts.push([ratio(rgb(colour), behind(holder)), node.data.trim().slice(0, 40)]);
  }
  const lines = [...document.querySelectorAll("svg [style*='--series'], svg .side-1, svg .side-2")]
    .map((mark) => [getComputedStyle(mark).stroke, behind(mark)])
    .filter(([stroke]) => stroke.startsWith("rgb"))
    .map(([stroke, back]) => [ratio(rgb(stroke), back), stroke]);
  return { texts: texts.sort((a, b) => a[0] - b[0]), lines: lines.sort((a, b) => a[0] - b[0]) };
})()
"""
FOCUSED = """
(() => {
  const now = document.activeElement, style = getComputedStyle(now), box = now.getBoundingClientRect();
  const marked = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
  return {
    place: [...document.querySelectorAll("*")].indexOf(now), name: now.outerHTML.slice(0, 80), marked,
    seen: box.width > 0 && box.right > 0 && box.bottom > 0 && box.top < innerHeight,
  };
})()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One item of each form: with arms, exact with more claims than a section shows, and a grid."""
    folder = tmp_path_factory.mktemp("browser") / "results"
    grid = fake_grids.item("gains")
    grid["expect"] *= 14
    refs = [*finished_results.finished(folder), finished_results.exact_item(folder).ref]
    return folder, [*refs, finished_grids.grid_item(folder, grid).ref]


@pytest.fixture(scope="module")
def report(results):
    folder, refs = results
    path = folder / "report.html"
    path.write_text(render_report(collect_report(folder, refs)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(results, tmp_path_factory):
    """Two results folders that share one item, with another title, claims and gains in the second."""
    other = tmp_path_factory.mktemp("other") / "results"
    gains = {"dpo": 0.0, "mallows-theta": 0.0, "distill": 0.05, "ipo": None}
    claims = [finished_results.claim("mallows-theta", "dpo")]
    finished_results.item(other, "win-rates", gains, claims, (0, 1), title=f"Another {finished_results.HOSTILE}")
    found = versions.compare_versions(versions.in_results(results[0]), versions.in_results(other))
    path = other / "compared.html"
    path.write_text(render_versions(found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(params=["report", "compared"])
def page(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_only_boxes_scroll_sideways(browser, page, scheme):
    browser.open(page, PHONE, scheme)
    for step in ("0", OPEN_ALL):
        browser.value(step)
        assert browser.value("document.documentElement.scrollWidth") == browser.value("innerWidth") == 390
    outside = "[...document.querySelectorAll('table, svg, pre')].filter(e => !e.closest('.scroll, pre, section td'))"
    assert browser.value(f"{outside}.length") == 0


def test_the_page_runs_without_complaints_and_fetches_nothing(browser, page):
    browser.complaints.clear()
    browser.open(page)
    assert browser.value("performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.complaints == []
    browser.value("console.error('seen')")
    browser.value("0")
    assert len(browser.complaints) == 1, "a complaint would have been noticed"
    browser.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_their_background(browser, page, scheme):
    browser.open(page, DESKTOP, scheme)
    browser.value(OPEN_ALL)
    found = browser.value(CONTRAST)
    assert len(found["texts"]) > 60
    assert found["texts"][0][0] >= 4.5, found["texts"][:3]  # WCAG 2.2, 1.4.3
    assert found["lines"][0][0] >= 3.0, found["lines"][:3]  # WCAG 2.2, 1.4.11
    dark = browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_tab_key_goes_through_the_page_in_order_and_shows_where_it_is(browser, page, size):
    browser.open(page, size)
    stops = []
    for _ in range(25):
        browser.press(*TAB)
        stops.append(browser.value(FOCUSED))
    first = stops[0]["name"]
    assert 'class="skip"' in first
    again = next((n for n, stop in enumerate(stops) if n and stop["name"] in (first, "<body>")), len(stops))
    stops = [stop for stop in stops[:again] if not stop["name"].startswith("<body")]
    assert len(stops) > 8
    places = [stop["place"] for stop in stops]
    assert places == sorted(set(places)), "each stop once, in the order of the page"
    assert [stop["name"] for stop in stops if not (stop["marked"] and stop["seen"])] == []


def test_the_skip_link_leads_past_the_head_of_the_page(browser, page):
    browser.open(page)
    browser.press(*TAB)
    browser.press(*ENTER)
    browser.press(*TAB)
    assert browser.value("document.activeElement.closest('main') !== null")


def test_every_verdict_leads_to_what_it_rests_on(browser, report):
    """Every claim of an arms or grid item names its evidence; following a link opens the part and shows it."""
    browser.open(report)
    rows = browser.value("[...document.querySelectorAll('.evidence')].map(e => e.textContent)")
    assert len(rows) == 3 + 1 + 3 + 14  # two items with arms, the exact one, the grid
    assert all("make again" in text and "spec" in text for text in rows)
    assert all(word in rows[0] for word in ("arms", "curves", "answers", "mallows-theta", "dpo"))
    links = browser.value("[...new Set([...document.querySelectorAll('.evidence a')].map(a => a.hash))]")
    assert len(links) > 15
    for link in links:
        browser.value(f"document.querySelectorAll('details').forEach(e => e.open = false); location.hash = '{link}'")
        target = f"document.getElementById('{link[1:]}')"
        read = f"{{ const box = {target}.getBoundingClientRect(); done([box.height, box.top]) }}"
        height, top = browser.value(f"new Promise(done => setTimeout(() => {read}, 30))")
        assert height > 0, link
        assert browser.value(f"{target}.closest('details')?.open ?? true"), link
        assert top < DESKTOP[1], link


def test_details_open_and_tables_sort_from_the_keyboard(browser, report):
    browser.open(report)
    browser.value("document.querySelector('summary').focus()")
    browser.press(*ENTER)
    assert browser.value("document.querySelector('details').open")
    cells = "[...document.querySelectorAll('#verdicts tbody tr')].map(row => row.cells[1].textContent.trim())"
    declared = browser.value(cells)
    browser.value("document.querySelectorAll('#verdicts th button')[1].focus()")
    browser.press(*ENTER)
    assert browser.value(cells) == sorted(declared) != declared
    assert browser.value("document.querySelectorAll('#verdicts th')[1].getAttribute('aria-sort')") == "ascending"


def test_the_reader_may_choose_the_other_scheme(browser, report):
    browser.open(report, scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = [browser.value(colour)]
    for _ in range(2):  # auto, then light, then dark
        browser.value("document.getElementById('theme').click()")
        seen.append(browser.value(colour))
    assert seen[0] == seen[1] != seen[2]


def test_two_versions_side_by_side_name_specs_numbers_and_what_moved(browser, compared):
    browser.open(compared)
    words = browser.value("document.querySelector('main').innerText")
    for text in ("item.title", "Win rates against DPO", finished_results.HOSTILE, "apart", "mallows-theta/win_rate"):
        assert text in words, text
    assert "NOT THERE" in words.upper()  # the items of the first folder alone
    labels = browser.value("[...document.querySelectorAll('svg')].map(e => [e.getAttribute('role'), e.ariaLabel])")
    assert labels
    assert all(role == "img" and label.startswith("A ") and "; B " in label for role, label in labels)
    ends = "[...document.querySelectorAll('.pair line')].flatMap(e => [e.getAttribute('x1'), e.getAttribute('x2')])"
    assert all(0 <= float(x) <= 180 for x in browser.value(ends))  # the width of the drawing
