"""Calibrated rewards: how often the responses of a pair beat others to their prompt, by an ensemble's models."""

from __future__ import annotations

import logging

import numpy as np

from prefopt.errors import BadInput
from prefopt.stages import RunOptions
from prefopt.stages.common import device_of, kept_rows
from prefopt.stages.tables import draw_keys, token_rows
from prefopt.stages.weights import tokenizer_for, weights_of
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

log = logging.getLogger(__name__)


def calibrate_rewards(build: Build, options: RunOptions) -> None:
    """Write win_rates.parquet: pair_id, chosen_win_rate, rejected_win_rate of every train pair.

    Both responses stand among the reference samples for their prompt; rates are averaged over reward models.
    """
    from prefopt.calibration import pair_win_rates
    from prefopt.engine.bulk import reward_responses
    from prefopt.engine.reward_models import load_reward_model

    pairs = token_rows(build.parent("tokens"), "train", ("pair_id", "prompt_id", "split"))
    samples = read_table(build.parent("samples") / "samples.parquet")
    prompts, responses = ([ids.tolist() for ids in samples[name]] for name in ("prompt_ids", "response_ids"))
    rewards = []
    for role in build.parents_like("reward"):
        weights = weights_of(build.parent(role))
        tokenizer_for(build, weights.folder, weights.trusted)
        model = load_reward_model(weights.folder, device=device_of(build, options), **weights.loading())
        kept = kept_rows(build, role, draw_keys(samples["prompt_id"]))
        rewards.append(reward_responses(model, prompts, responses, batch_size=options.micro_batch, kept=kept))
    drawn = {prompt: np.array(rows) for prompt, rows in samples.groupby("prompt_id").indices.items()}
    missing = pairs.loc[~pairs["prompt_id"].isin(drawn.keys()), "pair_id"]
    if len(missing):
        raise BadInput(f"pair_id {missing.iloc[0]}: no samples for its prompt, and {len(missing)} pairs are like that")
    sampled = np.stack(rewards, axis=-1)[np.stack([drawn[prompt] for prompt in pairs["prompt_id"]])]
    scores = read_table(build.parent("ensemble") / "scores.parquet", ("pair_id", "chosen_reward", "rejected_reward"))
    table = join_one_to_one(pairs[["pair_id", "split"]], scores, str(build.parent("ensemble") / "scores.parquet"))
    own, other = (np.stack(table[f"{side}_reward"].to_list()) for side in ("chosen", "rejected"))
    chosen, rejected = pair_win_rates(own, other, sampled)
    table = table[["pair_id", "split"]].assign(chosen_win_rate=chosen, rejected_win_rate=rejected)
    write_table(build.work / "win_rates.parquet", table)
    build.summary |= {
        "pairs": len(table),
        "samples_per_prompt": sampled.shape[1],
        "members": sampled.shape[2],
        "mean_difference": round(float((chosen - rejected).mean()), 6),
        "chosen_above_rejected": round(float((chosen > rejected).mean()), 6),
    }
    log.info("win rates of chosen - rejected: %.3f on average", (chosen - rejected).mean())
