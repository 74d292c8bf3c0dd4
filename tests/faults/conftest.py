"""The project with an artifact of every stage, for all tests of faults."""

from killing import everything

__all__ = ["everything"]
