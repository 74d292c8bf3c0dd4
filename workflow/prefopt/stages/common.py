"""What several stages need: the weights of a parent, its token rows, a training run written down."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt import parallel
from prefopt.artifacts import outputs_digest
from prefopt.builds import Build
from prefopt.digests import short_digest
from prefopt.errors import BadInput
from prefopt.files import read_json, write_json, write_lines
from prefopt.rows import Kept
from prefopt.tables import join_one_to_one, read_table

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.answers import Mixture
    from prefopt.objectives import Objective
    from prefopt.precision import Precision
    from prefopt.stages import RunOptions
    from prefopt.trainer import Visits

log = logging.getLogger(__name__)

WEIGHTS = "weights"
TOKENIZER = "tokenizer"
SOURCE = "source.json"
BASE = "base.json"  # beside an adapter: the parent whose weights it stands on
MIXTURE = "mixture.json"  # of policies that take turns, in place of weights
PROMPTS = "prompts.parquet"  # of a prompt set, which stands where pairs and their tokens do


class Weights(NamedTuple):
    """A model folder, whether its own code may run, and the adapters to merge into its weights, in order."""

    folder: Path
    trusted: bool
    adapters: tuple[Path, ...] = ()

    def loading(self) -> dict[str, Any]:
        """What the loaders of ``models`` take beside the folder."""
        return {"adapters": self.adapters, "trust_remote_code": self.trusted}


def weights_of(artifact: Path) -> Weights:
    """Where the weights of an artifact are.

    The artifact holds them, or an adapter and the name of what it stands on, or (base models from outside) says where
    they are. Raises BadInput where that is gone, or not what the adapter was trained on.
    """
    if (artifact / WEIGHTS / BASE).is_file():
        base = read_json(artifact / WEIGHTS / BASE)
        below = artifact.parents[1] / base["base"]
        if outputs_digest(below) != base["outputs"]:
            raise BadInput(f"{below}: was made again, with another result, after the adapter of {artifact} was trained")
        found = weights_of(below)
        return found._replace(adapters=(*found.adapters, artifact / WEIGHTS))
    if (artifact / WEIGHTS).is_dir():
        return Weights(artifact / WEIGHTS, trusted=False)
    source = read_json(artifact / SOURCE)
    if "path" in source:
        folder = Path(source["path"])
        if not folder.is_dir():
            raise BadInput(f"{folder}: the model folder recorded in {artifact / SOURCE} is gone")
        return Weights(folder, source["trust_remote_code"])
    from prefopt.hub import model_snapshot

    folder = model_snapshot(source["repo"], source["revision"], code=source["trust_remote_code"])
    return Weights(folder, source["trust_remote_code"])


def warn(build: Build, text: str) -> None:
    """Say it in the log and keep it in the manifest's summary, where the report finds it."""
    log.warning("%s", text)
    build.summary.setdefault("warnings", []).append(text)


def with_adapter(build: Build, model: PreTrainedModel, seed: int, head: nn.Module | None = None) -> None:
    """Put the adapter that the spec's ``train`` section declares, if any, onto the model, with the head it trains."""
    from prefopt.adapters import add_adapter
    from prefopt.specs import AdapterSpec

    declared = build.node.spec["train"].get("adapter")
    if declared is not None:
        add_adapter(model, AdapterSpec.model_validate(declared), seed=seed, head=head)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        build.summary |= {"trained_parameters": trained, "parameters": sum(p.numel() for p in model.parameters())}


def save_trained(build: Build, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parent: str) -> None:
    """Write what was trained, by one process: a model folder, or the adapter and what its weights stand on."""
    if not parallel.is_main():
        return
    from prefopt.adapters import is_adapted, save_adapter
    from prefopt.models import save_model

    folder = build.work / WEIGHTS
    if not is_adapted(model):
        save_model(model, tokenizer, folder)
        return
    save_adapter(model, folder)
    base = {"base": build.node.parents[parent], "outputs": outputs_digest(build.parent(parent))}
    write_json(folder / BASE, base)


def device_of(build: Build, options: RunOptions) -> str:
    """The device this job runs on, recorded in the manifest; ``auto`` takes CUDA where there is a device."""
    from prefopt.models import pick_device

    build.device = pick_device(options.device)
    return build.device


def kept_rows(build: Build, name: str, keys: Sequence[Any]) -> Kept:
    """Where one pass of this job keeps finished rows: bound to the artifact, and to the bytes of its parents."""

    def folder() -> Path:
        made_from = {role: outputs_digest(build.parent(role)) for role in build.node.parents}
        return root / short_digest(made_from) / name

    root = build.scratch / "rows"
    return Kept(root, folder, list(keys))


def draw_keys(prompt_ids: pd.Series) -> list[str]:
    """prompt_id/draw of rows that have a prompt several times, draws counted from 0."""
    draws = prompt_ids.groupby(prompt_ids).cumcount()
    return [f"{prompt_id}/{draw}" for prompt_id, draw in zip(prompt_ids, draws, strict=True)]


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
    build: Build,
    options: RunOptions,
    precision: Precision = "fp32",
    quantize: str | None = None,
    role: str = "model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model of the parent in that role, and its tokenizer as ``tokenizer_for`` checks it."""
    from prefopt.models import load_causal_lm

    weights = weights_of(build.parent(role))
    device = device_of(build, options)
    settings = {"precision": precision, "quantize": quantize, **weights.loading()}
    model = load_causal_lm(weights.folder, device=device, **settings)
    return model, tokenizer_for(build, weights.folder, weights.trusted)


