"""The reward-model ensemble: members with their own seeds and subsets, their scores, and the K columns side by side."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefopt.artifacts import outputs_digest
from prefopt.errors import BadInput
from prefopt.files import write_json
from prefopt.stages import RunOptions
from prefopt.stages.common import device_of, kept_rows, run_training, warn
from prefopt.stages.reward_kinds import kind_of, pair_ids
from prefopt.stages.tables import token_rows
from prefopt.stages.weights import save_trained, tokenizer_for, weights_of, with_adapter
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.stages.reward_kinds import RewardKind

log = logging.getLogger(__name__)


def _member_rows(rows: pd.DataFrame, build: Build) -> pd.DataFrame:
    """The pairs this member trains on: a length-biased subsample D_{rho,b}, a random subset of it, or all.

    With ``equal_to``, the biases of all members, the subsample has the size of the smallest of theirs.
    """
    from prefopt.ensemble import largest_subsample, resample_longer_wins

    spec = build.node.spec
    seed = spec["seeds"]["subset"]
    if spec["longer_wins"] is not None:
        lengths = rows["chosen_tokens"].to_numpy(), rows["rejected_tokens"].to_numpy()
        equal_to = spec.get("equal_to")
        size = None if equal_to is None else min(largest_subsample(*lengths, bias) for bias in equal_to)
        kept = resample_longer_wins(*lengths, spec["longer_wins"], size, seed=seed)
        rows = rows.iloc[np.sort(kept)]
    if spec["subset"] < 1:
        size = max(1, round(spec["subset"] * len(rows)))
        kept = np.random.default_rng([seed, 2]).choice(len(rows), size, replace=False)
        rows = rows.iloc[np.sort(kept)]
    return rows.reset_index(drop=True)


def train_reward(build: Build, options: RunOptions) -> None:
    """Train one Bradley-Terry reward model, with its own initialisation, data order and subset.

    With a ``kind`` in the spec it has several outputs: a head for each of the initial seeds (shared_backbone), classes
    of ratings (distributional), or the coordinates of a vector (general_preference).
    """
    from prefopt.engine.reward_models import new_shared_reward_model, score_head

    spec = build.node.spec
    kind = kind_of(spec)
    rows = _member_rows(token_rows(build.parent("tokens"), spec["split"]), build)
    weights = weights_of(build.parent("model"))
    tokenizer = tokenizer_for(build, weights.folder, weights.trusted)
    heads = kind.seeds(spec)
    model = new_shared_reward_model(
        weights.folder,
        heads,
        frozen=spec.get("frozen", False),
        device=device_of(build, options),
        **weights.loading(),
    )
    with_adapter(build, model, heads[0], score_head(model, len(heads))[1])
    run_training(build, options, model, kind.objective(build, rows), spec["seeds"]["order"])
    held_out = _accuracy(model, kind, token_rows(build.parent("tokens"), "test"), options.micro_batch)
    accuracy = round(float(np.mean(held_out)), 6)
    build.summary |= {"pairs": len(rows), "longer_wins": _longer_wins(rows), "held_out_accuracy": accuracy}
    if "kind" in spec:
        build.summary |= {"kind": spec["kind"]}
    if "frozen" in spec:
        build.summary |= {"frozen": spec["frozen"], "held_out_accuracy_of_heads": held_out}
    log.info("trained on %d pairs, held-out accuracy %.3f", len(rows), accuracy)
    for head, right in enumerate(held_out if isinstance(held_out, list) else [held_out]):
        if right < 0.5:
            called = f"head {head}" if isinstance(held_out, list) else "the reward model"
            warn(build, f"{called} is right on {right:.1%} of the held-out pairs, less than chance")
    save_trained(build, model, tokenizer, "model")


def _longer_wins(rows: pd.DataFrame) -> float | None:
    """Share of pairs at least 10 % apart whose longer response is the chosen one; None where no pair is."""
    from prefopt.ensemble import longer_wins_fraction

    share = longer_wins_fraction(rows["chosen_tokens"].to_numpy(), rows["rejected_tokens"].to_numpy())
    return None if np.isnan(share) else round(share, 6)


def _accuracy(model: object, kind: RewardKind, rows: pd.DataFrame, batch_size: int) -> float | list[float]:
    """Share of pairs ranked right, of each head where there are several."""
    from prefopt.engine.bulk import reward_pairs

    margin = kind.margin(*reward_pairs(model, *pair_ids(rows), batch_size=batch_size))
    return np.round((margin > 0).mean(axis=0), 6).tolist()


@lru_cache(maxsize=1)
def _rows_to_score(tokens: Path, _outputs: str) -> pd.DataFrame:
    """The token table, read once by a job that scores it with several reward models."""
    return token_rows(tokens)


def score_rewards(build: Build, options: RunOptions) -> None:
    """Write scores.parquet: the member's reward of both responses of every pair, or the list of its heads' rewards.

    Of a distributional model the reward is the expected class, beside it the variance: chosen_spread, rejected_spread.
    """
    import pandas as pd

    from prefopt.engine.bulk import SIDES, reward_pairs
    from prefopt.engine.reward_models import load_reward_model
    from prefopt.training.reward_objectives import RATINGS, rating_moments

    tokens = build.parent("tokens")
    rows = _rows_to_score(tokens, outputs_digest(tokens))
    weights = weights_of(build.parent("reward"))
    rated = build.node.spec.get("kind") == "distributional"
    members = RATINGS if rated else build.node.spec.get("members", 1)
    device = device_of(build, options)
    model = load_reward_model(weights.folder, members=members, device=device, **weights.loading())
    kept = kept_rows(build, "pairs", rows["pair_id"])
    rewards = reward_pairs(model, *pair_ids(rows), batch_size=options.micro_batch, kept=kept)
    table = {"pair_id": rows["pair_id"], "split": rows["split"]}
    if rated:
        rewards, spreads = zip(*map(rating_moments, rewards), strict=True)
        table |= {f"{side}_spread": values for side, values in zip(SIDES, spreads, strict=True)}
    for side, values in zip(SIDES, rewards, strict=True):
        table[f"{side}_reward"] = list(values) if values.ndim > 1 else values
    table = pd.DataFrame(table)
    write_table(build.work / "scores.parquet", table)
    right = pd.Series((rewards[0] > rewards[1]).reshape(len(rows), -1).mean(axis=1))
    accuracy = right.groupby(table["split"]).mean()
    build.summary["accuracy"] = {split: round(float(value), 6) for split, value in accuracy.items()}
    log.info("accuracy by split: %s", build.summary["accuracy"])


def collect_ensemble(build: Build, options: RunOptions) -> None:
    """Write scores.parquet with chosen_reward and rejected_reward as [K] lists; members are never averaged here.

    With ``oracle`` in the spec there is one column, the demo world's true reward of the texts. ``kind`` says what the
    columns are: independent members, heads on a shared_backbone, or the oracle.
    """
    from prefopt.ensemble import diagnostics, split_heads, stack_members

    tokens = read_table(build.parent("tokens") / "tokens.parquet")[["pair_id", "split"]]
    kind = {"kind": "independent"}
    if build.node.spec.get("oracle"):
        kind = {"kind": "oracle"}
        members = {"oracle": _true_rewards(build, tokens[["pair_id"]])}
    elif build.has_parent("heads"):
        kind = {name: build.node.spec[name] for name in ("kind", "frozen")}
        heads = split_heads(read_table(build.parent("heads") / "scores.parquet"))
        members = {f"head{k}": head for k, head in enumerate(heads)}
    else:
        members = {role: read_table(p / "scores.parquet") for role, p in build.parents_like("member").items()}
    table = stack_members(list(members.values()))
    table = join_one_to_one(tokens, table[["pair_id", "chosen_reward", "rejected_reward"]], "ensemble scores")
    write_table(build.work / "scores.parquet", table)
    held_out = diagnostics(table[table["split"] == "test"])
    write_json(build.work / "diagnostics.json", kind | {"members": list(members), "held_out": held_out})
    build.summary |= kind | {"members": len(members), "held_out": held_out}
    for warning in held_out.get("warnings", []):
        warn(build, warning)


def _true_rewards(build: Build, pair_ids: pd.DataFrame) -> pd.DataFrame:
    """The oracle's reward of both responses; BadInput for a prompt that is none of the demo world's."""
    from prefopt.engine.answers import instruction_text
    from prefopt.world import asked, oracle_reward

    path = build.parent("pairs") / "pairs.parquet"
    pairs = join_one_to_one(pair_ids, read_table(path)[["pair_id", "prompt", "chosen", "rejected"]], str(path))
    prompts = [instruction_text(prompt) for prompt in pairs["prompt"]]
    for pair_id, prompt in zip(pairs["pair_id"], prompts, strict=True):
        if asked(prompt) is None:
            raise BadInput(
                f"{path}: pair_id {pair_id}: the prompt {prompt[:60]!r} is none of the demo world's, so no true reward "
                "is not known; train reward models instead of 'oracle: true'"
            )
    table = pairs[["pair_id"]].copy()
    for side in ("chosen", "rejected"):
        table[f"{side}_reward"] = [oracle_reward(p, text) for p, text in zip(prompts, pairs[side], strict=True)]
    return table
