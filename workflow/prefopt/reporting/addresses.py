"""The numbers of a finished item by address, so that report, MLflow, DVC and comparisons call each by one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.errors import BadInput, nearest
from prefopt.evaluation.exact import is_of_numbers


@dataclass(frozen=True)
class Number:
    """One number of an item: where it stands, mean and limits, and the artifacts it was computed from."""

    address: str
    value: Mapping[str, Any]  # mean, low, high; the limits are None where the value holds by definition
    sources: tuple[str, ...]  # stage/id


def kind_of(item: Mapping[str, Any]) -> str:
    """exact, grid or arms: which of the three forms an item's content has."""
    return "exact" if is_of_numbers(item) else item.get("kind", "arms")


def item_numbers(item: Mapping[str, Any]) -> dict[str, Number]:
    """Every number of ``item.json`` by address, in the item's order.

    ``<arm>/<metric>`` in an item with arms, ``<arm>/<condition>/<set>/<metric>`` for the selected points of a grid,
    ``claim<n>`` for the difference of the n-th claim, and the quantity's own name in an exact item.
    """
    found = {"exact": _exact, "grid": _grid, "arms": _arms}[kind_of(item)](item)
    return {number.address: number for number in found}


def _arms(item: Mapping[str, Any]) -> Iterator[Number]:
    sources = {name: _runs(arm) for name, arm in item["arms"].items()}
    for name, arm in item["arms"].items():
        for metric, value in arm["summary"].items():
            yield Number(f"{name}/{metric}", value, sources[name])
    yield from _claims(item, sources)


def _runs(arm: Mapping[str, Any]) -> tuple[str, ...]:
    """Policies and metrics of all seeds of an arm."""
    return tuple(run[key] for run in arm["seeds"].values() for key in ("policy", "metrics") if run[key])


def _grid(item: Mapping[str, Any]) -> Iterator[Number]:
    sources: dict[str, tuple[str, ...]] = {}
    for point in item["points"]:
        if not point["selected"]:
            continue
        runs = tuple(point["runs"].values())
        sources[point["arm"]] = (*sources.get(point["arm"], ()), *runs)
        for name, metrics in point["sets"].items():
            for metric, value in metrics.items():
                if value is not None and "mean" in value:  # the spread over draws has metrics of its own, and no limits
                    yield Number(f"{point['arm']}/{point['condition']}/{name}/{metric}", value, runs)
    yield from _claims(item, sources)


def _claims(item: Mapping[str, Any], sources: Mapping[str, tuple[str, ...]]) -> Iterator[Number]:
    for place, row in enumerate(item["expect"], start=1):
        if row["difference"] is not None:
            behind = [ref for side in ("arm", "than") for ref in sources.get(str(row.get(side)), ())]
            yield Number(f"claim{place}", row["difference"], tuple(dict.fromkeys(behind)))


def _exact(item: Mapping[str, Any]) -> Iterator[Number]:
    for row in item["expect"]:
        low, high = row["interval"] or (None, None)
        yield Number(row["quantity"], {"mean": row["value"], "low": low, "high": high}, (item["study"]["artifact"],))


def find_numbers(item: Mapping[str, Any], wanted: str) -> list[Number]:
    """Numbers whose address has the parts of ``wanted`` in this order; all of them for the empty text.

    Raises BadInput, with the nearest name, where there is none.
    """
    numbers = item_numbers(item)
    parts = wanted.split("/") if wanted else []
    found = [number for address, number in numbers.items() if _in_order(parts, address.split("/"))]
    if not found:
        known = {part for address in numbers for part in address.split("/")}
        unknown = next((part for part in parts if part not in known), parts[-1])
        raise BadInput(f"{item['paper']}/{item['name']}: no number '{wanted}'; '{unknown}': {nearest(unknown, known)}")
    return found


def _in_order(parts: Sequence[str], address: Sequence[str]) -> bool:
    rest = iter(address)
    return all(part in rest for part in parts)


def claimed(item: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers that the item's claims are about: of each arm the metrics they name, and the claims themselves."""
    metrics = {row["metric"] for row in item["expect"] if row.get("metric")}
    return {
        address: number
        for address, number in item_numbers(item).items()
        if "/" not in address or not metrics or address.rsplit("/", 1)[-1] in metrics
    }
