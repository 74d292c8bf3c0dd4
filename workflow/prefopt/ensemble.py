"""Reward-model ensembles: joining members, looking at them, and building length-biased training sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = LazyModule("pandas")

_REWARDS = ("chosen_reward", "rejected_reward")
# Absorbs the rounding of gap * length, so that 11 against 10 tokens is a gap of 10 %.
_LENGTH_TOLERANCE = 1e-9


def stack_members(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join K members' (pair_id, chosen_reward, rejected_reward) into list columns of length K, one row per pair.

    Rows follow the first member; members are joined on pair_id, one-to-one.

    Raises BadInput without members, for missing columns, repeated or differing pair_ids, or rewards not finite.
    """
    if not frames:
        raise BadInput("ensemble: no members to stack; list at least one reward model")
    indexed = [_member(number, frame) for number, frame in enumerate(frames)]
    ids = indexed[0].index
    for number, member in enumerate(indexed[1:], start=1):
        for label, difference in (("lacks", ids.difference(member.index)), ("alone has", member.index.difference(ids))):
            if len(difference):
                raise BadInput(
                    f"ensemble: member {number} {label} {len(difference)} of the pair_ids, e.g. {difference[0]}; "
                    "score all members on the same pairs"
                )
    stacked = pd.DataFrame({"pair_id": ids})
    for column in _REWARDS:
        stacked[column] = list(np.column_stack([member[column].reindex(ids).to_numpy(float) for member in indexed]))
    return stacked


def _member(number: int, frame: pd.DataFrame) -> pd.DataFrame:
    absent = [name for name in ("pair_id", *_REWARDS) if name not in frame.columns]
    if absent:
        raise BadInput(f"ensemble: member {number} has no column '{absent[0]}'; columns: {', '.join(map(str, frame))}")
    repeated = frame["pair_id"][frame["pair_id"].duplicated()]
    if len(repeated):
        raise BadInput(
            f"ensemble: member {number} has pair_id {repeated.iloc[0]} more than once; keep one score per pair"
        )
    finite = np.isfinite(frame[list(_REWARDS)].to_numpy(float)).all(axis=1)
    if not finite.all():
        raise BadInput(
            f"ensemble: member {number}, pair_id {frame['pair_id'].iloc[int(finite.argmin())]}: reward not finite"
        )
    return frame.set_index("pair_id")


def split_heads(scores: pd.DataFrame) -> list[pd.DataFrame]:
    """One frame per head, as ``stack_members`` takes them, from list columns of length K."""
    columns = {name: np.stack(scores[name].to_list()) for name in _REWARDS}
    heads = range(columns[_REWARDS[0]].shape[1])
    return [scores[["pair_id"]].assign(**{name: values[:, head] for name, values in columns.items()}) for head in heads]


def reward_margins(stacked: pd.DataFrame) -> NDArray[np.float64]:
    """Chosen - rejected reward of a stacked frame [pairs, K]."""
    return np.stack(stacked["chosen_reward"].to_list()) - np.stack(stacked["rejected_reward"].to_list())


