"""Paper items: the measurements of all arms and seeds become a table, figures and a verdict."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.artifacts import MANIFEST, read_manifest
from prefopt.files import read_json, read_lines, read_rows, write_json, write_text
from prefopt.stages import RunOptions
from prefopt.stages.common import warn
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.grids.runs import Trial
    from prefopt.grids.weights import Sample

log = logging.getLogger(__name__)


def _finished_runs(build: Build) -> dict[tuple[str, int], dict[str, Any]]:
    """What collect_item reads for every arm and seed; the arm judged against has a policy and no metrics."""
    draws = build.node.spec.get("draws", 1)
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for arm in build.node.spec["arms"]:
        for seed in build.node.spec["seeds"]:
            run: dict[str, Any] = {"policy": build.node.parents[f"policy.{arm}.{seed}"]}
            role = f"metrics.{arm}.{seed}"
            if build.has_parent(role):
                folder = build.parent(role)
                run |= {
                    "metrics_ref": build.node.parents[role],
                    "metrics": read_json(folder / "metrics.json"),
                    "prompts": read_table(folder / "prompts.parquet"),
                }
                if draws > 1:
                    run |= _over_draws(build, role, draws)
            runs[arm, seed] = run
    return runs


def _over_draws(build: Build, role: str, draws: int) -> dict[str, Any]:
    """Metrics averaged over the draws of one run, and its rows with the draw beside them."""
    import pandas as pd

    folders = [build.parent(f"{role}.{draw}" if draw else role) for draw in range(draws)]
    metrics = [read_json(folder / "metrics.json") for folder in folders]
    tables = [read_table(folder / "prompts.parquet").assign(draw=draw) for draw, folder in enumerate(folders)]
    numbers = [name for name, value in metrics[0].items() if isinstance(value, int | float)]
    means = {name: float(np.mean([one[name] for one in metrics])) for name in numbers}
    return {"metrics": {"draws": draws, **means}, "prompts": pd.concat(tables, ignore_index=True)}


def paper_item(build: Build, options: RunOptions) -> None:
    """Write item.json, table.csv, table.md and figure.svg; a grid item's figures also go to figures/<name>.svg."""
    item, table, markdown, drawn = _collect(build)
    write_json(build.work / "item.json", item)
    write_text(build.work / "table.csv", table.to_csv(index=False))
    write_text(build.work / "table.md", markdown)
    write_text(build.work / "figure.svg", next(iter(drawn.values())))
    build.summary |= {"verdict": item["verdict"], "claims": [row["verdict"] for row in item["expect"]]}
    if "grid" in build.node.spec:
        for name, figure in drawn.items():
            write_text(build.work / "figures" / f"{name}.svg", figure)
        build.summary |= {"figures": list(drawn)}
    log.info("%s/%s: %s", item["paper"], item["name"], item["verdict"])


def _collect(build: Build) -> tuple[dict[str, Any], pd.DataFrame, str, dict[str, str]]:
    """Content, table, Markdown and figures by name, the main one first."""
    if "grid" in build.node.spec:
        return _grid(build)
    return _exact(build) if build.has_parent("study") else _measured(build)


def _grid(build: Build) -> tuple[dict[str, Any], pd.DataFrame, str, dict[str, str]]:
    """Content, table, Markdown and figures over trained runs, or over dispersion weights."""
    from prefopt.grids import collect, figures, matched, tables

    spec = build.node.spec
    if spec["grid"]["layout"] == "histogram":
        item = collect.collect_weights(spec, _weights(build))
    else:
        runs, reference = _trials(build)
        item = collect.collect_runs(spec, runs, reference)
        if spec["grid"]["judge"] == "oracle":
            _add_bounds(build, item, reference)
    rows = matched.matched_rows(item, _costs(build, item))
    if rows:
        item["matched"] = rows
    text = tables.markdown(item) + matched.matched_markdown(item, rows)
    return item, tables.table(item), text, figures.grid_figures(item)


def _costs(build: Build, item: dict[str, Any]) -> dict[str, float]:
    """Mean CPU seconds of every arm's runs, from their manifests; in rounds with all that an arm's policies led to.

    What arms share (data, reference, its samples, reward models on the declared pairs) counts for none of them.
    """
    spent: dict[str, list[float]] = {}
    for point in item["points"]:
        for ref in point["runs"].values():
            manifest = read_manifest(build.results / ref / MANIFEST, "parents")
            own: dict[str, float] = {}
            for role, parent in manifest["parents"].items():
                if role.startswith("round"):
                    _count_own(build.results, parent, own)
            spent.setdefault(point["arm"], []).append(manifest["cpu_seconds"] + sum(own.values()))
    return {arm: float(np.mean(seconds)) for arm, seconds in spent.items()}


