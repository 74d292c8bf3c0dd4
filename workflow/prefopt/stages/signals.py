"""What the reference policy tells: its training, its scores, its samples, and the dispersion they imply."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefopt.errors import BadInput, FailedCheck
from prefopt.files import read_json, write_json
from prefopt.specs import DispersionSpec, SamplingSpec
from prefopt.stages import RunOptions
from prefopt.stages.common import device_of, kept_rows, run_training
from prefopt.stages.tables import draw_keys, token_rows, votes_table
from prefopt.stages.weights import save_trained, tokenizer_for, weights_of, with_adapter
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def train_sft(build: Build, options: RunOptions) -> None:
    """Fine-tune the base model on the chosen responses of the train split."""
    from prefopt.models import load_causal_lm
    from prefopt.training.objectives import SftObjective

    rows = token_rows(build.parent("tokens"), "train")
    weights = weights_of(build.parent("base"))
    tokenizer = tokenizer_for(build, weights.folder, weights.trusted)
    model = load_causal_lm(weights.folder, device=device_of(build, options), **weights.loading())
    with_adapter(build, model, build.node.spec["seed"])
    objective = SftObjective(rows["prompt_ids"].tolist(), rows["chosen_ids"].tolist(), rows["pair_id"].tolist())
    run_training(build, options, model, objective, build.node.spec["seed"])
    save_trained(build, model, tokenizer, "base")


def score_reference(build: Build, options: RunOptions) -> None:
    """Write scores.parquet: per pair log-probability, length and mean token entropy of both responses.

    With ``tokens`` in the spec also the log-probability of every single token.
    """
    import pandas as pd

    from prefopt.engine.bulk import score_pairs
    from prefopt.engine.token_scores import score_tokens
    from prefopt.models import load_causal_lm

    rows = token_rows(build.parent("tokens"))
    weights = weights_of(build.parent("model"))
    tokenizer_for(build, weights.folder, weights.trusted)
    how = {"precision": build.node.spec["precision"], "quantize": build.node.spec.get("quantize")}
    model = load_causal_lm(weights.folder, device=device_of(build, options), **how, **weights.loading())
    columns = [rows[name].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    kept = kept_rows(build, "pairs", rows["pair_id"])
    scores = score_pairs(model, *columns, batch_size=options.micro_batch, kept=kept)
    table = {"pair_id": rows["pair_id"], "split": rows["split"], **scores}
    by_token = build.node.spec.get("tokens", False)
    if by_token:
        for side, ids in zip(("chosen", "rejected"), columns[1:], strict=True):
            kept = kept_rows(build, f"{side}_tokens", rows["pair_id"])
            table[f"{side}_token_logp"] = score_tokens(
                model, columns[0], ids, batch_size=options.micro_batch, kept=kept
            )
    table = pd.DataFrame(table)
    _check_scores(table)
    write_table(build.work / "scores.parquet", table)
    about = {"vocab_size": model.config.vocab_size}
    write_json(build.work / "reference.json", about | ({"tokens": True} if by_token else {}))
    entropy = (table["chosen_entropy"] + table["rejected_entropy"]) / 2
    build.summary |= {
        "pairs": len(table),
        "mean_entropy_nats_per_token": round(float(entropy.mean()), 6),
        "reference_accuracy": round(float((table["chosen_logp"] > table["rejected_logp"]).mean()), 6),
    }
    log.info("%d pairs scored, %.3f nats per token", len(table), entropy.mean())


def _check_scores(table: pd.DataFrame) -> None:
    """FailedCheck naming the first pair whose log-probability or entropy is not finite."""
    columns = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("logp", "entropy")]
    finite = np.isfinite(table[columns].to_numpy(float))
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        value = table[columns[column]].iloc[row]
        raise FailedCheck(
            f"pair_id {table['pair_id'].iloc[row]}: {columns[column]} of the reference is {value}; its weights are "
            "broken, or overflow on this pair"
        )


def sample_reference(build: Build, options: RunOptions) -> None:
    """Write samples.parquet: reference responses to the prompts of a split, with their log-probabilities.

    With ``prompts`` in the spec, to so many of them, drawn by the sampling seed.
    """
    import pandas as pd

    from prefopt.engine.bulk import score_responses
    from prefopt.generation import generate
    from prefopt.models import load_causal_lm

    spec = build.node.spec
    rows = token_rows(build.parent("tokens"), None if spec["split"] == "all" else spec["split"])
    rows = rows.drop_duplicates("prompt_id").reset_index(drop=True)
    if spec.get("prompts", len(rows)) < len(rows):
        draw = np.random.default_rng([spec["sampling"]["seed"], 17])
        rows = rows.loc[np.sort(draw.choice(len(rows), spec["prompts"], replace=False))]
    rows = rows.loc[rows.index.repeat(spec["per_prompt"])].reset_index(drop=True)
    weights = weights_of(build.parent("model"))
    model = load_causal_lm(weights.folder, device=device_of(build, options), **weights.loading())
    tokenizer = tokenizer_for(build, weights.folder, weights.trusted)
    sampling = SamplingSpec.model_validate(dict(spec["sampling"]))
    prompts = rows["prompt_ids"].tolist()
    drawn = generate(model, tokenizer, prompts, sampling, state=build.scratch / "responses")
    kept = kept_rows(build, "samples", draw_keys(rows["prompt_id"]))
    scores = score_responses(model, prompts, drawn.response_ids, batch_size=options.micro_batch, kept=kept)
    table = pd.DataFrame(
        {
            "prompt_id": rows["prompt_id"],
            "prompt_ids": prompts,
            "response_ids": drawn.response_ids,
            "ref_logp": scores["logp"],
            "tokens": scores["tokens"],
        }
    )
    write_table(build.work / "samples.parquet", table)
    build.summary |= {"samples": len(table), "ended": round(float(np.mean(drawn.ended)), 6)}


def _token_entropy(build: Build, spec: DispersionSpec, pairs: pd.DataFrame) -> np.ndarray:
    """E of every pair from the reference's token entropies, on its responses or on sampled ones."""
    from prefopt import dispersion

    vocab_size = read_json(build.parent("reference") / "reference.json")["vocab_size"]
    if spec.norm == "mc_sequence":
        samples = read_table(build.parent("samples") / "samples.parquet")
        entropy = dispersion.sequence_entropy(samples["prompt_id"], samples["ref_logp"], samples["tokens"], vocab_size)
        return pairs["prompt_id"].map(entropy).to_numpy()
    columns = [f"{side}_{what}" for what in ("entropy", "tokens") for side in ("chosen", "rejected")]
    scores = _of_pairs(pairs, build.parent("reference") / "scores.parquet", columns)
    chosen, rejected, chosen_tokens, rejected_tokens = (scores[name].to_numpy() for name in columns)
    return dispersion.normalised_entropy(
        chosen, rejected, chosen_tokens, rejected_tokens, vocab_size=vocab_size, norm=spec.norm
    )


