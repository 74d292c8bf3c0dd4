"""table.csv and table.md of a grid item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from prefopt.evaluation.items import pipe_table, with_interval

Item = Mapping[str, Any]

# column of the table -> metric of item.json, digits, whether the sign is shown
_COLUMNS = {
    "reward": ("reward", 2, False),
    "advantage": ("advantage", 2, True),
    "win rate %": ("win_rate", 1, False),
    "length-controlled win rate %": ("lc_win_rate", 1, False),
    "KL": ("kl", 2, False),
    "tokens": ("tokens", 1, False),
    "positive": ("score_positive", 3, False),
}


def table(item: Item) -> pd.DataFrame:
    """One row per point and set, or per condition of a histogram: numbers as text with their intervals."""
    return _weights_table(item) if item["layout"] == "histogram" else _points_table(item, only_selected=False)


def _points_table(item: Item, only_selected: bool) -> pd.DataFrame:
    chosen = [p for p in item["points"] if p["sets"] and (p["selected"] or not only_selected)]
    rows = [_row(item, point, name) for point in chosen for name in item["sets"] if name in point["sets"]]
    columns = ["condition", "arm", "settings", "selected", "set", "seeds", *_COLUMNS]
    frame = pd.DataFrame(rows, columns=columns)
    if only_selected:
        frame = frame.drop(columns=["selected", *(c for c in _COLUMNS if (frame[c] == "–").all())])
    return frame


def _row(item: Item, point: Mapping[str, Any], name: str) -> dict[str, Any]:
    measured = point["sets"][name]
    return {
        "condition": item["conditions"][point["condition"]]["label"],
        "arm": _arm_text(item, point["arm"]),
        "settings": settings_text(point["settings"]),
        "selected": "yes" if point["selected"] else "no",
        "set": name,
        "seeds": len(point["runs"]),
        **{
            column: with_interval(measured[metric], digits, sign) for column, (metric, digits, sign) in _COLUMNS.items()
        },
    }


def _arm_text(item: Item, arm: str) -> str:
    declared = item["arms"][arm]
    return f"{declared['label']} (control)" if declared["control"] else declared["label"]


def settings_text(settings: Mapping[str, Any]) -> str:
    """``beta 0.1, learning_rate 0.0003``."""
    numbers = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in numbers.items()) or "–"


def _weights_table(item: Item) -> pd.DataFrame:
    rows = [
        {
            "condition": item["conditions"][name]["label"],
            "pairs": found["pairs"],
            **{key: _number(found[key]) for key in ("phi_star", "mean", "sd", "skewness")},
            "closed - open": _number(found["closed_minus_open"]),
            "AUROC of closed": _number(found["auroc_closed"]),
        }
        for name, found in item["weights"].items()
    ]
    return pd.DataFrame(rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def markdown(item: Item) -> str:
    """Selected points (or weights) and claims as a Markdown text, for reading in a terminal or a repository."""
    shown = _weights_table(item) if item["layout"] == "histogram" else _points_table(item, only_selected=True)
    claims = [
        {
            "claim": row["claim"],
            "reported": row.get("reported") or "–",
            "difference": with_interval(row["difference"], 3, sign=True),
            "p": "–" if row["p"] is None else f"{row['p']:.2g}",
            "verdict": row["verdict"],
            "reason": row["reason"],
        }
        for row in item["expect"]
    ]
    parts = [f"# {item['title']}", f"Scale {item['scale']}, {item['tier']} grid: **{item['verdict']}**"]
    if len(shown):
        parts.append(pipe_table(shown))
    if claims:
        parts.append(pipe_table(pd.DataFrame(claims)))
    note = [item["note"]] if item["note"] else []
    return "\n\n".join([*parts, *note, f"{item['method']}."]) + "\n"
