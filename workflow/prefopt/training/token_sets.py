"""Sets of response tokens that a loss may look at: what differs from the other response, and random subsets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def diff_masks(first: Sequence[int], second: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """1 on the tokens of either sequence that are not in a longest common subsequence of both.

    By bit-parallel dynamic programming (Hyyrö 2004): len(first) operations on integers of len(second) bits.
    """
    places: dict[int, int] = {}
    for at, token in enumerate(second):
        places[token] = places.get(token, 0) | (1 << at)
    every = (1 << len(second)) - 1
    rows, state = [], every  # bit j of row i is 0 where one more token of second fits after taking in first[i]
    for token in first:
        matches = state & places.get(token, 0)
        state = ((state + matches) | (state - matches)) & every
        rows.append(state)
    masks = np.ones(len(first)), np.ones(len(second))
    row, column = len(first), len(second)
    while row and column:
        bit = 1 << (column - 1)
        if rows[row - 1] & bit:
            column -= 1
            continue
        row -= 1
        if row == 0 or rows[row - 1] & bit:  # the fit came with first[row]: they are one token
            column -= 1
            masks[0][row] = masks[1][column] = 0.0
    return masks


def shared_subset(
    pair_id: int, step: int, seed: int, chosen_tokens: int, rejected_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """1 on min(chosen_tokens, rejected_tokens) places of either response, drawn without replacement.

    The draw depends on seed, step and pair alone: it is the same for every model, in every micro-batch, after a resume.
    """
    kept = min(chosen_tokens, rejected_tokens)
    draw = np.random.default_rng([seed, step, int(pair_id)])
    masks = np.zeros(chosen_tokens), np.zeros(rejected_tokens)
    for mask in masks:
        mask[draw.permutation(len(mask))[:kept]] = 1.0
    return masks
