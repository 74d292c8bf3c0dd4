"""What the report is about: finished items with their curves, samples, studies and everything they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.artifacts import MANIFEST, read_manifest
from prefopt.files import read_json, read_lines, read_rows
from prefopt.grids import pages
from prefopt.reporting.addresses import kind_of
from prefopt.tables import read_table

SAMPLE_PROMPTS = 3


def collect_report(results_dir: Path, item_refs: list[str]) -> dict[str, Any]:
    """Everything the page shows, read from the artifacts below ``results_dir``.

    Items that are not made yet and parents that are not on this machine are listed, not refused: a page over half a
    run is useful, and a clone may hold the items only.
    """
    artifacts: dict[str, dict[str, Any]] = {}
    absent: set[str] = set()
    made = [_collect_item(results_dir, ref, artifacts, absent) for ref in item_refs]
    return {
        "items": made,
        "artifacts": artifacts,
        "absent": sorted(absent),
        "dispersion": _dispersion_weights(results_dir, artifacts),
    }


def _collect_item(results: Path, ref: str, artifacts: dict[str, dict[str, Any]], absent: set[str]) -> dict[str, Any]:
    reachable = ancestors(results, ref, artifacts, absent)
    if ref not in artifacts:
        return {"ref": ref, "item": None, "reachable": []}
    item = read_json(results / ref / "item.json")
    parents = {role: parent for role, parent in artifacts[ref]["parents"].items() if parent in artifacts}
    found = {"ref": ref, "item": item, "reachable": reachable}
    if kind_of(item) == "exact":
        return found | _study(results, ref, parents.get("study"), artifacts)
    if kind_of(item) == "grid":
        return found | pages.collect_pages(results, ref, item, artifacts)
    return found | {
        "curves": _curves(results, item, parents),
        "samples": _samples(results, item, parents),
    }


def _study(results: Path, item_ref: str, ref: str | None, artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """Figures (name -> SVG) and tables (name -> rows as text) of an exact item's study, in the study's order.

    Where the study is not on this machine, the item's own figure is all there is.
    """
    if ref is None:
        own = (results / item_ref / "figure.svg").read_text(encoding="utf-8")
        return {"study": None, "figures": {"figure": own}, "tables": {}}
    summary, folder = artifacts[ref]["summary"], results / ref
    drawn = {name: (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8") for name in summary["figures"]}
    tables = {name: read_rows(folder / "tables" / f"{name}.csv") for name in summary["tables"]}
    return {"study": ref, "figures": drawn, "tables": tables}


def ancestors(results: Path, ref: str, artifacts: dict[str, dict[str, Any]], absent: set[str]) -> list[str]:
    """``ref`` and every artifact it was made from, parents first; their manifests are added to ``artifacts``.

    References without a manifest go to ``absent``.
    """
    ordered: dict[str, None] = {}
    stack = [(ref, False)]
    while stack:
        current, parents_done = stack.pop()
        if parents_done:
            ordered[current] = None
            continue
        if current in ordered or current in absent:
            continue
        if current not in artifacts:
            if not (results / current / MANIFEST).is_file():
                absent.add(current)
                continue
            artifacts[current] = read_manifest(results / current / MANIFEST)
        stack.append((current, True))
        stack += [(parent, False) for parent in reversed(artifacts[current]["parents"].values())]
    return list(ordered)


def _curves(results: Path, item: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, list[Any]]:
    """Arm -> learning curve per seed, for the policies that are here and were trained in one go."""
    found: dict[str, list[Any]] = {}
    for arm in item["arms"]:
        roles = [f"policy.{arm}.{seed}" for seed in item["seeds"]]
        files = [results / parents[role] / "metrics.jsonl" for role in roles if role in parents]
        runs = [read_lines(file) for file in files if file.is_file()]
        if runs:
            found[arm] = runs
    return found


def _samples(results: Path, item: Mapping[str, Any], parents: Mapping[str, str]) -> list[dict[str, Any]]:
    """Answers of the baseline and of every arm with the first seed to the first, middle and last shared prompt."""
    seed = item["seeds"][0]
    roles = {f"{item['against']} (baseline)": f"baseline.{seed}"}
    roles |= {arm: f"generations.{arm}.{seed}" for arm in item["arms"] if arm != item["against"]}
    answers = {
        arm: {record["prompt_id"]: record for record in read_json(results / parents[role] / "outputs.json")}
        for arm, role in roles.items()
        if role in parents
    }
    if not answers:
        return []
    judged = {
        arm: read_table(results / parents[role] / "prompts.parquet").set_index("prompt_id")
        for arm in item["arms"]
        if (role := f"metrics.{arm}.{seed}") in parents
    }
    shared = sorted(set.intersection(*(set(records) for records in answers.values())))
    chosen = sorted({shared[round(k * (len(shared) - 1) / (SAMPLE_PROMPTS - 1))] for k in range(SAMPLE_PROMPTS)})
    return [
        {
            "prompt_id": prompt,
            "instruction": next(iter(answers.values()))[prompt]["instruction"],
            "answers": [
                {"arm": arm, "output": records[prompt]["output"], "judged": _judged(judged.get(arm), prompt)}
                for arm, records in answers.items()
            ],
        }
        for prompt in (chosen if shared else [])
    ]


def _judged(table: Any, prompt: int) -> str:
    """How one answer did against the baseline, in a word."""
    if table is None or prompt not in table.index:
        return ""
    outcome = float(table.loc[prompt, "outcome"])
    return "won" if outcome > 0.5 else "lost" if outcome < 0.5 else "draw"


def _dispersion_weights(results: Path, artifacts: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Weights c(x) of the train pairs per dispersion artifact."""
    tables = {
        ref: read_table(results / ref / "dispersion.parquet")
        for ref, manifest in artifacts.items()
        if manifest["stage"] == "dispersion"
    }
    return {ref: t.loc[t["split"] == "train", "dispersion_weight"].tolist() for ref, t in tables.items()}


def cost(manifests: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Wall and processor seconds summed over the artifacts, and the largest peak memory among them."""
    entries = list(manifests)
    return {
        "artifacts": len(entries),
        "wall_seconds": sum(m["wall_seconds"] for m in entries),
        "cpu_seconds": sum(m["cpu_seconds"] for m in entries),
        "peak_memory_mb": max((m["peak_memory_mb"] for m in entries), default=0.0),
    }