def _vote_entropy(build: Build, pairs: pd.DataFrame) -> np.ndarray:
    """E of every pair from the votes of the reward ensemble's members."""
    from prefopt import dispersion
    from prefopt.ensemble import reward_margins

    scores = build.parent("rewards") / "scores.parquet"
    return dispersion.vote_entropy(reward_margins(_of_pairs(pairs, scores, ["chosen_reward", "rejected_reward"])))


def _true_dispersion(build: Build, pairs: pd.DataFrame) -> np.ndarray:
    """phi of the rater who labelled each pair, which takes the place of E: c is proportional to -log phi."""
    path = build.parent("pairs") / "pairs.parquet"
    meta = [json.loads(text) for text in _of_pairs(pairs, path, ["meta"])["meta"]]
    phi = np.array([row.get("phi", np.nan) for row in meta], dtype=float)
    usable = (phi > 0) & (phi < 1)
    if not usable.all():
        pair = pairs["pair_id"].iloc[int(np.argmin(usable))]
        raise BadInput(
            f"{path}: pair_id {pair} has no phi between 0 and 1, so its true dispersion is not known; only raters of "
            "the demo world have one: use the estimator token_entropy or vote_entropy"
        )
    return phi


def _human_votes(build: Build, pairs: pd.DataFrame) -> np.ndarray:
    """E of every pair from its annotators' votes."""
    from prefopt import dispersion

    votes = votes_table(build.parent("pairs"), pairs["pair_id"])
    return dispersion.human_votes(votes["votes_chosen"], votes["votes_rejected"], votes["votes_tie"])


def _of_pairs(pairs: pd.DataFrame, path: Path, columns: list[str]) -> pd.DataFrame:
    """Columns of a table for exactly these pairs, in their order."""
    return join_one_to_one(pairs[["pair_id"]], read_table(path)[["pair_id", *columns]], str(path))


def _estimate(build: Build, spec: DispersionSpec, pairs: pd.DataFrame) -> np.ndarray:
    """The declared estimate of every pair, before its calibration [N]."""
    if spec.estimator == "truth":
        return _true_dispersion(build, pairs)
    if spec.estimator == "vote_entropy":
        return _vote_entropy(build, pairs)
    if spec.estimator == "human_votes":
        return _human_votes(build, pairs)
    if spec.estimator == "rating_spread":
        return _rating_spread(build, pairs)
    return _token_entropy(build, spec, pairs)


def _rating_spread(build: Build, pairs: pd.DataFrame) -> np.ndarray:
    from prefopt import dispersion

    path = build.parent("ratings") / "scores.parquet"
    spread = _of_pairs(pairs, path, ["chosen_spread", "rejected_spread"])
    return dispersion.rating_spread(spread["chosen_spread"], spread["rejected_spread"])


def estimate_dispersion(build: Build, options: RunOptions) -> None:
    """Write dispersion.parquet; phi_star comes from the train split once and is recorded (arXiv 2405.14953, eq. 17)."""
    from prefopt import dispersion

    spec = DispersionSpec.model_validate(dict(build.node.spec))
    table = read_table(build.parent("tokens") / "tokens.parquet")[["pair_id", "prompt_id", "split"]]
    entropy = _estimate(build, spec, table)
    train = (table["split"] == "train").to_numpy()
    phi_star = dispersion.phi_star(entropy[train])
    weight = dispersion.dispersion_weight(entropy, phi_star)
    dispersion.check_weights(weight, train)
    weight = dispersion.apply_control(weight, train, control=spec.control, seed=spec.seed or 0)
    table = table.drop(columns="prompt_id").assign(
        normalised_entropy=entropy,
        dispersion_weight=weight,
        neg_log_dispersion=dispersion.neg_log_dispersion(weight, mapping=spec.phi_mapping),
    )
    write_table(build.work / "dispersion.parquet", table)
    calibration = {
        "phi_star": phi_star,
        "calibrated_on": int(train.sum()),
        "mean_weight_train": float(weight[train].mean()),
        "sd_weight_train": float(weight[train].std()),
        "control": spec.control,
    }
    write_json(build.work / "calibration.json", calibration)
    build.summary |= calibration
    log.info("phi* = %.6f from %d train pairs", phi_star, train.sum())
