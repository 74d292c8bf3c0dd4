"""Policy fine-tuning: the loss's signals are joined on pair_id, and the policy starts at the reference."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.files import read_json
from prefopt.specs import TrainSpec
from prefopt.stages import RunOptions
from prefopt.stages.common import run_training
from prefopt.stages.tables import token_rows, vote_shares
from prefopt.stages.weights import policy_of, save_trained, with_adapter
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.training.policy_objective import PolicyObjective, ReferenceSamples

log = logging.getLogger(__name__)

STEP_ZERO_BAND = {"fp32": 1e-3, "bf16": 1.0}
"""Largest allowed |policy margin - reference margin| before the first step, in nats summed over both responses."""


_SIDES = ("chosen", "rejected")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# What parents hold as one number per pair: role -> table, and its columns -> fields of PairBatch.
_NUMBERS: dict[str, tuple[str, dict[str, str]]] = {
    "reference": ("scores.parquet", {f"{side}_logp": f"ref_{side}_logp" for side in _SIDES}),
    "second_reference": ("scores.parquet", {f"{side}_logp": f"other_ref_{side}_logp" for side in _SIDES}),
    "dispersion": ("dispersion.parquet", _same("dispersion_weight", "neg_log_dispersion")),
    "win_rates": ("win_rates.parquet", _same("chosen_win_rate", "rejected_win_rate")),
    "advantages": ("advantages.parquet", _same("chosen_advantage", "rejected_advantage")),
}


def collect_signals(build: Build, rows: pd.DataFrame) -> dict[str, Any]:
    """Per-pair arrays named as the fields of PairBatch, for the parents that the plan wired.

    Raises BadInput where a parent has no row for a pair, or more than one.
    """
    ids = rows["pair_id"]
    signals: dict[str, np.ndarray] = {}
    for role, (table, fields) in _NUMBERS.items():
        if build.has_parent(role):
            found = _columns(build, role, table, ids, list(fields))
            signals |= {field: found[column].to_numpy() for column, field in fields.items()}
    if build.has_parent("reference") and read_json(build.parent("reference") / "reference.json").get("tokens"):
        found = _columns(build, "reference", "scores.parquet", ids, [f"{side}_token_logp" for side in _SIDES])
        signals |= {f"ref_{side}_token_logp": found[f"{side}_token_logp"].to_numpy() for side in _SIDES}
    if build.has_parent("rewards"):
        signals |= _lists(build, "rewards", "scores.parquet", ids, ["chosen_reward", "rejected_reward"])
    if build.has_parent("auxiliary"):
        members = _lists(build, "auxiliary", "scores.parquet", ids, ["chosen_reward"])
        signals["auxiliary_reward"] = members["chosen_reward"].mean(axis=1)
    if build.has_parent("responsibilities"):
        types = _lists(build, "responsibilities", "weights.parquet", ids, ["agreeing", "opposing"])
        signals |= {name: values[:, build.node.spec["type"]] for name, values in types.items()}
    if build.has_parent("pairs"):
        signals["vote_share"] = vote_shares(build.parent("pairs"), ids)
    return signals


def _columns(build: Build, role: str, table: str, pair_ids: pd.Series, columns: list[str]) -> pd.DataFrame:
    """Columns of a parent's table for exactly these pairs, in their order."""
    path = build.parent(role) / table
    return join_one_to_one(pair_ids.to_frame(), read_table(path, ("pair_id", *columns)), str(path))


def _lists(build: Build, role: str, table: str, pair_ids: pd.Series, columns: list[str]) -> dict[str, np.ndarray]:
    """Columns of lists as arrays, a row per pair [N, K]."""
    found = _columns(build, role, table, pair_ids, columns)
    return {name: np.stack(found[name].to_list()) for name in columns}


def _regulariser(build: Build) -> ReferenceSamples | None:
    from prefopt.training.policy_objective import ReferenceSamples

    if build.node.spec["regulariser"] is None:
        return None
    ((name, settings),) = build.node.spec["regulariser"].items()
    start, end = settings["gamma"]
    table = read_table(build.parent("samples") / "samples.parquet")
    return ReferenceSamples(
        gamma=(start, end),
        prompt_ids=[ids.tolist() for ids in table["prompt_ids"]],
        response_ids=[ids.tolist() for ids in table["response_ids"]],
        ref_logp=table["ref_logp"].tolist(),
        seed=build.node.spec["seed"],
        name=name,
    )


def policy_to_train(build: Build, options: RunOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model that training starts from, with the adapter that the spec declares, and its tokenizer."""
    spec = build.node.spec
    train = TrainSpec.model_validate(spec["train"])
    model, tokenizer = policy_of(build, options, train.precision, train.quantize)
    with_adapter(build, model, spec["seed"])
    return model, tokenizer


def policy_objective(build: Build, options: RunOptions, model: PreTrainedModel) -> PolicyObjective:
    """The spec's loss and regulariser over the train split, with their signals.

    Raises FailedCheck where the reference scores are not those of ``model``, which training starts from, unless the
    spec says that it continues from another one.
    """
    from prefopt.training.policy_objective import PolicyObjective

    spec = build.node.spec
    rows = token_rows(build.parent("tokens"), "train")
    objective = PolicyObjective(
        rows["prompt_ids"].tolist(),
        rows["chosen_ids"].tolist(),
        rows["rejected_ids"].tolist(),
        pair_ids=rows["pair_id"].to_numpy(),
        loss=spec["loss"]["name"],
        loss_params=dict(spec["loss"]["params"]),
        signals=collect_signals(build, rows),
        regulariser=_regulariser(build),
        seed=spec["seed"],
    )
    if build.has_parent("reference") and not spec.get("continues"):
        band = STEP_ZERO_BAND[spec["train"]["precision"]]
        count = min(options.micro_batch, len(rows))
        checked = np.linspace(0, len(rows) - 1, count, dtype=int).tolist()  # over the whole table of scores
        gap = objective.check_start(model, checked, band=band)
        build.summary |= {"step_zero_margin_gap": gap, "step_zero_margin_band": band}
        log.info("policy and reference margins differ by at most %.2e nats at step 0", gap)
    return objective


def train_policy(build: Build, options: RunOptions) -> None:
    """Fine-tune from the reference model with one loss of LOSSES, plus gamma(t) times a KL where declared."""
    from prefopt.training.heads import heads_on

    model, tokenizer = policy_to_train(build, options)
    objective = policy_objective(build, options, model)
    with heads_on(model, objective.pair_loss.needs):
        run_training(build, options, model, objective, build.node.spec["seed"])
    save_trained(build, model, tokenizer, "model")
