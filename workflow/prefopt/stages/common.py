"""What several stages need: the weights of a parent, its token rows, a training run written down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.artifacts import Build, read_json, read_table, write_lines
from prefopt.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from prefopt.objectives import Objective
    from prefopt.stages import RunOptions

WEIGHTS = "weights"
TOKENIZER = "tokenizer"
SOURCE = "source.json"


def weights_of(artifact: Path) -> tuple[Path, bool]:
    """Model folder of an artifact and whether its own code may run.

    The artifact holds the weights, or (base models from outside) says where they are.
    """
    if (artifact / WEIGHTS).is_dir():
        return artifact / WEIGHTS, False
    source = read_json(artifact / SOURCE)
    if "path" in source:
        folder = Path(source["path"])
        if not folder.is_dir():
            raise BadInput(f"{folder}: the model folder recorded in {artifact / SOURCE} is gone")
        return folder, source["trust_remote_code"]
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source["repo"], revision=source["revision"])), source["trust_remote_code"]


def device_of(build: Build, options: RunOptions) -> str:
    """The device this job runs on, recorded in the manifest; ``auto`` takes CUDA where there is a device."""
    from prefopt.models import pick_device

    build.device = pick_device(options.device)
    return build.device


def tokenizer_for(build: Build, folder: Path, trusted: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; BadInput where its vocabulary is not the one the pairs were tokenised with."""
    from prefopt.models import load_tokenizer
    from prefopt.tokens import check_same_vocabulary

    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    check_same_vocabulary(tokenizer, load_tokenizer(build.parent("tokens") / TOKENIZER))
    return tokenizer


def token_rows(artifact: Path, split: str | None = None) -> pd.DataFrame:
    """Token table of a tokens artifact, one split or all, with plain lists of ids.

    Raises BadInput where the split is empty.
    """
    table = read_table(artifact / "tokens.parquet")
    if split is not None:
        table = table[table["split"] == split].reset_index(drop=True)
        if table.empty:
            raise BadInput(f"{artifact}: no pair in the split '{split}'; give it a larger share or more data")
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        table[column] = [ids.tolist() for ids in table[column]]
    return table


def run_training(
    build: Build, options: RunOptions, model: Any, objective: Objective, seed: int
) -> list[dict[str, Any]]:
    """Train with the spec's ``train`` section; the weights and the learning curve become outputs.

    Returns the curve: one dict of metrics per step.
    """
    from prefopt.specs import TrainSpec
    from prefopt.trainer import train

    result = train(
        model,
        objective,
        TrainSpec.model_validate(build.node.spec["train"]),
        seed=seed,
        state_dir=build.scratch / "checkpoints",
        micro_batch=options.micro_batch,
        checkpoint_steps=options.checkpoint_steps,
        device=device_of(build, options),
    )
    write_lines(build.work / "metrics.jsonl", result.metrics)
    last = result.metrics[-max(1, len(result.metrics) // 10) :]
    means = {key: sum(m[key] for m in last) / len(last) for key in last[0] if key != "step"}
    build.summary |= {"steps": result.steps, "train_seconds": round(result.seconds, 3), "last_tenth": means}
    return result.metrics
