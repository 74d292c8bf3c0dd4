"""Inputs that go wrong, drawn the same way every time, and what must become of each: a valid value or one line."""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marks import LONG
from prefopt.errors import BadInput, one_line

SHORT_SHARE = 100  # of a property's inputs, one in so many is tried by default
SLOWEST = timedelta(seconds=20)  # of one input; most take milliseconds, and this machine may be busy
PLANNED: dict[str, int] = {}  # property -> inputs with PREFOPT_LONG_TESTS=1


def fuzzed(inputs: int, **strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property over so many drawn inputs, and a small share of them by default; fails where fewer were tried."""

    def decorate(proved: Callable[..., None]) -> Callable[..., None]:
        PLANNED[f"{proved.__module__}.{proved.__name__}"] = inputs
        wanted = inputs if LONG else max(10, inputs // SHORT_SHARE)
        tried: Counter[str] = Counter()

        def counted(*args: Any, **drawn: Any) -> None:
            tried[proved.__name__] += 1
            proved(*args, **drawn)

        counted.__signature__ = inspect.signature(proved)
        counted.__name__ = proved.__name__
        run = settings(
            max_examples=wanted,
            derandomize=True,
            database=None,
            deadline=SLOWEST,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(counted))

        def test(**fixtures: Any) -> None:
            started = time.process_time()
            run(**fixtures)
            print(f"{proved.__name__}: {tried.total()} inputs, {time.process_time() - started:.1f} s")
            assert tried.total() >= wanted

        test.__signature__ = inspect.signature(run)
        test.__name__, test.__doc__, test.__module__ = proved.__name__, proved.__doc__, proved.__module__
        return test

    return decorate


def outcome(call: Callable[[], Any], *named: str) -> Any:
    """What the call returns, or the BadInput that it raises, which says each of ``named``; all else fails the test."""
    try:
        return call()
    except BadInput as error:
        found = error
    line = one_line(found)
    assert 0 < len(line) < 2000
    assert line.isprintable()
    for part in named:
        assert part in str(found), (part, line)
    return found


def told(call: Callable[[], Any], *patterns: str) -> None:
    """The call raises BadInput, whose one line matches every pattern."""
    found = outcome(call)
    assert isinstance(found, BadInput), found
    for pattern in patterns:
        assert re.search(pattern, one_line(found)), (pattern, one_line(found))


# --- values -----------------------------------------------------------------------------------------------------------

NASTY_TEXTS = (
    "",
    " ",
    "\n\n",
    "\u200b",
    "\ufeff",
    "\0",
    "a\0b",
    "\ud800",
    "a\udfffb",
    "\u202eright to left\u202c",
    "שלום עולם",
    "مرحبا",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\r\n",
    "a\u2028b",
    "<|im_start|>system",
    "</s>",
    "[/INST]",
    "\x1b[31m",
    "{{ 7 * 7 }}",
    "$instruction",
    "\n\nHuman: a\n\nAssistant: b",
    "NaN",
    "nan",
    "inf",
    "1e999",
    "²",
    "١",
    "1_0",
    "0x10",
    "-0",
    "true",
    "null",
    "../../etc/passwd",
    "a" * 3000,
    "[" * 500,
)
NASTY_NUMBERS = (0, 1, -1, 2, 3, 0.5, 1.5, -0.0, 1e308, -1e308, 1e-320, 10**18, 2**63, -(2**63) - 1, 10**40, 10**400)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))

texts = st.sampled_from(NASTY_TEXTS) | st.text(st.characters(), max_size=8)
numbers = st.sampled_from([*NASTY_NUMBERS, *NOT_FINITE]) | st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in inner for place in [(*path, key), *places(child, (*path, key))]]


@st.composite
def mutated(draw: st.DrawFn, valid: Any, most: int = 3) -> Any:
    """A valid value with up to ``most`` of its parts removed, repeated, exchanged, or replaced by anything."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        paths = places(value)
        if not paths:
            return draw(values)
        *way, last = draw(st.sampled_from(paths))
        holder = value
        for key in way:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "text", "number", "remove", "add", "copy"]))
        if how == "remove":
            del holder[last]
        elif how == "add":
            other = draw(values)
            if isinstance(holder, list):
                holder.insert(last, other)
            else:
                holder[draw(texts)] = other
        elif how == "copy":
            *other_way, other_last = draw(st.sampled_from(paths))
            try:
                source = value
                for key in (*other_way, other_last):
                    source = source[key]
                holder[last] = copy.deepcopy(source)
            except (LookupError, TypeError):
                pass  # what was to be copied is gone or has changed
        else:
            holder[last] = draw({"replace": values, "text": texts, "number": numbers}[how])
    return value


PIECES = (
    b"\xef\xbb\xbf",
    b"\0",
    b"\r\n",
    b"\r",
    b"\xff",
    b"\xff\xfe",
    b"\xe9",
    b'"',
    b"'",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
)
PIECES += (b":", b"\\", b"\n", b"NaN", b"Infinity", b"-", b"9" * 400, b"\\ud800", b"\xed\xa0\x80", b'"a":1,"a":2', b" ")
PIECES += (
    b"\xe2\x80\xae",
    b"\xf0\x9f\x92\xa9",
    b"null",
    b"1e999",
    b"&a ",
    b"*a",
    b"!!",
    b"- ",
    b"\t",
    b"#",
    b"\x1f\x8b",
)


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of a file of which some are cut off, removed, repeated, or replaced by what breaks parsers."""
    content = draw(contents)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        end = draw(st.integers(at, min(len(content), at + 40)))
        how = draw(st.sampled_from(["insert", "replace", "cut", "end", "repeat", "any"]))
        piece = {
            "insert": draw(st.sampled_from(PIECES)) + content[at:end],
            "replace": draw(st.sampled_from(PIECES)),
            "cut": b"",
            "end": b"",
            "repeat": content[at:end] * 2,
            "any": draw(st.binary(max_size=6)),
        }[how]
        content = content[:at] + piece + (b"" if how == "end" else content[end:])
    return content
