"""What the report shows of a grid item: claims, figures, the table of points, sample answers and the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.engine.answers import instruction_text
from prefopt.evaluation.items import with_interval
from prefopt.grids.drawing import main_set, settings_label, shown_sets
from prefopt.grids.figures import grid_figures
from prefopt.tables import read_table

SAMPLE_PROMPTS = 3
SHOWN_POINTS = 40
CAPTIONS = {
    "bars": "Win rate against the base with the same settings; mean with 95 % interval. Dashed: 50 %.",
    "frontier": "Left: against the sequence KL, 95 % intervals in both directions. Right: against training time.",
    "gains": "Base and plug-in with the same settings; 95 % intervals. Rings: the points that the validation selects.",
    "by_condition": "Reward advantage of the selected points over the reference; mean with 95 % interval, moved aside.",
    "histogram": "Weight of the prompts; both kinds stacked. Dashed: the mean, 1.",
    "ranking": "Mean with 95 % interval per arm, the best first. Diamonds: controls.",
    "selected": "Setting that the validation selects; grey lines: the values tried.",
    "members": "Members of the ensemble that the pairs were matched with; mean of the seeds.",
    "collapse": "Log ratio to the reference in training, mean over the batch; band: 95 % interval over the seeds.",
    "curves": "Training of the points that stand for each arm; mean of the seeds, band: 95 % interval.",
}


def collect_pages(results: Path, ref: str, item: Mapping[str, Any], artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """Sample answers from the trials that are on this machine, and whether the item's table is beside it."""
    return {"samples": _samples(results, ref, item, artifacts), "table": (results / ref / "table.csv").is_file()}


