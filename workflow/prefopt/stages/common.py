"""What several stages need: the weights of a parent, its token rows, a training run written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.artifacts import Build, read_json, read_table, write_lines
from prefopt.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.models import Precision
    from prefopt.objectives import Objective
    from prefopt.stages import RunOptions
    from prefopt.trainer import Visits

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
    """The tokenizer of a model folder; BadInput where its vocabulary is not the one of every parent's token ids."""
    from prefopt.models import load_tokenizer
    from prefopt.tokens import check_same_vocabulary

    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    for artifact in {ref: build.parent(role) for role, ref in build.node.parents.items() if _is_tokens(role)}.values():
        check_same_vocabulary(tokenizer, load_tokenizer(artifact / TOKENIZER))
    return tokenizer


def _is_tokens(role: str) -> bool:
    return role.rsplit(".", maxsplit=1)[-1] == "tokens"


def policy_of(
    build: Build, options: RunOptions, precision: Precision = "fp32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model of the parent ``model``, and its tokenizer as ``tokenizer_for`` checks it."""
    from prefopt.models import load_causal_lm

    folder, trusted = weights_of(build.parent("model"))
    device = device_of(build, options)
    model = load_causal_lm(folder, device=device, precision=precision, trust_remote_code=trusted)
    return model, tokenizer_for(build, folder, trusted)


def token_rows(artifact: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Token table of a tokens artifact, one split or all, with plain lists of ids.

    Raises BadInput where the split is empty.
    """
    table = read_table(artifact / "tokens.parquet", columns, split)
    if split is not None and table.empty:
        raise BadInput(f"{artifact}: no pair in the split '{split}'; give it a larger share or more data")
    for column in table.columns[table.columns.str.endswith("_ids")]:
        table[column] = [ids.tolist() for ids in table[column]]
    return table


def prompt_rows(artifact: Path, split: str, count: int) -> pd.DataFrame:
    """The first ``count`` prompts of a split by prompt_id, each once: prompt_id, prompt_ids.

    Raises BadInput where the split is empty.
    """
    rows = token_rows(artifact, split, ("prompt_id", "prompt_ids")).drop_duplicates("prompt_id")
    return rows.sort_values("prompt_id").head(count).reset_index(drop=True)


def prompt_texts(artifact: Path, prompt_ids: Sequence[int], split: str | None = None) -> list[str]:
    """The prompts of a pairs artifact with these ids, in their order, each as one string; ``split``: read only that."""
    from prefopt.answers import instruction_text

    pairs = read_table(artifact / "pairs.parquet", ("prompt_id", "prompt"), split)
    prompts = pairs.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    return [instruction_text(prompts.loc[prompt_id]) for prompt_id in prompt_ids]


def run_training(
    build: Build, options: RunOptions, model: Any, objective: Objective, seed: int, *, visits: Visits | None = None
) -> list[dict[str, Any]]:
    """Train with the spec's ``train`` section; the learning curve becomes an output.

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
        visits=visits,
    )
    write_lines(build.work / "metrics.jsonl", result.metrics)
    last = result.metrics[-max(1, len(result.metrics) // 10) :]
    means = {key: sum(m[key] for m in last) / len(last) for key in last[0] if key != "step"}
    build.summary |= {"steps": result.steps, "train_seconds": round(result.seconds, 3), "last_tenth": means}
    return result.metrics