def answerer_of(
    build: Build, options: RunOptions, role: str = "model"
) -> tuple[PreTrainedModel | Mixture, PreTrainedTokenizerBase]:
    """What answers prompts for the parent in that role, and its tokenizer: a policy as ``policy_of``, or a mixture.

    Raises BadInput where a policy of the mixture is no longer what was mixed.
    """
    from prefopt.answers import Mixture
    from prefopt.models import load_causal_lm

    folder = build.parent(role)
    if not (folder / MIXTURE).is_file():
        return policy_of(build, options, role=role)
    models, shares = [], []
    for part in read_json(folder / MIXTURE)["policies"]:
        if part["weight"] == 0:
            continue
        below = build.results / part["policy"]
        if outputs_digest(below) != part["outputs"]:
            raise BadInput(f"{below}: was made again, with another result, after {folder} was mixed")
        weights = weights_of(below)
        models.append(load_causal_lm(weights.folder, device=device_of(build, options), **weights.loading()))
        shares.append(part["weight"])
    return Mixture(tuple(models), tuple(shares)), tokenizer_for(build, weights.folder, weights.trusted)


def token_rows(artifact: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Token table of a tokens artifact, one split or all, with plain lists of ids.

    Raises BadInput where the split is empty.
    """
    table = read_table(_table(artifact, "tokens.parquet"), columns, split)
    if split is not None and table.empty:
        raise BadInput(f"{artifact}: no pair in the split '{split}'; give it a larger share or more data")
    for column in table.columns[table.columns.str.endswith("_ids")]:
        table[column] = [ids.tolist() for ids in table[column]]
    return table


def _table(artifact: Path, name: str) -> Path:
    """A table of pairs or tokens, or the one table of a prompt set in its place."""
    prompts = artifact / PROMPTS
    return prompts if prompts.is_file() else artifact / name


VOTE_SIDES = ("chosen", "rejected", "tie")


def votes_table(artifact: Path, pair_ids: pd.Series) -> pd.DataFrame:
    """Votes on exactly these pairs of a pairs artifact, in their order: votes_chosen, votes_rejected, votes_tie.

    With votes held out also held_out_chosen and so on. Raises BadInput where the pairs have no votes.
    """
    table = read_table(artifact / "pairs.parquet")
    columns = [c for kind in ("votes", "held_out") for side in VOTE_SIDES if (c := f"{kind}_{side}") in table]
    if not columns:
        raise BadInput(
            f"{artifact / 'pairs.parquet'}: pairs without votes; declare the data with a source of kind votes, which "
            "keeps every annotator's vote"
        )
    return join_one_to_one(pair_ids.to_frame(), table[["pair_id", *columns]], str(artifact / "pairs.parquet"))


def vote_shares(artifact: Path, pair_ids: pd.Series) -> np.ndarray:
    """Share of votes for the chosen response of exactly these pairs, ties half [N]; BadInput as ``votes_table``."""
    from prefopt.annotators.agreement import vote_share

    return vote_share(votes_table(artifact, pair_ids)[[f"votes_{side}" for side in VOTE_SIDES]].to_numpy())


def prompt_rows(artifact: Path, split: str, count: int | None) -> pd.DataFrame:
    """The first ``count`` prompts of a split by prompt_id (None: all), each once: prompt_id, prompt_ids.

    ``artifact``: tokens, or a prompt set. Raises BadInput where the split is empty.
    """
    rows = token_rows(artifact, split, ("prompt_id", "prompt_ids")).drop_duplicates("prompt_id")
    return rows.sort_values("prompt_id").head(len(rows) if count is None else count).reset_index(drop=True)


def prompt_texts(artifact: Path, prompt_ids: Sequence[int], split: str | None = None) -> list[str]:
    """The prompts of pairs or a prompt set with these ids, in their order, each as one string; ``split``: only that."""
    from prefopt.answers import instruction_text

    pairs = read_table(_table(artifact, "pairs.parquet"), ("prompt_id", "prompt"), split)
    prompts = pairs.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    return [instruction_text(prompts.loc[prompt_id]) for prompt_id in prompt_ids]


def prompt_origins(artifact: Path, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Of a prompt set: ``index`` and, where the source says one, ``dataset`` of each prompt; elsewhere nothing."""
    if not (artifact / PROMPTS).is_file():
        return [{} for _ in prompt_ids]
    table = read_table(artifact / PROMPTS, ("prompt_id", "index", "dataset")).set_index("prompt_id")
    rows = [table.loc[prompt_id] for prompt_id in prompt_ids]
    return [{"index": int(row["index"])} | ({"dataset": row["dataset"]} if row["dataset"] else {}) for row in rows]


def run_training(
    build: Build, options: RunOptions, model: Any, objective: Objective, seed: int, *, visits: Visits | None = None
) -> list[dict[str, Any]]:
    """Train with the spec's ``train`` section; the learning curve becomes an output.

    Returns the curve: one dict of metrics per step.
    """
    from prefopt.kernels import use_liger
    from prefopt.specs import TrainSpec
    from prefopt.trainer import train

    build.summary |= {"liger": True} if use_liger(model) else {}
    result = train(
        model,
        objective,
        TrainSpec.model_validate(build.node.spec["train"]),
        seed=seed,
        state_dir=build.scratch / "checkpoints",
        micro_batch=options.micro_batch,
        checkpoint_steps=options.checkpoint_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        compile_layers=options.compile,
        sharding=options.sharding,
        device=device_of(build, options),
        visits=visits,
    )
    write_lines(build.work / "metrics.jsonl", result.metrics)
    last = result.metrics[-max(1, len(result.metrics) // 10) :]
    means = {key: sum(m[key] for m in last) / len(last) for key in last[0] if key != "step"}
    if parallel.world() > 1:
        build.summary |= {"processes": parallel.world(), "sharding": options.sharding}
    build.summary |= {"steps": result.steps, "train_seconds": round(result.seconds, 3), "last_tenth": means}
    return result.metrics
