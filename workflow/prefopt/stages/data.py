"""Data preparation: pairs, the starting model with its tokenizer, token ids."""

from __future__ import annotations

import logging
from pathlib import Path

from prefopt.errors import BadInput
from prefopt.files import write_json
from prefopt.specs import DataSpec, HubModel, ScratchModel, TokensSpec
from prefopt.stages import RunOptions
from prefopt.stages.weights import SOURCE, TOKENIZER, WEIGHTS, weights_of
from prefopt.store.builds import Build
from prefopt.tables import read_table, write_table

log = logging.getLogger(__name__)


def prepare_pairs(build: Build, options: RunOptions) -> None:
    """Write pairs.parquet and refused.parquet: nothing is dropped without a reason."""
    from prefopt.pairs import build_pairs, summarise

    pairs, refused = build_pairs(_data_spec(build), Path())
    write_table(build.work / "pairs.parquet", pairs)
    write_table(build.work / "refused.parquet", refused)
    build.summary |= summarise(pairs, refused)
    log.info("%d pairs accepted, %d refused", len(pairs), len(refused))
    for reason, count in build.summary["refused"].items():
        log.info("  refused %5d: %s", count, reason)


def _data_spec(build: Build) -> DataSpec:
    """The declared data, local files by the paths and digests that the plan recorded."""
    spec = dict(build.node.spec)
    if "files" in spec["source"]:
        settings = {key: value for key, value in spec["source"].items() if key != "files"}
        digests = [file["sha256"] for file in spec["source"]["files"]]
        spec["source"] = settings | {"paths": build.node.execution["paths"], "sha256": digests}
    return DataSpec.model_validate(spec)


def prepare_model(build: Build, options: RunOptions) -> None:
    """A model from scratch with a tokenizer trained on the train split, or a pointer to a pinned one."""
    spec = build.node.spec
    if spec["kind"] == "scratch":
        _start_from_scratch(build, ScratchModel.model_validate(dict(spec)))
        return
    if spec["kind"] == "hub":
        hub = HubModel.model_validate(dict(spec))
        source = {"repo": hub.repo, "revision": hub.revision}
    else:
        source = {"path": build.node.execution["path"]}
    write_json(build.work / SOURCE, {**source, "trust_remote_code": spec["trust_remote_code"]})
    from prefopt.models import load_tokenizer

    weights = weights_of(build.work)
    build.summary["vocabulary"] = len(load_tokenizer(weights.folder, trust_remote_code=weights.trusted))


def _start_from_scratch(build: Build, spec: ScratchModel) -> None:
    from prefopt.inputs.tokenizer_training import train_tokenizer
    from prefopt.models import new_causal_lm, save_model

    pairs = read_table(build.parent("pairs") / "pairs.parquet")
    train = pairs[pairs["split"] == "train"]
    texts = [message["content"] for prompt in train["prompt"] for message in prompt] + list(train["chosen"])
    tokenizer = train_tokenizer(texts, spec.tokenizer.kind, spec.tokenizer.vocab_size)
    model = new_causal_lm(spec, tokenizer)
    save_model(model, tokenizer, build.work / WEIGHTS)
    build.summary |= {"vocabulary": len(tokenizer), "parameters": sum(p.numel() for p in model.parameters())}
    log.info("%(vocabulary)d tokens, %(parameters)d parameters", build.summary)


def tokenize(build: Build, options: RunOptions) -> None:
    """Write tokens.parquet and refused.parquet; pairs that do not fit are refused and counted."""
    from prefopt.inputs.rendering import style_of, template_record
    from prefopt.models import load_config, load_tokenizer
    from prefopt.tokens import check_embedded, tokenize_pairs

    weights = weights_of(build.parent("base"))
    tokenizer = load_tokenizer(weights.folder, trust_remote_code=weights.trusted)
    config = load_config(weights.folder, trust_remote_code=weights.trusted)
    positions = getattr(config, "max_position_embeddings", None)
    pairs = read_table(build.parent("pairs") / "pairs.parquet")
    spec = TokensSpec.model_validate(dict(build.node.spec))
    tokens, refused = tokenize_pairs(pairs, tokenizer, spec, positions)
    if tokens.empty:
        raise BadInput(f"all {len(pairs)} pairs were refused when tokenising; raise max_prompt_tokens and max_length")
    check_embedded(tokenizer, tokens, config.vocab_size)
    write_table(build.work / "tokens.parquet", tokens)
    tokenizer.save_pretrained(build.work / TOKENIZER)
    write_table(build.work / "refused.parquet", refused)
    response = (tokens["chosen_tokens"] + tokens["rejected_tokens"]) / 2
    prompts = pairs[pairs["prompt_id"].isin(tokens["prompt_id"])].drop_duplicates("prompt_id")["prompt"]
    build.summary |= template_record(tokenizer, [style_of(tokenizer, prompt, spec.template) for prompt in prompts])
    build.summary |= {
        "pairs": {split: int(count) for split, count in tokens["split"].value_counts().sort_index().items()},
        "refused": {reason: int(count) for reason, count in refused["reason"].value_counts().items()},
        "mean_prompt_tokens": round(float(tokens["prompt_tokens"].mean()), 2),
        "mean_response_tokens": round(float(response.mean()), 2),
    }
    log.info("%d pairs tokenised, %d refused", len(tokens), len(refused))
