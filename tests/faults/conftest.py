"""Projects that the tests of faults share: one with an artifact of every stage, a small world that is watched."""

from killing import everything
from watched_world import own_world, small_world

__all__ = ["everything", "own_world", "small_world"]
