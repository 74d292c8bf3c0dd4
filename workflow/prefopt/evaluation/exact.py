"""From the numbers of a study to one exact paper item: reported beside reproduced, with a verdict per claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from prefopt.errors import BadInput, nearest
from prefopt.evaluation.items import DIRECTION_ONLY, NO_CLAIM, NOT_REPRODUCED, REPRODUCED, pipe_table

HOLDS = (REPRODUCED, DIRECTION_ONLY)


def is_of_numbers(item: Mapping[str, Any]) -> bool:
    """Whether an item's content is a study's numbers with claims about them, at whatever scale they were measured."""
    return "exact" in (item["scale"], item.get("kind"))


def collect_exact(spec: Mapping[str, Any], values: Mapping[str, float], artifact: str) -> dict[str, Any]:
    """The content of ``item.json`` for one exact item.

    ``spec`` is the item node's: item (head), study (name, params), expect. ``values`` are the study's numbers and
    ``artifact`` is the study's stage/id. Where they were measured on small models, a claim that holds is a direction.

    Raises BadInput where a claim names a value that the study does not have.
    """
    rows = [judge(row, values) for row in spec["expect"]]
    holds = REPRODUCED if spec["item"]["scale"] in ("exact", "paper") else DIRECTION_ONLY
    rows = [row | {"verdict": holds if row["verdict"] == REPRODUCED else row["verdict"]} for row in rows]
    verdicts = {row["verdict"] for row in rows}
    verdict = NO_CLAIM if not rows else NOT_REPRODUCED if NOT_REPRODUCED in verdicts else holds
    study = {**spec["study"], "artifact": artifact}
    return {**spec["item"], "verdict": verdict, "expect": rows, "study": study}


def judge(row: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """One declared claim with the study's number, the difference and the verdict.

    A reported number is reproduced where ``|value - reported| <= tolerance``; an ordering where the value, or the low
    limit of its interval, lies above the other number.
    """
    ours = _number(row["value"], values)
    if "above" not in row:
        difference = ours - row["reported"]
        limits, above, holds = None, None, abs(difference) <= row["tolerance"]
    else:
        above = _number(row["above"], values)
        difference = ours - above
        limits = [_number(name, values) for name in row["interval"]] if row["interval"] else None
        holds = (limits[0] if limits else ours) > above
    return {
        "claim": row["claim"],
        "quantity": row["value"],
        "value": ours,
        "interval": limits,
        "reported": row.get("reported"),
        "above": above,
        "tolerance": row.get("tolerance"),
        "difference": difference,
        "source": row["source"],
        "verdict": REPRODUCED if holds else NOT_REPRODUCED,
    }


def _number(name: str | float, values: Mapping[str, float]) -> float:
    if not isinstance(name, str):
        return float(name)
    if name not in values:
        raise BadInput(f"expect: the study has no value '{name}'; {nearest(name, values)}")
    return float(values[name])


def digits(value: float | None) -> str:
    """A number with six significant digits; a dash for none."""
    return "–" if value is None else f"{value:.6g}"


def reported_text(row: Mapping[str, Any]) -> str:
    """What the claim asks for: the reported number, or the number that ours has to lie above."""
    return digits(row["reported"]) if row["above"] is None else f"above {digits(row['above'])}"


def value_text(row: Mapping[str, Any]) -> str:
    """Our number, with its interval where it was sampled."""
    limits = f" [{', '.join(map(digits, row['interval']))}]" if row["interval"] else ""
    return digits(row["value"]) + limits


def claim_lines(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines of the report's table of claims: those that do not hold first, since an exact item has many."""
    lines = [
        {
            "published": reported_text(row),
            "ours": value_text(row),
            "detail": _distance(row),
            "about": [],
            "reason": "",
        }
        | {key: row[key] for key in ("claim", "source", "verdict")}
        for row in item["expect"]
    ]
    return sorted(lines, key=lambda line: line["verdict"] in HOLDS)


def _distance(row: Mapping[str, Any]) -> str:
    allowed = f", tolerance {digits(row['tolerance'])}" if row["tolerance"] is not None else ""
    return f"{row['quantity'].replace('_', ' ')}: difference {row['difference']:+.3g}{allowed}"


def table(item: Mapping[str, Any]) -> pd.DataFrame:
    """One row per claim in declared order, numbers as text with six significant digits."""
    columns = ["claim", "reported", "reproduced", "difference", "tolerance", "verdict", "source"]
    rows = [
        {
            "claim": row["claim"],
            "reported": reported_text(row),
            "reproduced": value_text(row),
            "difference": f"{row['difference']:+.3g}",
            "tolerance": digits(row["tolerance"]),
            "verdict": row["verdict"],
            "source": row["source"],
        }
        for row in item["expect"]
    ]
    return pd.DataFrame(rows, columns=columns)


def markdown(item: Mapping[str, Any]) -> str:
    """The claims as a Markdown text, for reading in a terminal or a repository."""
    parts = [f"# {item['title']}", f"Scale {item['scale']}: **{item['verdict']}**", pipe_table(table(item))]
    params = ", ".join(f"{name} {value}" for name, value in item["study"]["params"].items())
    note = [item["note"]] if item["note"] else []
    return "\n\n".join([*parts, *note, f"Study `{item['study']['name']}`: {params or 'no parameters'}."]) + "\n"