def _count_own(results: Path, ref: str, own: dict[str, float]) -> bool:
    """Put the CPU seconds of policies, and of what they led to, into ``own``, from ``ref`` down; whether it is such."""
    if ref in own:
        return True
    manifest = read_manifest(results / ref / MANIFEST, "parents", "stage")
    from_policies = [_count_own(results, parent, own) for parent in manifest["parents"].values()]
    if manifest["stage"] == "policy" or any(from_policies):
        own[ref] = manifest["cpu_seconds"]
    return ref in own


def _add_bounds(build: Build, item: dict[str, Any], reference: dict[int, Trial]) -> None:
    """Beside the reference's reward: what a random candidate and the oracle's best answer are worth on its prompts."""
    from prefopt.world import bounds

    for name, found in item["reference"].items():
        if not build.has_parent(f"set.{name}.pairs"):
            continue
        pairs = read_table(build.parent(f"set.{name}.pairs") / "pairs.parquet", ("prompt_id", "prompt"))
        texts = pairs.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
        asked = next(iter(reference.values())).last(name).prompt_id
        found["bounds"] = bounds([texts[prompt][0]["content"] for prompt in asked])


def _trials(build: Build) -> tuple[dict[tuple[int, int], Trial], dict[int, Trial]]:
    """The trials that the plan wired: by (point, seed), and the reference's by seed; each artifact is read once."""
    from prefopt.grids.runs import ANSWER_COLUMNS, trial_of

    read: dict[str, Trial] = {}
    for role, ref in build.node.parents.items():
        if role.startswith(("run.", "reference.")) and ref not in read:
            answers = read_table(build.results / ref / "answers.parquet", ANSWER_COLUMNS)
            read[ref] = trial_of(ref, answers, read_lines(build.results / ref / "metrics.jsonl"))
    runs, reference = {}, {}
    for role, ref in build.node.parents.items():
        kind, *numbers = role.split(".")
        if kind == "run":
            runs[int(numbers[0]), int(numbers[1])] = read[ref]
        elif kind == "reference":
            reference[int(numbers[0])] = read[ref]
    return runs, reference


def _weights(build: Build) -> dict[str, Sample]:
    """Dispersion weights of the training pairs by condition, with kind and text of their prompts."""
    from prefopt.grids.weights import Sample

    found = {}
    for name in build.node.spec["grid"]["conditions"]:
        if not (build.has_parent(f"dispersion.{name}") and build.has_parent(f"pairs.{name}")):
            continue
        folder = build.parent(f"dispersion.{name}")
        weights = read_table(folder / "dispersion.parquet", ("pair_id", "dispersion_weight"), "train")
        pairs = read_table(build.parent(f"pairs.{name}") / "pairs.parquet", ("pair_id", "prompt_id", "prompt", "meta"))
        table = join_one_to_one(weights, pairs, f"dispersion of {name}")
        found[name] = Sample(
            phi_star=read_manifest(folder / MANIFEST, "summary")["summary"]["phi_star"],
            weight=table["dispersion_weight"].to_numpy(),
            prompt_id=table["prompt_id"].to_numpy(),
            kind=np.array([json.loads(meta or "{}").get("kind") for meta in table["meta"]], dtype=object),
            text=np.array([messages[-1]["content"] for messages in table["prompt"]], dtype=object),
        )
    return found


def _measured(build: Build) -> tuple[dict[str, Any], pd.DataFrame, str, dict[str, str]]:
    """Content, table, Markdown and figure over all arms and seeds."""
    from prefopt import figures
    from prefopt.evaluation import items
    from prefopt.evaluation.alike import arms_alike

    runs = _finished_runs(build)
    for sentence in arms_alike(runs):
        warn(build, sentence)
    item = items.collect_item(build.node.spec, runs)
    return item, items.table(item), items.markdown(item), {"arms": figures.arms_figure(item)}


def _exact(build: Build) -> tuple[dict[str, Any], pd.DataFrame, str, dict[str, str]]:
    """The same of an exact item; its figure is the first one of its study."""
    from prefopt.evaluation import exact

    folder = build.parent("study")
    values = read_json(folder / "values.json")
    item = exact.collect_exact(build.node.spec, values, build.node.parents["study"])
    summary = read_manifest(folder / MANIFEST, "summary")["summary"]
    first = summary["figures"][0]
    figure = (folder / "figures" / f"{first}.svg").read_text(encoding="utf-8")
    text = exact.markdown(item)
    if item["scale"] != "exact":  # what was measured is not in the claims alone
        text += "".join(f"\n## {name}\n\n{_pipe_table_of(folder, name)}\n" for name in summary["tables"])
    return item, exact.table(item), text, {first: figure}


def _pipe_table_of(folder: Path, name: str) -> str:
    """A table of a study as Markdown."""
    import pandas as pd

    from prefopt.evaluation.items import pipe_table

    header, *rows = read_rows(folder / "tables" / f"{name}.csv")
    return pipe_table(pd.DataFrame(rows, columns=header))
