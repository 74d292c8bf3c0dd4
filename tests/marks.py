"""Marks that tests of several folders share."""

from __future__ import annotations

import os

import pytest

LONG = bool(os.environ.get("PREFOPT_LONG_TESTS"))


def long(takes: str) -> pytest.MarkDecorator:
    """Run where PREFOPT_LONG_TESTS is set alone; ``takes`` says of what there is too much by default."""
    return pytest.mark.skipif(not LONG, reason=f"{takes}: PREFOPT_LONG_TESTS=1 runs it")
