"""With PREFOPT_LONG_TESTS=1 the drawn inputs are 100,000 and more; every property fails where it tried fewer."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from fuzzing import PLANNED, SHORT_SHARE, fuzzed
from hypothesis import strategies as st


def test_the_properties_try_100_000_inputs_when_asked_to():
    for path in sorted(Path(__file__).parent.glob("test_fuzz_*.py")):
        importlib.import_module(path.stem)
    assert sum(PLANNED.values()) >= 100_000
    assert len(PLANNED) >= 30
    assert sum(PLANNED.values()) / SHORT_SHARE < 3000  # and a small share of them by default


@pytest.fixture
def planned():
    """What is planned here counts for nothing."""
    before = dict(PLANNED)
    yield
    PLANNED.clear()
    PLANNED.update(before)


def test_a_property_that_tries_fewer_fails(planned):
    """Counted is what the property was called with: a strategy of one value is no 500 inputs."""

    @fuzzed(500, value=st.just(1))
    def exhausted(value):
        assert value == 1

    @fuzzed(500, value=st.integers())
    def enough(value):
        assert isinstance(value, int)

    enough()
    with pytest.raises(AssertionError):
        exhausted()
