"""Two versions of the papers' items side by side: numbers with intervals, and what changed in their declarations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prefopt.digests import canonical_json
from prefopt.errors import BadInput
from prefopt.evaluation.items import with_interval
from prefopt.files import read_json
from prefopt.reporting.addresses import claimed, item_numbers
from prefopt.reporting.exports import INDEX
from prefopt.reporting.revisions import file_at, git
from prefopt.store.inventory import artifacts

_NAMED = ("datasets", "models", "judges")


@dataclass(frozen=True)
class Version:
    """The items of one side: paper/name -> item.json, and what was declared for each, as flat keys."""

    label: str
    items: Mapping[str, Mapping[str, Any]]
    declared: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def at_revision(checkout: Path, revision: str, exported: str) -> Version:
    """The exported items (``exported`` below the checkout) and declarations of a git revision; ``.`` is what lies here.

    Raises BadInput for an unknown revision and for one without exported results.
    """
    commit = "the working tree"
    if revision != ".":
        try:
            commit = git(checkout, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()[:12]
        except BadInput:
            raise BadInput(
                f"'{revision}' is no git revision; give a commit, a branch, a tag, or . for what is here"
            ) from None
    index = file_at(checkout, revision, f"{exported}/{INDEX}")
    if index is None:
        raise BadInput(f"{revision}: no {exported}/{INDEX}; run `python -m prefopt export`, commit what it wrote")
    names = [entry["item"] for entry in json.loads(index)]
    texts = {name: file_at(checkout, revision, f"{exported}/{name}/item.json") for name in names}
    items = {name: json.loads(text) for name, text in texts.items() if text is not None}
    label = f"{revision} ({commit})" if revision != "." else commit
    return Version(label, items, {name: _declaration(checkout, revision, name) for name in items})


def _declaration(checkout: Path, revision: str, name: str) -> dict[str, str]:
    """The item's YAML file, and the entries of datasets.yaml, models.yaml and judges.yaml that it names."""
    import yaml

    text = file_at(checkout, revision, f"config/experiments/{name}.yaml")
    if text is None:
        return {}
    content = yaml.safe_load(text)
    named = {value for _, value in _leaves(content)}
    flat = dict(_leaves(content))
    for library in _NAMED:
        entries = yaml.safe_load(file_at(checkout, revision, f"config/{library}.yaml") or "") or {}
        used = {key: value for key, value in entries.items() if key in named}
        flat |= dict(_leaves(used, f"{library}."))
    return flat


def in_results(results: Path) -> Version:
    """The finished items of a results folder, of several of one name the last made; specs are those of all artifacts
    below an item, counted where many changed alike.
    """
    manifests = {ref: manifest for ref, manifest in artifacts(results).items() if manifest}
    found: dict[str, str] = {}
    for ref in sorted((r for r in manifests if r.startswith("papers/")), key=lambda r: manifests[r]["finished"]):
        head = manifests[ref]["spec"]["item"]
        found[f"{head['paper']}/{head['name']}"] = ref
    if not found:
        raise BadInput(f"{results}: no finished item in there")
    items = {name: read_json(results / ref / "item.json") for name, ref in found.items()}
    return Version(str(results), items, {name: _specs(manifests, ref) for name, ref in found.items()})


def _specs(manifests: Mapping[str, Mapping[str, Any]], ref: str) -> dict[str, str]:
    """Specs of an item and of everything below it: ``stage.key`` -> the values that occur, with their counts."""
    values: dict[str, Counter[str]] = {}
    seen, stack = {ref}, [ref]
    while stack:
        manifest = manifests.get(stack.pop())
        if manifest is None:
            continue
        stage = manifest["stage"].split("/")[0]
        prefix = "" if stage == "papers" else f"{stage}."
        for key, value in _leaves(manifest["spec"]):
            values.setdefault(prefix + key, Counter())[value] += 1
        fresh = set(manifest["parents"].values()) - seen
        seen |= fresh
        stack += sorted(fresh)
    return {key: _counted(counts) for key, counts in values.items()}


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count}x)" for value, count in sorted(counts.items()))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of everything in nested mappings and lists of mappings."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}{key}.")
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for place, inner in enumerate(value, start=1):
            yield from _leaves(inner, f"{prefix}{place}.")
    else:
        yield prefix.rstrip("."), value if isinstance(value, str) else canonical_json(value)


