"""The report: one self-contained HTML page over finished items, every verdict with the evidence that it rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from prefopt import figures
from prefopt.evaluation import exact, items
from prefopt.grids import pages
from prefopt.report import cost
from prefopt.reporting.addresses import item_numbers, kind_of
from prefopt.reporting.evidence import remake_command, specs_behind
from prefopt.reporting.web import environment, slug

NOT_MADE = "not made yet"
LISTED = 60  # artifacts that a list names before it says how many more there are
FOLDED = 12  # claims that a section shows before the others are folded away
VERDICT_MEANINGS = {
    items.REPRODUCED: "direction and reported number hold; possible at the papers' own scale and for exact items only",
    items.DIRECTION_ONLY: "the whole interval lies on the side that the claim names; numbers are not compared",
    items.NOT_REPRODUCED: "the interval reaches 0 or lies on the other side; of an exact item: the number is off",
    items.NOT_RUN: "an arm of the claim has no finished run",
    items.NO_CLAIM: "the item declares nothing to check",
    NOT_MADE: "the item has no result in this folder yet",
}


def render_report(data: Mapping[str, Any]) -> str:
    """The page for what ``collect_report`` returned, to be written as ``report.html`` in the results folder.

    The same data gives the same page. All text from outside is escaped.
    """
    templates = environment()
    templates.filters |= {"duration": _duration, "number": _number, "shortened": _shortened}
    artifacts = data["artifacts"]
    return templates.get_template("report.html.j2").render(
        sections=[_section(entry, artifacts, number) for number, entry in enumerate(data["items"])],
        verdicts=Counter(_verdict(entry) for entry in data["items"]),
        meanings=VERDICT_MEANINGS,
        origin=_origin(artifacts),
        total=cost(artifacts.values()),
        warnings=[(ref, text) for ref, m in artifacts.items() for text in m["summary"].get("warnings", [])],
        data_sets=_of_stage(artifacts, "pairs", "tokens"),
        reward_models=_of_stage(artifacts, "reward"),
        two_answers=[e for e in _of_stage(artifacts, "judgements") if "position_consistency" in e["summary"]],
        ensembles=_of_stage(artifacts, "ensemble"),
        dispersions=_of_stage(artifacts, "dispersion"),
        histogram=_histogram(data["dispersion"], artifacts),
        absent=_by_stage(data["absent"]),
        listed=LISTED,
        folded=FOLDED,
    )


def _verdict(entry: Mapping[str, Any]) -> str:
    return entry["item"]["verdict"] if entry["item"] else NOT_MADE


def _section(entry: Mapping[str, Any], artifacts: Mapping[str, Mapping[str, Any]], number: int) -> dict[str, Any]:
    """One item as the template wants it: claims with their evidence, figures drawn, artifacts grouped by stage."""
    item, anchor = entry["item"], f"item-{number}"
    base = {"ref": entry["ref"], "anchor": anchor, "item": item, "verdict": _verdict(entry)}
    if item is None:
        return base
    kind = kind_of(item)
    parts = {"exact": _exact_parts, "grid": _grid_parts, "arms": _arm_parts}[kind](entry, number)
    behind = specs_behind(item, artifacts)
    specs = {name: {"anchor": f"{anchor}-spec-{n}", **held} for n, (name, held) in enumerate(behind.items(), start=1)}
    return base | {
        "target": f"{item['paper']}/{item['name']}",
        "number": next(iter(item_numbers(item)), ""),
        "kind": kind,
        "by_stage": _by_stage(entry["reachable"]),
        "cost": cost(artifacts[ref] for ref in entry["reachable"]),
        "command": remake_command(item),
        "specs": specs,
        "tally": Counter(row["verdict"] for row in item["expect"]),
        **parts,
        "claims": [line | {"specs": _behind_claim(line, specs)} for line in parts["claims"]],
    }


def _behind_claim(line: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Arm -> anchor of its spec, for the arms that a claim is about; a claim about no arm rests on all of them."""
    about = [name for name in line["about"] if name in specs] or list(specs)
    return {name: specs[name]["anchor"] for name in about}


def _by_stage(refs: Iterable[str]) -> dict[str, list[str]]:
    stages: dict[str, list[str]] = {}
    for ref in refs:
        stages.setdefault(ref.rsplit("/", 1)[0], []).append(ref)
    return stages


def _grid_parts(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What only a grid item has: figures, the table of points, samples."""
    parts = pages.grid_parts(entry, lambda svg, label, name: _figure(svg, label, f"grid{number}-{slug(name)}"))
    places = {
        "arms": "arms",
        "curves": "curves" if any(figure["name"] == "curves" for figure in parts["more"]) else None,
        "points": "points" if parts["points"] else None,
        "answers": "answers" if parts["samples"] else None,
    }
    return parts | {"places": _places(places, number)}


def _places(names: Mapping[str, str | None], number: int) -> dict[str, str]:
    """Label -> anchor of the parts that an item's section has."""
    return {label: f"item-{number}-{name}" for label, name in names.items() if name}


def _arm_parts(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What only an item with arms has: their table and figure, learning curves, samples."""
    item = entry["item"]
    arms_label = (
        f"{item['title']}: win rate and reward advantage of {len(item['arms'])} arms; the table has the numbers"
    )
    curves_label = f"{item['title']}: training loss and accuracy against the step for {', '.join(entry['curves'])}"
    curves = (
        _figure(figures.curves_figure(entry["curves"]), curves_label, f"curves{number}") if entry["curves"] else None
    )
    places = {
        "arms": "arms",
        "curves": "curves" if curves else None,
        "answers": "answers" if entry["samples"] else None,
    }
    return {
        "claims": [_claim(row) for row in item["expect"]],
        "table": items.table(item),
        "figure": _figure(figures.arms_figure(item), arms_label, f"arms{number}"),
        "curves": curves,
        "samples": entry["samples"],
        "places": _places(places, number),
    }


def _claim(row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of an item's table of claims."""
    return {
        "published": row["reported"] or "–",
        "ours": items.with_interval(row["difference"], 2, sign=True),
        "detail": f"{row['metric'].replace('_', ' ')}: {row['arm']} − {row['than']}",
        "about": [str(row[side]) for side in ("arm", "than")],
    } | {key: row[key] for key in ("claim", "source", "verdict", "reason")}


def _exact_parts(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What only an exact item has: its study's figures, tables and parameters."""
    item = entry["item"]
    drawings = [
        _figure(svg, f"{item['title']}: {name.replace('_', ' ')}; the tables have the numbers", f"exact{number}-{n}")
        for n, (name, svg) in enumerate(entry["figures"].items())
    ]
    return {
        "claims": exact.claim_lines(item),
        "figures": list(zip(entry["figures"], drawings, strict=True)),
        "tables": entry["tables"],
        "study_ref": entry["study"],
        "places": _places({"figures": "arms", "tables": "tables" if entry["tables"] else None}, number),
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
