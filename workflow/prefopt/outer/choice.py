"""Which two of N responses to a prompt become a pair, from the rewards of M models (CaPO, arXiv 2502.02588)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def fronts(rewards: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Which of N responses no other beats, and which beat no other, each [N]; ``rewards`` [N, M].

    One beats another where it is at least as good by every model and better by one.
    """
    rewards = np.asarray(rewards, dtype=float)
    at_least = np.all(rewards[:, None] >= rewards[None], axis=2)
    beats = at_least & np.any(rewards[:, None] > rewards[None], axis=2)  # [i, j]: i beats j
    return ~np.any(beats, axis=0), ~np.any(beats, axis=1)


def chosen_and_rejected(rewards: ArrayLike, rule: str, draw: np.random.Generator) -> tuple[int, int] | None:
    """Numbers of the chosen and the rejected one of N responses, the mean reward of the first being the higher.

    ``extremes``: highest and lowest mean reward, the first of equal ones. ``random``: any two that a draw without
    replacement names, None where their means are equal. ``pareto``: one of the upper front and one of
    the lower, each such pair as likely as any other; calibrated win rates have the same fronts, since they rise with
    each model's reward. None where all means are equal. CaPO pairs its two fronts; that it draws among all such pairs
    is a reading of its abstract. Raises ValueError for an unknown rule and for fewer than two responses.
    """
    rewards = np.asarray(rewards, dtype=float)
    if rule not in ("extremes", "pareto", "random") or len(rewards) < 2:
        raise ValueError(
            f"rule '{rule}' over {len(rewards)} responses; known: extremes, pareto, random, of two or more"
        )
    mean = rewards.mean(axis=1)
    if rule == "extremes":
        pairs = [(int(mean.argmax()), int(mean.argmin()))]
    elif rule == "random":
        one, other = draw.choice(len(rewards), 2, replace=False).tolist()
        pairs = [(one, other), (other, one)]
    else:
        upper, lower = fronts(rewards)
        pairs = [(int(i), int(j)) for i in np.flatnonzero(upper) for j in np.flatnonzero(lower)]
    pairs = [(i, j) for i, j in pairs if mean[i] > mean[j]]
    return pairs[draw.integers(len(pairs))] if pairs else None
