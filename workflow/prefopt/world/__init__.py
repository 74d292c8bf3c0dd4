"""The embedded demo world: a small generated language with a known oracle, deterministic from a seed."""

from __future__ import annotations

from prefopt.world.oracle import LENGTH_PREFERENCE, oracle_reward, polarity, reward_parts
from prefopt.world.pairs import WorldParams, generate_pairs
from prefopt.world.prompts import Asked, all_prompts, asked, draw_prompts
from prefopt.world.raters import Raters, cast_votes
from prefopt.world.responses import MAX_RESPONSE_WORDS, bounds, candidates, oracle_best
from prefopt.world.vocabulary import vocabulary

__all__ = [
    "LENGTH_PREFERENCE",
    "MAX_RESPONSE_WORDS",
    "Asked",
    "Raters",
    "WorldParams",
    "all_prompts",
    "asked",
    "bounds",
    "candidates",
    "cast_votes",
    "draw_prompts",
    "generate_pairs",
    "oracle_best",
    "oracle_reward",
    "polarity",
    "reward_parts",
    "vocabulary",
]