def _samples(results: Path, ref: str, item: Mapping[str, Any], artifacts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answers of the reference and of each arm's point to the first, middle and last prompt that all of them have."""
    if not item["points"]:
        return []
    name, seed = main_set(item), item["seeds"][0]
    trials = {
        label: trial
        for label, role in _sampled_roles(item, seed).items()
        if (trial := artifacts[ref]["parents"].get(role)) in artifacts
        and (results / trial / "answers.parquet").is_file()
    }
    answers = {label: table for label, trial in trials.items() if len(table := _last_answers(results / trial, name))}
    if not answers:
        return []
    shared = sorted(set.intersection(*(set(table.index) for table in answers.values())))
    chosen = sorted(
        {shared[round(k * (len(shared) - 1) / (SAMPLE_PROMPTS - 1))] for k in range(SAMPLE_PROMPTS)} if shared else []
    )
    texts = _prompt_texts(results, (artifacts[trial]["parents"].get(f"set.{name}.pairs") for trial in trials.values()))
    return [
        {
            "prompt_id": prompt,
            "instruction": texts.get(prompt, "(the prompt is not on this machine)"),
            "answers": [
                {"arm": label, "output": table.loc[prompt, "text"], "judged": f"{table.loc[prompt, 'score']:.2f}"}
                for label, table in answers.items()
            ],
        }
        for prompt in chosen
    ]


def _sampled_roles(item: Mapping[str, Any], seed: int) -> dict[str, str]:
    """Label -> parent role of the reference and of the point that stands for each arm in the arm's first condition."""
    roles = {"SFT reference": f"reference.{seed}"}
    for arm, entry in item["arms"].items():
        numbered = [(n, point) for n, point in enumerate(item["points"]) if point["arm"] == arm]
        here = [(n, point) for n, point in numbered if point["condition"] == numbered[0][1]["condition"]]
        number = next((n for n, point in here if point["selected"]), here[0][0] if here else None)
        if number is not None:
            settings = settings_label(item, item["points"][number]["settings"])
            roles[f"{entry['label']} ({settings})" if settings else entry["label"]] = f"run.{number}.{seed}"
    return roles


def _last_answers(folder: Path, name: str) -> Any:
    """The answers of the first draw to one set after the last step, by prompt."""
    table = read_table(folder / "answers.parquet")
    table = table[(table["set"] == name) & (table["draw"] == 0)]
    return table[table["step"] == table["step"].max()].set_index("prompt_id")


def _prompt_texts(results: Path, refs: Iterable[str | None]) -> dict[int, str]:
    """prompt_id -> text from the first of these pairs artifacts that is on this machine."""
    for ref in refs:
        if ref and (results / ref / "pairs.parquet").is_file():
            pairs = read_table(results / ref / "pairs.parquet").drop_duplicates("prompt_id")
            return {int(k): instruction_text(list(p)) for k, p in zip(pairs["prompt_id"], pairs["prompt"], strict=True)}
    return {}


def grid_parts(entry: Mapping[str, Any], draw: Callable[[str, str, str], Any]) -> dict[str, Any]:
    """What only a grid item's section has; ``draw(svg, label, name)`` makes a figure fit for the page."""
    item = entry["item"]
    drawn = []
    for name, svg in grid_figures(item).items():
        label = f"{item['title']}: {name.replace('_', ' ')}; the table has the numbers"
        drawn.append({"name": name.replace("_", " "), "caption": _caption(name, item), "svg": draw(svg, label, name)})
    return {
        "claims": [claim_line(row) for row in item["expect"]],
        "main": drawn[0],
        "more": drawn[1:],
        "facts": _facts(item),
        "points": _points(item),
        "has_table": entry["table"],
        "samples": entry["samples"],
        "extremes": _extremes(item),
    }


def _caption(name: str, item: Mapping[str, Any]) -> str:
    arm = item["arms"].get(name.removeprefix("members_"))
    return f"{arm['label']}: {CAPTIONS['members']}" if arm and name.startswith("members_") else CAPTIONS[name]


def claim_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of claims: the difference with its interval and p, and what was compared."""
    found = row["difference"]
    fine = found and found["low"] is not None and found["high"] - found["low"] < 0.1
    ours = with_interval(found, 3 if fine else 2, sign=True)
    if row.get("p") is not None:
        ours += ", p < 0.001" if row["p"] < 0.001 else f", p = {row['p']:.3f}"
    what = row.get("metric") or row.get("quantity") or ""
    one = row.get("arm") or row.get("condition")
    sides = f"{one} − {row['than']}" if row.get("than") is not None else str(one)
    part = f", {row['part']} KL" if row.get("part") in {"low", "high"} else ""
    return {
        "published": row.get("reported") or "–",
        "ours": ours,
        "detail": f"{str(what).replace('_', ' ')}: {sides}{part}",
        "about": [str(row[side]) for side in ("arm", "than") if row.get(side) is not None],
    } | {key: row[key] for key in ("claim", "source", "verdict", "reason")}


def _facts(item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tier, size and selection of the grid, and the reward of the reference between random and best answers."""
    seeds = ", ".join(map(str, item["seeds"]))
    facts = [("Tier", f"{item['tier']}; seeds {seeds}" if item["seeds"] else item["tier"])]
    if item["points"]:
        finished = sum(len(point["runs"]) for point in item["points"])
        planned = len(item["points"]) * len(item["seeds"])
        size = f"conditions {len(item['conditions'])}, arms {len(item['arms'])}, points {len(item['points'])}"
        facts.append(("Grid", f"{size}; runs finished {finished} of {planned}; answers per prompt {item['draws']}"))
    if item.get("select"):
        facts.append(("Selected by", f"{item['select']['metric'].replace('_', ' ')} on {item['select']['set']}"))
    for name, held in (item.get("reference") or {}).items():
        facts.append((f"SFT reference, {name}", _reference_text(held)))
    return facts


def _reference_text(held: Mapping[str, Any]) -> str:
    """The reference's reward, and its place between random words (0 %) and the oracle's best (100 %)."""
    text = f"reward {with_interval(held['reward'], 2)}"
    bounds = held.get("bounds")
    if not bounds:
        return text
    share = (held["reward"]["mean"] - bounds["random"]) / ((bounds["best"] - bounds["random"]) or 1.0)
    ends = f"random words {bounds['random']:.2f}, the oracle's best {bounds['best']:.2f}"
    written = f" (an answer written by the world's people: {bounds['written']:.2f})"
    return f"{text}; {ends}: {100 * share:.0f} % of the way{written}"


def _points(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of points over the sets they are compared on; of a long one the first rows, selected points first."""
    if not item["points"]:
        return None
    sets = shown_sets(item)
    rows = [(point, name) for point in item["points"] for name in sets]
    if len(rows) > SHOWN_POINTS:
        rows.sort(key=lambda row: not row[0]["selected"])
    scored = any((p["sets"].get(name) or {}).get("lc_win_rate") for p, name in rows)
    columns = [
        "Condition",
        "Arm",
        "Settings",
        *(["Set"] if len(sets) > 1 else []),
        "Selected",
        "Reward advantage",
        "Win rate %",
    ]
    columns += [*(["LC win rate %"] if scored else []), "KL (nats)", "Tokens"]
    shown = [_point_cells(item, point, name, len(sets) > 1, scored) for point, name in rows[:SHOWN_POINTS]]
    return {"columns": columns, "rows": shown, "total": len(rows), "texts": 4 if len(sets) == 1 else 5}


def _point_cells(
    item: Mapping[str, Any], point: Mapping[str, Any], name: str, several: bool, scored: bool
) -> list[str]:
    held = point["sets"].get(name) or {}
    settings = settings_label(item, point["settings"])
    numbers = [with_interval(held.get("advantage"), 2, sign=True), with_interval(held.get("win_rate"))]
    numbers += [with_interval(held.get("lc_win_rate"))] if scored else []
    numbers += [with_interval(held.get("kl")), with_interval(held.get("tokens"))]
    texts = [item["conditions"][point["condition"]]["label"], item["arms"][point["arm"]]["label"], settings or "–"]
    return [*texts, *([name] if several else []), "selected" if point["selected"] else "", *numbers]


def _extremes(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompts with the smallest and the largest weight of each condition of the histogram layout."""
    return [
        {
            "label": item["conditions"][condition]["label"],
            "rows": [{"end": end, **example} for end in ("lowest", "highest") for example in held.get(end) or []],
        }
        for condition, held in (item.get("weights") or {}).items()
    ]
