"""Arms ranked by their reward at equal sequence KL with one of them, and what their runs cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from prefopt.evaluation.items import pipe_table, with_interval

Item = Mapping[str, Any]


def matched_rows(item: Item, cpu_seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """The frontier claims of a ranking, per condition the largest difference first, those that were not run last.

    ``cpu_seconds``: arm -> mean of its runs. Empty for other layouts, and where no claim compares at equal KL.
    """
    claims = [row for row in item["expect"] if row["kind"] == "frontier"] if item["layout"] == "ranking" else []
    rows = [
        {
            "conditions": list(row.get("conditions") or item["conditions"]),
            "arm": row["arm"],
            "than": row["than"],
            "difference": row["difference"],
            "cpu_seconds": cpu_seconds.get(row["arm"]),
        }
        for row in claims
        if row["arm"] in item["arms"]
    ]
    order = {name: place for place, name in enumerate(item["conditions"])}

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        found = row["difference"]
        return [order.get(name, len(order)) for name in row["conditions"]], -found["mean"] if found else float("inf")

    return sorted(rows, key=place)


def matched_markdown(item: Item, rows: Sequence[Mapping[str, Any]]) -> str:
    """The ranking as a section of table.md; nothing without rows."""
    if not rows:
        return ""
    table = pd.DataFrame(
        {
            "condition": ", ".join(item["conditions"][n]["label"] for n in row["conditions"] if n in item["conditions"])
            or "not run",
            "arm": item["arms"][row["arm"]]["label"],
            "reward at equal KL": with_interval(row["difference"], 2, sign=True),
            "CPU seconds per run": "–" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.1f}",
        }
        for row in rows
    )
    base = item["arms"][rows[0]["than"]]["label"]
    return f"\n## At equal KL, minus {base}\n\n{pipe_table(table)}\n"
