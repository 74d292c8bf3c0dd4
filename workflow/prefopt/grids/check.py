"""Claims of a grid item checked against its grid before anything runs: names, sets, settings, and what can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prefopt.errors import BadInput, nearest

REFERENCE = "reference"
Row = Mapping[str, Any]
Grid = Mapping[str, Any]


def check_claims(spec: Mapping[str, Any]) -> None:
    """Raise BadInput, naming the claim, where ``expect`` asks for something that the item's grid does not have.

    ``spec`` is the item node's: ``grid`` and ``expect``.
    """
    grid = spec["grid"]
    for row in spec["expect"]:
        if (row["kind"] == "weights") != (grid["layout"] == "histogram"):
            raise _bad(row, f"kind '{row['kind']}' does not go with the layout '{grid['layout']}'")
        _CHECKS[row["kind"]](grid, row)


def _bad(row: Row, what: str) -> BadInput:
    return BadInput(f"expect: claim '{row['claim']}': {what}")


def _known(row: Row, what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise _bad(row, f"no {what} '{name}'; {nearest(name, known)}")


def _check_compare(grid: Grid, row: Row) -> None:
    if row.get("sign") == "equal" and not row.get("margin"):
        raise _bad(row, "sign 'equal' needs a margin above 0")
    _known(row, "set", row["set"], grid["sets"])
    sides = _sides(grid, row)
    conditions = _conditions(grid, row, sides)
    for side, arm in sides.items():
        _check_at(grid, row, side, arm, conditions)


def _check_frontier(grid: Grid, row: Row) -> None:
    if len(grid["at"]) < 2:
        raise _bad(row, "a frontier needs answers at two or more fractions of the run; declare evaluate.at")
    _known(row, "arm with a training curve", str(row["than"]), grid["arms"])
    _check_compare(grid, row)


def _check_trend(grid: Grid, row: Row) -> None:
    _known(row, "set", row["set"], grid["sets"])
    sides = _sides(grid, row)
    if ("than" in sides or row.get("than") == REFERENCE) != (row["quantity"] == "gap"):
        raise _bad(row, "'gap' needs a 'than', and no other quantity takes one")
    conditions = [c for c in _conditions(grid, row, sides) if grid["conditions"][c]["value"] is not None]
    if len({grid["conditions"][c]["value"] for c in conditions}) < 2:
        raise _bad(row, f"a trend needs two conditions with different values; {row['arm']} has {len(conditions)}")
    for side, arm in sides.items():
        _check_at(grid, row, side, arm, conditions)
    if row["quantity"].startswith("selected."):
        setting = row["quantity"].removeprefix("selected.")
        if grid["select"] is None:
            raise _bad(row, "nothing is selected in this grid; declare evaluate.select")
        for point in _points(grid, row["arm"], conditions):
            _known(row, f"setting of {row['arm']}", setting, point["settings"])
            value = point["settings"][setting]
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise _bad(row, f"'{setting}' is {value!r}; the trend of its logarithm needs numbers above 0")
    if row["quantity"] == "member_bias" and grid["arms"][row["arm"]]["member_bias"] is None:
        raise _bad(row, f"{row['arm']} chooses no members of known bias")


def _check_weights(grid: Grid, row: Row) -> None:
    _known(row, "condition", row["condition"], grid["conditions"])
    if isinstance(row["than"], str):
        _known(row, "condition", row["than"], grid["conditions"])


def _sides(grid: Grid, row: Row) -> dict[str, str]:
    """The sides of a claim that are arms."""
    _known(row, "arm", row["arm"], grid["arms"])
    sides = {"arm": row["arm"]}
    if isinstance(row.get("than"), str) and row["than"] != REFERENCE:
        _known(row, "arm", row["than"], [*grid["arms"], REFERENCE])
        sides["than"] = row["than"]
    return sides


def _conditions(grid: Grid, row: Row, sides: Mapping[str, str]) -> list[str]:
    """The claim's conditions, or all in which every side has points."""
    shared = [c for c in grid["conditions"] if all(_points(grid, arm, [c]) for arm in sides.values())]
    for name in row.get("conditions") or []:
        _known(row, "condition", name, grid["conditions"])
        if name not in shared:
            raise _bad(row, f"{' and '.join(sides.values())} do not both run in the condition '{name}'")
    if not shared:
        raise _bad(row, f"{' and '.join(sides.values())} share no condition")
    return row.get("conditions") or shared


def _points(grid: Grid, arm: str, conditions: Iterable[str]) -> list[Mapping[str, Any]]:
    wanted = set(conditions)
    return [p for p in grid["points"] if p["arm"] == arm and p["condition"] in wanted]


def _check_at(grid: Grid, row: Row, side: str, arm: str, conditions: Iterable[str]) -> None:
    """Whether ``arm_at`` or ``than_at`` means a point in every condition."""
    at = row.get(f"{side}_at", "selected")
    for condition in conditions:
        points = _points(grid, arm, [condition])
        if at == "selected" and len(points) > 1 and grid["select"] is None:
            count = f"{arm} has {len(points)} points in {condition} and nothing selects one"
            raise _bad(row, f"{count}; give {side}_at or declare evaluate.select")
        if isinstance(at, Mapping):
            for setting in at:
                _known(row, f"setting of {arm}", setting, points[0]["settings"])
            if not any(at.items() <= p["settings"].items() for p in points):
                text = ", ".join(f"{key} {value}" for key, value in at.items())
                raise _bad(row, f"{arm} has no point in {condition} with {text}")


_CHECKS: dict[str, Callable[[Grid, Row], None]] = {
    "compare": _check_compare,
    "frontier": _check_frontier,
    "trend": _check_trend,
    "weights": _check_weights,
}
