"""One self-contained HTML page over finished items: verdicts, figures, samples, the data behind them, and the cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefopt import exact, figures, items
from prefopt.addresses import item_numbers, kind_of
from prefopt.artifacts import MANIFEST, read_json, read_lines, read_rows, read_table
from prefopt.grids import pages

NOT_MADE = "not made yet"
SAMPLE_PROMPTS = 3
LISTED = 60  # artifacts that a list names before it says how many more there are
VERDICT_MEANINGS = {
    items.REPRODUCED: "direction and reported number hold; possible at the papers' own scale and for exact items only",
    items.DIRECTION_ONLY: "the whole interval lies on the side that the claim names; numbers are not compared",
    items.NOT_REPRODUCED: "the interval reaches 0 or lies on the other side; of an exact item: the number is off",
    items.NOT_RUN: "an arm of the claim has no finished run",
    items.NO_CLAIM: "the item declares nothing to check",
    NOT_MADE: "the item has no result in this folder yet",
}


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
            artifacts[current] = read_json(results / current / MANIFEST)
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


def render_report(data: Mapping[str, Any]) -> str:
    """The page for what ``collect_report`` returned, to be written as ``report.html`` in the results folder.

    The same data gives the same page. All text from outside is escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prefopt"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "slug": _slug, "number": _number, "shortened": _shortened}
    artifacts = data["artifacts"]
    return environment.get_template("report.html.j2").render(
        sections=[_section(entry, artifacts, number) for number, entry in enumerate(data["items"])],
        verdicts=Counter(_verdict(entry) for entry in data["items"]),
        meanings=VERDICT_MEANINGS,
        origin=_origin(artifacts),
        total=cost(artifacts.values()),
        data_sets=_of_stage(artifacts, "pairs", "tokens"),
        reward_models=_of_stage(artifacts, "reward"),
        two_answers=[e for e in _of_stage(artifacts, "judgements") if "position_consistency" in e["summary"]],
        ensembles=_of_stage(artifacts, "ensemble"),
        dispersions=_of_stage(artifacts, "dispersion"),
        histogram=_histogram(data["dispersion"], artifacts),
        absent=_by_stage(data["absent"]),
        listed=LISTED,
    )


def _verdict(entry: Mapping[str, Any]) -> str:
    return entry["item"]["verdict"] if entry["item"] else NOT_MADE


def _section(entry: Mapping[str, Any], artifacts: Mapping[str, Mapping[str, Any]], number: int) -> dict[str, Any]:
    """One item as the template wants it: its figures drawn, its artifacts grouped by stage."""
    item = entry["item"]
    base = {"ref": entry["ref"], "anchor": f"item-{number}", "item": item, "verdict": _verdict(entry)}
    if item is None:
        return base
    kind = kind_of(item)
    parts = {"exact": _exact_parts, "grid": _grid_parts, "arms": _arm_parts}[kind]
    return base | {
        "target": f"{item['paper']}/{item['name']}",
        "number": next(iter(item_numbers(item)), ""),
        "kind": kind,
        "by_stage": _by_stage(entry["reachable"]),
        "cost": cost(artifacts[ref] for ref in entry["reachable"]),
        **parts(entry, number),
    }


def _by_stage(refs: Iterable[str]) -> dict[str, list[str]]:
    stages: dict[str, list[str]] = {}
    for ref in refs:
        stages.setdefault(ref.rsplit("/", 1)[0], []).append(ref)
    return stages


