"""Pairs labelled again by a reward model, with a declared share of longer winners among the training pairs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.stages import RunOptions
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def relabel_pairs(build: Build, options: RunOptions) -> None:
    """Write pairs.parquet: the response of higher reward is chosen; refused.parquet: pairs left out, with a reason.

    Left out are pairs that were not tokenised, equal rewards, and train pairs that the share ``rho`` has no room for.
    """
    import pandas as pd

    from prefopt.pairs import summarise

    pairs = read_table(build.parent("pairs") / "pairs.parquet")
    lengths = read_table(build.parent("tokens") / "tokens.parquet", ("pair_id", "chosen_tokens", "rejected_tokens"))
    rewards = read_table(build.parent("rewards") / "scores.parquet", ("pair_id", "chosen_reward", "rejected_reward"))
    scored = join_one_to_one(lengths, rewards, "rewards of the relabelled pairs")
    known = pairs["pair_id"].isin(scored["pair_id"])
    table = join_one_to_one(pairs[known], scored, "tokens of the relabelled pairs")
    tied = table["chosen_reward"] == table["rejected_reward"]
    refused = [_refusals(pairs[~known], "not tokenised"), _refusals(table[tied], "tie")]
    table = _labelled(table[~tied].reset_index(drop=True))
    flipped = float(table["flipped"].mean())
    if build.node.spec["rho"] is not None:
        kept = _share_of_longer(table, build.node.spec)
        refused.append(_refusals(table[~kept], "no room in the share of longer winners"))
        table = table[kept]
    result, left_out = table[list(pairs.columns)].reset_index(drop=True), pd.concat(refused, ignore_index=True)
    write_table(build.work / "pairs.parquet", result)
    write_table(build.work / "refused.parquet", left_out)
    build.summary |= summarise(result, left_out) | {"flipped": round(flipped, 6)}
    log.info("%d pairs, %d left out, %.1f %% of labels turned", len(result), len(left_out), 100 * flipped)


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Responses and their lengths in the reward's order; a pair that is turned has another id."""
    from prefopt.pairs import digest63

    turn = (table["rejected_reward"] > table["chosen_reward"]).to_numpy()
    found = table.assign(flipped=turn)
    for column in ("", "_tokens"):
        sides = [f"{side}{column}" for side in ("chosen", "rejected")]
        found.loc[turn, sides] = table.loc[turn, sides[::-1]].to_numpy()
    parts = zip(found["prompt"], found["chosen"], found["rejected"], strict=True)
    found["pair_id"] = [digest63([[dict(m) for m in prompt], chosen, rejected]) for prompt, chosen, rejected in parts]
    return found


def _share_of_longer(table: pd.DataFrame, spec: Mapping[str, Any]) -> np.ndarray:
    """Which rows stay: of the train split ``size`` in which the longer response is chosen in a share rho, else all."""
    from prefopt.ensemble import resample_longer_wins

    train = np.flatnonzero(table["split"] == "train")
    chosen, rejected = (table[f"{side}_tokens"].to_numpy()[train] for side in ("chosen", "rejected"))
    kept = np.ones(len(table), dtype=bool)
    kept[train] = False
    kept[train[resample_longer_wins(chosen, rejected, spec["rho"], spec["size"], seed=spec["seed"])]] = True
    return kept


def _refusals(rows: pd.DataFrame, reason: str) -> pd.DataFrame:
    return rows[["source", "source_row"]].assign(reason=reason, detail="")
