"""YAML as this project takes it: safe, no key twice, and of a size that can be walked through."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

DEEPEST = 100  # libyaml builds what it reads by recursion, and ends the process some ten thousand levels down
LARGEST = 1_000_000  # values, counted wherever an alias repeats them

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster, where it was built in
_BAD_VALUE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)  # what constructors let through


class _Loader(_SafeLoader):
    """Safe YAML with three repairs: 1e-4 is a number, a key that stands twice and a value that is none are errors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _BAD_VALUE:
            kind = node.tag.rsplit(":", 1)[-1]
            raise _error(f"{str(node.value)[:40]!r} is no {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return super().construct_mapping(node, deep)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _error("a key that is a list or mapping", key_node.start_mark)
            if key in seen:
                raise _error(f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parsed_yaml(text: str) -> Any:
    """The content of a YAML text; aliases are the same object wherever they stand.

    Raises yaml.YAMLError for what is no YAML, a key that stands twice, more than DEEPEST levels, an alias of what it
    is in, and more than LARGEST values.
    """
    if 2 * max(map(len, text.splitlines()), default=0) + text.count("[") + text.count("{") > DEEPEST:
        _check_depth(text)
    content = yaml.load(text, Loader=_Loader)
    if _size(content, {}) > LARGEST:
        raise _error(f"more than {LARGEST} values, by aliases of aliases")
    return content


def _error(problem: str, mark: Any = None) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _error(f"nested more than {DEEPEST} levels deep", event.start_mark)


def _size(value: Any, sizes: dict[int, int]) -> int:
    """Values in ``value``; ``sizes`` by identity, 0 for those that are being counted."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if sizes.get(id(value)) == 0:
        raise _error("an alias of what it stands in")
    if id(value) not in sizes:
        sizes[id(value)] = 0
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(part, sizes) for part in inner)
    return sizes[id(value)]