def compare_versions(
    one: Version, other: Version, patterns: Sequence[str] = ("*",), metrics: Sequence[str] | None = None
) -> dict[str, Any]:
    """Per item of either side: verdicts, declared values that differ, and its numbers from both.

    ``metrics``: which to compare, by default those that the item's claims name. A row has the address, both values and
    ``apart``, true where the intervals do not overlap.
    """
    names = [n for n in sorted({*one.items, *other.items}) if any(fnmatch(n, pattern) for pattern in patterns)]
    if not names:
        raise BadInput(f"no item {', '.join(patterns)} on either side; there are {', '.join(sorted(one.items))}")
    return {
        "a": one.label,
        "b": other.label,
        "items": [_compared(name, one, other, metrics) for name in names],
    }


def _compared(name: str, one: Version, other: Version, metrics: Sequence[str] | None) -> dict[str, Any]:
    items = [version.items.get(name) for version in (one, other)]
    declared = [version.declared.get(name, {}) for version in (one, other)]
    numbers = [_chosen(item, metrics) if item else {} for item in items]
    rows = []
    for address in dict.fromkeys([*numbers[0], *numbers[1]]):
        a, b = (side.get(address) for side in numbers)
        rows.append({"address": address, "a": a, "b": b, "apart": _apart(a, b)})
    changed = [
        {"key": key, "a": declared[0].get(key), "b": declared[1].get(key)}
        for key in (dict.fromkeys([*declared[0], *declared[1]]) if all(items) else ())
        if declared[0].get(key) != declared[1].get(key)
    ]
    verdicts = [item["verdict"] if item else None for item in items]
    same = all(items) and not changed and verdicts[0] == verdicts[1] and all(row["a"] == row["b"] for row in rows)
    return {"item": name, "verdicts": verdicts, "changed": changed, "numbers": rows, "same": same}


def _chosen(item: Mapping[str, Any], metrics: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    if metrics is None:
        found = claimed(item)
    else:
        found = {a: n for a, n in item_numbers(item).items() if a.rsplit("/", 1)[-1] in metrics or "/" not in a}
    return {address: {key: number.value[key] for key in ("mean", "low", "high")} for address, number in found.items()}


def _apart(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> bool | None:
    """Whether two intervals share no value; None where one side has none."""
    if not a or not b or a["low"] is None or b["low"] is None:
        return None
    return a["high"] < b["low"] or b["high"] < a["low"]


def as_text(compared: Mapping[str, Any]) -> str:
    """What ``compare_versions`` returned, for a terminal; items without a difference are one line."""
    lines = [f"A: {compared['a']}", f"B: {compared['b']}"]
    same = [entry["item"] for entry in compared["items"] if entry["same"]]
    for entry in compared["items"]:
        if not entry["same"]:
            lines += ["", *_item_lines(entry)]
    if same:
        lines += ["", f"the same in both: {', '.join(same)}"]
    return "\n".join(lines)


def _item_lines(entry: Mapping[str, Any]) -> Iterator[str]:
    one, other = (verdict or "not there" for verdict in entry["verdicts"])
    yield f"{entry['item']}: {one if one == other else f'{one} -> {other}'}"
    for row in entry["changed"]:
        a, b = ("absent" if row[side] is None else row[side] for side in ("a", "b"))
        yield f"  declared  {row['key']}: {_short(a)} -> {_short(b)}"
    rows = [row for row in entry["numbers"] if row["a"] != row["b"]]
    if not rows:
        yield "  numbers   all the same"
        return
    cells = [(row["address"], _cell(row["a"]), _cell(row["b"]), _remark(row)) for row in rows]
    heads = ("number", "A", "B", "")
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(3)]
    for line in [heads, *cells]:
        padded = "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False))
        yield f"  {padded}  {line[3]}".rstrip()
    equal = len(entry["numbers"]) - len(rows)
    if equal:
        yield f"  and {equal} numbers the same in both"


def _cell(value: Mapping[str, Any] | None) -> str:
    return with_interval(value, 3) if value else "-"


def _remark(row: Mapping[str, Any]) -> str:
    return "intervals apart" if row["apart"] else ""


def _short(text: str, length: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"
