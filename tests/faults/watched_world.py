"""A small world made by the stages themselves, with a count of who asked the oracle."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import prefopt.world
from test_trial import Project


@contextmanager
def oracle_counted(calls: Counter[str], who: str) -> Iterator[None]:
    """Count calls of the oracle under a name, wherever in the package it was imported to."""
    real = prefopt.world.oracle_reward

    def counting(*given):
        calls[who] += 1
        return real(*given)

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("prefopt") and getattr(module, "oracle_reward", None) is real
    ]
    for module in holders:
        module.oracle_reward = counting
    try:
        yield
    finally:
        for module in holders:
            module.oracle_reward = real


class WatchedProject(Project):
    """A project whose stages are watched: how often each of them asks the oracle."""

    def __init__(self, results: Path) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(results)

    def make(self, verb: str, *given):
        self.calls[verb] += 0
        with oracle_counted(self.calls, verb):
            return super().make(verb, *given)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> WatchedProject:
    """Nobody may change it: see ``own_world``."""
    return WatchedProject(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(small_world, tmp_path) -> WatchedProject:
    """A copy of the small world that a test may spoil."""
    other = object.__new__(WatchedProject)
    vars(other).update(vars(small_world) | {"calls": small_world.calls.copy(), "results": tmp_path / "results"})
    shutil.copytree(small_world.results, other.results)
    return other
