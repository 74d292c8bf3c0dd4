"""JSON as this project takes it from outside: no key twice, no depth that no file of ours has."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100
_TOO_DEEP = f"nested more than {DEEPEST} levels deep"


def parsed_json(text: str | bytes, *, finite: bool = False) -> Any:
    """The content of a JSON text; ``finite``: NaN and Infinity, which Python reads and JSON does not know, are refused.

    Raises ValueError for what is no JSON, for a key that stands twice in an object, and for more than DEEPEST levels.
    """
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse if finite else None)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _brackets(text) > DEEPEST:  # fewer cannot be nested deeper, and this is fast
        _check_depth(content)
    return content


def _brackets(text: str | bytes) -> int:
    if isinstance(text, bytes):
        return text.count(b"[") + text.count(b"{")
    return text.count("[") + text.count("{")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.60} stands twice")
            seen.add(key)
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST + 1):
        level = [inner for value in level if isinstance(value, dict | list) for inner in _inside(value)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inside(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value
