"""Two versions of the items as one self-contained HTML page: verdicts, changed specs, numbers with both intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.evaluation.items import with_interval
from prefopt.reporting.web import environment

_WIDTH, _MARGIN = 180.0, 6.0
_MISSING = "not there"


def render_versions(compared: Mapping[str, Any]) -> str:
    """The page for what ``versions.compare_versions`` returned; the same content gives the same page.

    Intervals of one metric of an item share one scale. All text from outside is escaped.
    """
    templates = environment()
    sections = [_section(entry, number) for number, entry in enumerate(compared["items"])]
    return templates.get_template("versions.html.j2").render(
        a=compared["a"],
        b=compared["b"],
        sections=sections,
        differing=[section for section in sections if not section["same"]],
        missing=_MISSING,
    )


def _section(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    scales = _scales(entry["numbers"])
    rows = [_row(row, scales[_metric(row["address"])]) for row in entry["numbers"]]
    return {
        "anchor": f"item-{number}",
        "name": entry["item"],
        "same": entry["same"],
        "verdicts": [verdict or _MISSING for verdict in entry["verdicts"]],
        "changed": [{key: _MISSING if text is None else text for key, text in row.items()} for row in entry["changed"]],
        "moved": [row for row in rows if not row["equal"]],
        "equal": [row for row in rows if row["equal"]],
        "apart": sum(row["apart"] is True for row in entry["numbers"]),
    }


def _metric(address: str) -> str:
    return address.rsplit("/", 1)[-1]


def _scales(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Metric -> the lowest and the highest limit on either side; claims and quantities stand for themselves."""
    limits: dict[str, list[float]] = {}
    for row in rows:
        found = limits.setdefault(_metric(row["address"]), [])
        found += [side[key] for side in (row["a"], row["b"]) if side for key in side if side[key] is not None]
    return {metric: (min(values), max(values)) if values else (0.0, 0.0) for metric, values in limits.items()}


def _row(row: Mapping[str, Any], scale: tuple[float, float]) -> dict[str, Any]:
    low, high = scale
    per_unit = (_WIDTH - 2 * _MARGIN) / (high - low) if high > low else 0.0

    def place(value: float) -> float:
        return round(_MARGIN + (value - low) * per_unit, 2) if per_unit else _WIDTH / 2

    return {
        "address": row["address"],
        "texts": [with_interval(row[side], 3) for side in ("a", "b")],
        "remark": _remark(row),
        "equal": row["a"] == row["b"],
        "marks": [_mark(row[side], place) for side in ("a", "b")],
        "zero": place(0.0) if low < 0 < high else None,
    }


def _remark(row: Mapping[str, Any]) -> str:
    if row["a"] == row["b"]:
        return "equal"
    return {True: "apart", False: "not apart", None: "–"}[row["apart"]]


def _mark(value: Mapping[str, Any] | None, place: Any) -> dict[str, float] | None:
    """Places of mean and limits on the scale; None where that side has no number."""
    if not value or value["mean"] is None:
        return None
    limits = {key: value["mean"] if value[key] is None else value[key] for key in ("low", "high")}
    return {key: place(number) for key, number in {"mean": value["mean"], **limits}.items()}
