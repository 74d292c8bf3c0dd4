"""What the reference policy tells: its training, its scores, its samples, and the dispersion they imply."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from prefopt.artifacts import Build, join_one_to_one, read_json, read_table, write_json, write_table
from prefopt.specs import DispersionSpec, SamplingSpec
from prefopt.stages import RunOptions
from prefopt.stages.common import WEIGHTS, device_of, run_training, token_rows, tokenizer_for, weights_of

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def train_sft(build: Build, options: RunOptions) -> None:
    """Fine-tune the base model on the chosen responses of the train split."""
    from prefopt.models import load_causal_lm, save_model
    from prefopt.objectives import SftObjective

    rows = token_rows(build.parent("tokens"), "train")
    folder, trusted = weights_of(build.parent("base"))
    tokenizer = tokenizer_for(build, folder, trusted)
    model = load_causal_lm(folder, device=device_of(build, options), trust_remote_code=trusted)
    objective = SftObjective(rows["prompt_ids"].tolist(), rows["chosen_ids"].tolist())
    run_training(build, options, model, objective, build.node.spec["seed"])
    save_model(model, tokenizer, build.work / WEIGHTS)


def score_reference(build: Build, options: RunOptions) -> None:
    """Write scores.parquet: per pair log-probability, length and mean token entropy of both responses."""
    import pandas as pd

    from prefopt.bulk import score_responses
    from prefopt.models import load_causal_lm

    rows = token_rows(build.parent("tokens"))
    folder, trusted = weights_of(build.parent("model"))
    tokenizer_for(build, folder, trusted)
    model = load_causal_lm(
        folder, device=device_of(build, options), precision=build.node.spec["precision"], trust_remote_code=trusted
    )
    table = {"pair_id": rows["pair_id"], "split": rows["split"]}
    for side in ("chosen", "rejected"):
        scores = score_responses(
            model, rows["prompt_ids"].tolist(), rows[f"{side}_ids"].tolist(), batch_size=options.micro_batch
        )
        table |= {f"{side}_{name}": scores[name] for name in ("logp", "tokens", "entropy")}
    table = pd.DataFrame(table)
    write_table(build.work / "scores.parquet", table)
    write_json(build.work / "reference.json", {"vocab_size": model.config.vocab_size})
    entropy = (table["chosen_entropy"] + table["rejected_entropy"]) / 2
    build.summary |= {
        "pairs": len(table),
        "mean_entropy_nats_per_token": round(float(entropy.mean()), 6),
        "reference_accuracy": round(float((table["chosen_logp"] > table["rejected_logp"]).mean()), 6),
    }
    log.info("%d pairs scored, %.3f nats per token", len(table), entropy.mean())


def sample_reference(build: Build, options: RunOptions) -> None:
    """Write samples.parquet: reference responses to the prompts of a split, with their log-probabilities."""
    import pandas as pd

    from prefopt.bulk import score_responses
    from prefopt.generation import generate
    from prefopt.models import load_causal_lm

    spec = build.node.spec
    rows = token_rows(build.parent("tokens"), None if spec["split"] == "all" else spec["split"])
    rows = rows.drop_duplicates("prompt_id")
    rows = rows.loc[rows.index.repeat(spec["per_prompt"])].reset_index(drop=True)
    folder, trusted = weights_of(build.parent("model"))
    model = load_causal_lm(folder, device=device_of(build, options), trust_remote_code=trusted)
    tokenizer = tokenizer_for(build, folder, trusted)
    sampling = SamplingSpec.model_validate(dict(spec["sampling"]))
    prompts = rows["prompt_ids"].tolist()
    drawn = generate(model, tokenizer, prompts, sampling)
    scores = score_responses(model, prompts, drawn.response_ids, batch_size=options.micro_batch)
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


def _sampled_entropy(build: Build, pair_ids: pd.Series, vocab_size: int) -> np.ndarray:
    """Per pair, the sequence entropy of its prompt estimated from reference samples."""
    from prefopt.dispersion import sequence_entropy

    samples = read_table(build.parent("samples") / "samples.parquet")
    entropy = sequence_entropy(samples["prompt_id"], samples["ref_logp"], samples["tokens"], vocab_size)
    tokens = read_table(build.parent("tokens") / "tokens.parquet")[["pair_id", "prompt_id"]]
    prompts = join_one_to_one(pair_ids.to_frame(), tokens, str(build.parent("tokens")))["prompt_id"]
    return prompts.map(entropy).to_numpy()


def estimate_dispersion(build: Build, options: RunOptions) -> None:
    """Write dispersion.parquet; phi_star comes from the train split once and is recorded (arXiv 2405.14953, eq. 17)."""
    import pandas as pd

    from prefopt import dispersion

    spec = DispersionSpec.model_validate(dict(build.node.spec))
    reference = build.parent("reference")
    scores = read_table(reference / "scores.parquet")
    vocab_size = read_json(reference / "reference.json")["vocab_size"]
    if spec.norm == "mc_sequence":
        entropy = _sampled_entropy(build, scores["pair_id"], vocab_size)
    else:
        entropy = dispersion.normalised_entropy(
            *(scores[f"{side}_{what}"].to_numpy() for what in ("entropy", "tokens") for side in ("chosen", "rejected")),
            vocab_size=vocab_size,
            norm=spec.norm,
        )
    train = (scores["split"] == "train").to_numpy()
    phi_star = dispersion.phi_star(entropy[train])
    weight = dispersion.dispersion_weight(entropy, phi_star)
    dispersion.check_weights(weight, train)
    weight = dispersion.apply_control(weight, train, control=spec.control, seed=spec.seed or 0)
    table = pd.DataFrame(
        {
            "pair_id": scores["pair_id"],
            "split": scores["split"],
            "normalised_entropy": entropy,
            "dispersion_weight": weight,
            "neg_log_dispersion": dispersion.neg_log_dispersion(weight, mapping=spec.phi_mapping),
        }
    )
    table = join_one_to_one(table, scores[["pair_id"]], str(reference))
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
