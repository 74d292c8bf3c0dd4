"""Small results for version control: items' tables, verdicts, figures and manifests, and the README's table of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST
from prefopt.errors import BadInput
from prefopt.evaluation import exact
from prefopt.evaluation.items import pipe_table, with_interval
from prefopt.files import read_json, read_text, write_json, write_text
from prefopt.report import ancestors, cost

INDEX = "index.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_FILES = ("table.csv", "table.md", "figure.svg", MANIFEST)


def export_items(results: Path, refs: Mapping[str, str], out: Path) -> list[str]:
    """Copy each finished item to ``out/<paper>/<name>/`` and write its line of ``out/index.json``; return their names.

    ``refs``: paper/name -> stage/id. Items already there and not in ``refs`` stay. Raises BadInput where an item has no
    result yet.
    """
    entries = {entry["item"]: entry for entry in _index(out)}
    for name, ref in refs.items():
        if not (results / ref / MANIFEST).is_file():
            raise BadInput(f"{results / ref}: not made yet; run `make reproduce` for {name}, then export it")
        entries[name] = _entry(results, name, ref)
        _copy(results / ref, out / name)
    ordered = [entries[name] for name in sorted(entries)]
    write_json(out / INDEX, ordered)
    return [entry["item"] for entry in ordered]


def _index(out: Path) -> list[dict[str, Any]]:
    return read_json(out / INDEX) if (out / INDEX).is_file() else []


def _copy(artifact: Path, folder: Path) -> None:
    """The item's files and figures, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _FILES:
        shutil.copyfile(artifact / name, folder / name)
    small = _without_most_curves(read_json(artifact / "item.json"))
    write_text(folder / "item.json", json.dumps(small, ensure_ascii=False) + "\n")
    if (artifact / "figures").is_dir():
        shutil.copytree(artifact / "figures", folder / "figures", copy_function=shutil.copyfile)


def _without_most_curves(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is, but of a grid's learning curves those of selected points alone: four fifths of the size."""
    if item.get("kind") != "grid":
        return item
    points = [{k: v for k, v in point.items() if k != "curve" or point["selected"]} for point in item["points"]]
    return item | {"points": points}


def _entry(results: Path, name: str, ref: str) -> dict[str, Any]:
    """What the table of results says of an item, with the cost of everything below it."""
    manifests: dict[str, dict[str, Any]] = {}
    ancestors(results, ref, manifests, set())
    item, spent = read_json(results / ref / "item.json"), cost(manifests.values())
    rows = item["expect"]
    return {
        "item": name,
        "title": item["title"],
        "scale": item["scale"] if item["scale"] == "exact" else f"{item['scale']}, {item.get('tier', 'whole')}",
        "verdict": item["verdict"],
        "claims": dict(Counter(row["verdict"] for row in rows)),
        "headline": _headline(item, rows[0]) if rows else None,
        "artifacts": spent["artifacts"],
        "cpu_seconds": round(spent["cpu_seconds"], 1),
        "commit": manifests[ref]["git"]["commit"],
        "dirty": any(manifest["git"]["dirty"] for manifest in manifests.values()),
    }


def _headline(item: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    """The item's first claim: as reported, and as found here."""
    if exact.is_of_numbers(item):
        return {"reported": exact.reported_text(row), "found": f"{row['quantity']}: {exact.value_text(row)}"}
    where = f"{row['metric'].replace('_', ' ')}, " if "metric" in row else ""
    sides = f"{row['arm']} − {row['than']}: " if row.get("than") is not None and "arm" in row else ""
    found = with_interval(row["difference"], 2, sign=True)
    return {"reported": row["reported"] or row["claim"], "found": f"{where}{sides}{found}"}


def results_table(out: Path) -> str:
    """The exported items as a Markdown table, from their index alone. Raises BadInput without exported results."""
    import pandas as pd

    entries: Sequence[Mapping[str, Any]] = _index(out)
    if not entries:
        raise BadInput(f"{out / INDEX}: no exported results; run `python -m prefopt export --out {out}` first")
    rows = [
        {
            "item": f"[{entry['item']}]({out.as_posix()}/{entry['item']}/table.md)",
            "what": entry["title"],
            "scale": entry["scale"],
            "first claim: reported": entry["headline"]["reported"] if entry["headline"] else "–",
            "found": entry["headline"]["found"] if entry["headline"] else "–",
            "all claims": "; ".join(f"{count} {verdict}" for verdict, count in sorted(entry["claims"].items())),
            "CPU": f"{entry['cpu_seconds'] / 60:.1f} min",
            "commit": f"`{entry['commit'][:8]}`{' (dirty)' if entry['dirty'] else ''}" if entry["commit"] else "–",
        }
        for entry in entries
    ]
    return pipe_table(pd.DataFrame(rows))


def with_table(text: str, table: str) -> str:
    """A README's text with the table between its two markers; BadInput where it does not have both, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise BadInput(f"the file needs one line '{BEGIN}' and one line '{END}', between which the table goes")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def update_readme(readme: Path, out: Path) -> bool:
    """Put the table of exported results into a README; whether that changed it."""
    text = read_text(readme)
    updated = with_table(text, results_table(out))
    if updated != text:
        write_text(readme, updated)
    return updated != text
