"""The papers' numbers as files that `dvc metrics` and `dvc plots` read: small, sorted, and kept in git."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.files import read_json, write_json, write_text
from prefopt.reporting.addresses import claimed

METRICS, CLAIMS = "metrics.json", "claims.csv"
COLUMNS = ("number", "mean", "low", "high", "verdict")
_DIGITS = 6


def write_paper_metrics(out: Path, names: Iterable[str]) -> list[Path]:
    """For each paper among the exported items ``names`` (paper/item): ``out/<paper>/metrics.json`` and claims.csv.

    metrics.json: item -> how many claims have which verdict, and the mean of every number that the claims are about,
    nested as its address is. claims.csv: one line per claim with its interval. Returns the files.
    """
    papers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name in sorted(names):
        paper, item = name.split("/")
        papers.setdefault(paper, {})[item] = read_json(out / name / "item.json")
    written = []
    for paper, items in papers.items():
        written += [out / paper / METRICS, out / paper / CLAIMS]
        write_json(written[-2], {name: metrics_of(item) for name, item in items.items()})
        write_text(written[-1], _claims(items))
    return written


def metrics_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item's entry in metrics.json."""
    found: dict[str, Any] = {"claims": dict(sorted(Counter(row["verdict"] for row in item["expect"]).items()))}
    if "tier" in item:
        found["full"] = int(item["tier"] == "full")
    for address, number in claimed(item).items():
        *path, last = address.split("/")
        inner = found.setdefault("numbers", {})
        for part in path:
            inner = inner.setdefault(part, {})
        if number.value["mean"] is not None:
            inner[last] = _rounded(number.value["mean"])
    return found


def _claims(items: Mapping[str, Mapping[str, Any]]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for name, item in items.items():
        for place, row in enumerate(item["expect"], start=1):
            label = row.get("quantity") or f"{row['arm']} - {row['than']}"
            if "value" in row:  # of an exact item
                limits = [row["value"], *(row["interval"] or (None, None))]
            else:
                limits = [(row["difference"] or {}).get(key) for key in ("mean", "low", "high")]
            lines.writerow([f"{name} {place}: {label}", *map(_rounded, limits), row["verdict"]])
    return text.getvalue()


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
