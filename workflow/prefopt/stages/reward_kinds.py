"""The kinds of reward model: their heads, what they are trained on, and how they rank two responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prefopt.stages.tables import VOTE_SIDES, votes_table
from prefopt.store.builds import Build
from prefopt.tables import read_table

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.engine.packing import Ids
    from prefopt.training.objectives import Objective

_SEED_OF_OUTPUT = 1_000_003  # between the initial seeds of one model's outputs


class RewardKind(NamedTuple):
    """``seeds(spec)``: of the head's outputs. ``margin(chosen, rejected)``: above 0 where chosen is ranked first."""

    seeds: Callable[[Mapping[str, Any]], list[int]]
    objective: Callable[[Build, pd.DataFrame], Objective]
    margin: Callable[[np.ndarray, np.ndarray], np.ndarray]


def pair_ids(rows: pd.DataFrame) -> tuple[Ids, Ids, Ids]:
    """Prompts, chosen and rejected responses."""
    return rows["prompt_ids"].tolist(), rows["chosen_ids"].tolist(), rows["rejected_ids"].tolist()


def _outputs(spec: Mapping[str, Any], count: int) -> list[int]:
    return [spec["seeds"]["init"] + _SEED_OF_OUTPUT * number for number in range(count)]


def _single(build: Build, rows: pd.DataFrame) -> Objective:
    from prefopt.training.objectives import RewardObjective

    return RewardObjective(*pair_ids(rows), rows["pair_id"].tolist())


def _shared(build: Build, rows: pd.DataFrame) -> Objective:
    from prefopt.training.objectives import SharedRewardObjective

    return SharedRewardObjective(*pair_ids(rows), rows["pair_id"].tolist())


def _ratings(build: Build, rows: pd.DataFrame) -> Objective:
    """Of pairs without votes the label is the one vote that there is."""
    from prefopt.training.reward_objectives import RatingObjective, rating_targets

    counts = [np.full(len(rows), float(side == "chosen")) for side in VOTE_SIDES]
    if "votes_chosen" in read_table(build.parent("pairs") / "pairs.parquet"):
        table = votes_table(build.parent("pairs"), rows["pair_id"])
        counts = [table[f"votes_{side}"].to_numpy() for side in VOTE_SIDES]
    return RatingObjective(
        *pair_ids(rows), rating_targets(counts[0], counts[1], counts[2], build.node.spec["prior_votes"])
    )


def _preference(build: Build, rows: pd.DataFrame) -> Objective:
    from prefopt.training.reward_objectives import PreferenceObjective

    return PreferenceObjective(*pair_ids(rows), build.node.spec["temperature"])


def _difference(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    return chosen - rejected


def _expected_difference(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    from prefopt.training.reward_objectives import rating_moments

    return rating_moments(chosen)[0] - rating_moments(rejected)[0]


def _preferred(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    from prefopt.training.reward_objectives import preference

    return preference(chosen, rejected)


KINDS = {
    "independent": RewardKind(lambda spec: [spec["seeds"]["init"]], _single, _difference),
    "shared_backbone": RewardKind(lambda spec: spec["seeds"]["init"], _shared, _difference),
    "distributional": RewardKind(lambda spec: _outputs(spec, 3), _ratings, _expected_difference),
    "general_preference": RewardKind(lambda spec: _outputs(spec, spec["dimension"]), _preference, _preferred),
}


def kind_of(spec: Mapping[str, Any]) -> RewardKind:
    """The kind that a reward model's spec, or that of its scores, states; independent where it states none."""
    return KINDS[spec.get("kind", "independent")]