def _grid_parts(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What only a grid item has: figures, the table of points, samples."""
    return pages.grid_parts(entry, lambda svg, label, name: _figure(svg, label, f"grid{number}-{_slug(name)}"))


def _arm_parts(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What only an item with arms has: their table and figure, learning curves, samples."""
    item = entry["item"]
    arms_label = (
        f"{item['title']}: win rate and reward advantage of {len(item['arms'])} arms; the table has the numbers"
    )
    curves_label = f"{item['title']}: training loss and accuracy against the step for {', '.join(entry['curves'])}"
    return {
        "claims": [_claim(row) for row in item["expect"]],
        "table": items.table(item),
        "figure": _figure(figures.arms_figure(item), arms_label, f"arms{number}"),
        "curves": _figure(figures.curves_figure(entry["curves"]), curves_label, f"curves{number}")
        if entry["curves"]
        else None,
        "samples": entry["samples"],
    }


def _claim(row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of verdicts."""
    return {
        "published": row["reported"] or "–",
        "ours": items.with_interval(row["difference"], 2, sign=True),
        "detail": f"{row['metric'].replace('_', ' ')}: {row['arm']} − {row['than']}",
    } | {key: row[key] for key in ("claim", "source", "verdict")}


def _exact_parts(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What only an exact item has: its study's figures, tables and parameters."""
    item = entry["item"]
    drawings = [
        _figure(svg, f"{item['title']}: {name.replace('_', ' ')}; the tables have the numbers", f"exact{number}-{n}")
        for n, (name, svg) in enumerate(entry["figures"].items())
    ]
    return {
        "claims": exact.verdict_lines(item),
        "table": exact.table(item),
        "figures": list(zip(entry["figures"], drawings, strict=True)),
        "tables": entry["tables"],
        "study_ref": entry["study"],
    }


def _figure(svg: str, label: str, prefix: str) -> Any:
    from markupsafe import Markup

    return Markup(figures.inline(svg, label, prefix))


def _histogram(weights: Mapping[str, list[float]], artifacts: Mapping[str, Mapping[str, Any]]) -> Any:
    if not weights:
        return None
    names = Counter(artifacts[ref]["name"] for ref in weights)
    labels = {
        ref: artifacts[ref]["name"] if names[artifacts[ref]["name"]] == 1 else artifacts[ref]["id"] for ref in weights
    }
    phi_star = {labels[ref]: artifacts[ref]["summary"]["phi_star"] for ref in weights}
    svg = figures.histogram_figure({labels[ref]: values for ref, values in weights.items()}, phi_star)
    return _figure(
        svg, f"Distribution of the dispersion weight over train pairs for {', '.join(labels.values())}", "hist"
    )


def _of_stage(artifacts: Mapping[str, Mapping[str, Any]], *stages: str) -> list[dict[str, Any]]:
    return [{"ref": ref, **manifest} for ref, manifest in artifacts.items() if manifest["stage"] in stages]


def cost(manifests: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Wall and processor seconds summed over the artifacts, and the largest peak memory among them."""
    entries = list(manifests)
    return {
        "artifacts": len(entries),
        "wall_seconds": sum(m["wall_seconds"] for m in entries),
        "cpu_seconds": sum(m["cpu_seconds"] for m in entries),
        "peak_memory_mb": max((m["peak_memory_mb"] for m in entries), default=0.0),
    }


def _origin(artifacts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """When, from which commits and on what kind of machine the artifacts were made."""
    manifests = list(artifacts.values())
    finished = sorted(datetime.fromisoformat(m["finished"]).astimezone(UTC) for m in manifests)
    commits = Counter((m["git"]["commit"], m["git"]["dirty"]) for m in manifests)
    return {
        "first": f"{finished[0]:%Y-%m-%d %H:%M} UTC" if finished else None,
        "last": f"{finished[-1]:%Y-%m-%d %H:%M} UTC" if finished else None,
        "commits": [
            {"commit": commit, "dirty": dirty, "artifacts": count}
            for (commit, dirty), count in sorted(commits.items(), key=lambda entry: (-entry[1], str(entry[0])))
        ],
        "devices": sorted({str(m["device"]) for m in manifests}),
        "machines": sorted({f"{m['machine']}, Python {m['python']}" for m in manifests}),
        "packages": sorted({f"{name} {version}" for m in manifests for name, version in m["packages"].items()}),
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _shortened(cell: str) -> str:
    """A cell of a CSV file: numbers with six significant digits, everything else as it is."""
    try:
        return f"{float(cell):.6g}"
    except ValueError:
        return cell


def _slug(text: str) -> str:
    return text.replace(" ", "-")