def diagnostics(stacked: pd.DataFrame) -> dict[str, Any]:
    """What the members know and how they differ, for pairs whose chosen response is the preferred one.

    ``accuracy`` (share of pairs with a positive margin, ties half), ``margin_mean`` and ``margin_std`` (ddof 0, raw
    reward scale) per member; ``correlation`` of margins [K][K] (0 with a constant member); ``mean_correlation`` and
    ``disagreement`` over the pairs of members (null for one): of the correlation, and of the share of response pairs
    that two members order differently, ties half; ``vote_entropy``, the mean over pairs of the entropy of the members'
    votes in nats; flags ``below_chance`` and ``constant`` (members) and
    ``identical`` (member pairs, equal up to a shift of the reward per response); ``warnings``, the flags in words.
    Without pairs only ``pairs`` and ``warnings``.
    """
    if stacked.empty:
        return {"pairs": 0, "warnings": ["no pairs to compare the members on"]}
    margins = reward_margins(stacked)
    votes = (margins > 0) + 0.5 * (margins == 0)
    accuracy, spread = votes.mean(axis=0), margins.std(axis=0)
    share = votes.mean(axis=1)
    both = np.stack([share, 1 - share])
    entropy = -np.where(both > 0, both * np.log(np.where(both > 0, both, 1.0)), 0.0).sum(axis=0)
    centred = margins - margins.mean(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    correlation = (centred / scale).T @ (centred / scale) / len(margins)
    members = range(margins.shape[1])
    above = np.triu_indices(len(members), 1)
    differs = np.abs(votes[:, above[0]] - votes[:, above[1]])
    below = [k for k in members if accuracy[k] < 0.5]
    constant = [k for k in members if spread[k] == 0]
    twins = [(i, k) for k in members for i in range(k) if np.allclose(margins[:, i], margins[:, k], 1e-9, 1e-12)]
    return {
        "members": margins.shape[1],
        "pairs": len(margins),
        "accuracy": accuracy.tolist(),
        "margin_mean": margins.mean(axis=0).tolist(),
        "margin_std": spread.tolist(),
        "correlation": correlation.tolist(),
        "mean_correlation": float(correlation[above].mean()) if len(members) > 1 else None,
        "disagreement": float(differs.mean()) if len(members) > 1 else None,
        "vote_entropy": float(entropy.mean()),
        "below_chance": below,
        "constant": constant,
        "identical": twins,
        "warnings": [
            *(f"member {k} is right on {accuracy[k]:.1%} of the pairs, less than chance" for k in below),
            *(f"member {k} has the same reward margin on every pair" for k in constant),
            *(f"members {i} and {k} have the same reward margins" for i, k in twins),
        ],
    }


def length_outcome(chosen_tokens: ArrayLike, rejected_tokens: ArrayLike, gap: float = 0.1) -> NDArray[np.int64]:
    """+1 where the chosen response is the longer one, -1 where the rejected one is, 0 within the gap.

    Longer means at least ``gap`` (a fraction) more tokens than the other response.
    """
    chosen, rejected = np.asarray(chosen_tokens, dtype=float), np.asarray(rejected_tokens, dtype=float)
    difference = chosen - rejected
    apart = (difference != 0) & (np.abs(difference) >= gap * np.minimum(chosen, rejected) - _LENGTH_TOLERANCE)
    return (np.sign(difference) * apart).astype(np.int64)


def longer_wins_fraction(chosen_tokens: ArrayLike, rejected_tokens: ArrayLike, gap: float = 0.1) -> float:
    """Share of pairs, among those at least ``gap`` apart, whose longer response is the chosen one; NaN without any."""
    outcome = length_outcome(chosen_tokens, rejected_tokens, gap)
    decided = outcome[outcome != 0]
    return float((decided > 0).mean()) if len(decided) else float("nan")


def largest_subsample(
    chosen_tokens: ArrayLike, rejected_tokens: ArrayLike, fraction: float, *, gap: float = 0.1
) -> int:
    """Most pairs, without repeats, among which the longer response can win in that fraction; 0 where none can be drawn.

    floor(min(wins / fraction, losses / (1 - fraction))) of the pairs at least ``gap`` apart.

    Raises BadInput when the fraction is not in [0, 1].

    Source: 2405.19316, section 5: the size of D_{rho,b}.
    """
    if not 0 <= fraction <= 1:
        raise BadInput(f"longer-wins fraction is {fraction}; expected a number from 0 to 1")
    outcome = length_outcome(chosen_tokens, rejected_tokens, gap)
    counts = (((outcome > 0).sum(), fraction), ((outcome < 0).sum(), 1 - fraction))
    return math.floor(min(count / share for count, share in counts if share > 0) + 1e-9)


def resample_longer_wins(
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    fraction: float,
    size: int | None = None,
    *,
    gap: float = 0.1,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Rows of a subsample, without repeats, in which the longer response is chosen in that fraction of pairs.

    Of ``size`` rows, round(fraction * size) are wins of the longer response; pairs within the gap are left out. The
    default size is the largest possible, floor(min(wins / fraction, losses / (1 - fraction))). Row numbers ascend.

    Raises BadInput when the fraction is not in [0, 1] or the pairs do not suffice.

    Source: 2405.19316, section 5: D_rho and D_{rho,b}.
    """
    largest = largest_subsample(chosen_tokens, rejected_tokens, fraction, gap=gap)
    outcome = length_outcome(chosen_tokens, rejected_tokens, gap)
    longer, shorter = np.flatnonzero(outcome > 0), np.flatnonzero(outcome < 0)
    have = f"{len(longer)} pairs where the longer response wins and {len(shorter)} where it loses"
    if largest < 1 or (size is not None and not 1 <= size <= largest):
        wanted = "any subsample" if size is None else f"{size} pairs"
        raise BadInput(f"no way to draw {wanted} with longer-wins fraction {fraction}: at most {largest} from {have}")
    total = largest if size is None else size
    wins = math.floor(fraction * total + 0.5)
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(longer, wins, replace=False), rng.choice(shorter, total - wins, replace=False)]
    return np.sort(np.concatenate(drawn))
