"""Texts that are markup, in a real browser: pages show them as text, and no script of theirs runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import finished_results
from browser import CHROMIUM, chromium
from marks import long
from prefopt.cli import main
from prefopt.report import collect_report
from prefopt.reporting.report_page import render_report

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on this machine (Debian: chromium)"),
    long("ten seconds of processor time"),
]

PAYLOADS = (
    "<script>window.ran='script'</script>",
    "<img src=x onerror=\"window.ran='image'\">",
    "\"><svg onload=window.ran='svg'>",
    "'><iframe srcdoc=\"<script>parent.ran='frame'</script>\">",
    "</script><script>window.ran='closed'</script>",
    "</textarea></title></style><script>window.ran='style'</script>",
    "{{ 7 * 7 }} ${7 * 7} <!-- <script> \u2028 \u202e",
    "javascript:window.ran='link'",
)
FREE = {"title", "note", "claim", "source", "reported", "instruction", "output", "reason", "name", "arxiv", "method"}
FOREIGN = "document.querySelectorAll('img, iframe, object, embed, [onload], [onerror]').length"


def hostile(value: Any, key: str = "") -> Any:
    """Every text that comes from outside, replaced by all payloads; names that lead to files stay."""
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(part, key) for part in value]
    return " ".join(PAYLOADS) if isinstance(value, str) and key in FREE else value


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Two items with arms and an exact one; reasons of refusals, warnings and judges' names are markup too."""
    folder = tmp_path_factory.mktemp("results")
    refs = [*finished_results.finished(folder), finished_results.exact_item(folder).ref]
    data = collect_report(folder, refs)
    for entry in data["items"]:
        entry["item"] |= {
            key: hostile(part, key) for key, part in entry["item"].items() if key not in ("name", "study")
        }
        if "samples" in entry:
            entry["samples"] = hostile(entry["samples"])
        entry["tables"] = {name: [[*PAYLOADS[:3]]] * 3 for name in entry.get("tables", {})}
    for manifest in data["artifacts"].values():
        manifest["summary"]["warnings"] = list(PAYLOADS)
        if "refused" in manifest["summary"]:
            manifest["summary"]["refused"] = dict.fromkeys(PAYLOADS, 1)
        manifest["device"] = PAYLOADS[1]
    (folder / "report.html").write_text(render_report(data), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """Answers and instructions that are markup, from models with such names."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [
        {
            "instruction": f"{text} {number}",
            "output_1": text,
            "generator_1": PAYLOADS[2],
            "output_2": f"{text} two",
            "generator_2": PAYLOADS[1],
            "dataset": text,
            "preference": 1.0 + number % 2,
        }
        for number in range(3)
        for text in PAYLOADS
    ]
    (folder / "annotations.json").write_text(json.dumps(rows))
    out = folder / "page.html"
    assert main(["show-answers", "--annotations", str(folder / "annotations.json"), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


def test_the_payloads_of_these_tests_run_where_they_are_markup(browser, tmp_path):
    for number, text in enumerate(PAYLOADS[:6]):
        path = tmp_path / f"{number}.html"
        path.write_text(f"<!doctype html><body><div title=''>{text}</div>")
        browser.open(path)
        assert browser.value("new Promise(done => setTimeout(() => done(window.ran ?? null), 200))")


@pytest.mark.parametrize("name", ["report", "answers"])
def test_texts_from_outside_are_shown_and_run_nothing(browser, name, request):
    browser.complaints.clear()
    browser.open(request.getfixturevalue(name))
    browser.value("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.value("new Promise(done => setTimeout(() => done(window.ran ?? null), 300))") is None
    assert browser.value(FOREIGN) == 0
    links = browser.value("[...document.links].map(link => link.protocol)")
    assert set(links) <= {"file:", "https:"}
    shown = browser.value("document.body.textContent")
    for text in PAYLOADS[:2]:
        assert text in shown
    assert browser.complaints == []
