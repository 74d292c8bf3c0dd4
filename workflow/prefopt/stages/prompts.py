"""Prompt sets: prompts to answer, as token ids for one model, and a baseline's answers to them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.files import write_json
from prefopt.specs import TokensSpec
from prefopt.stages import RunOptions
from prefopt.stages.tables import PROMPTS
from prefopt.stages.weights import TOKENIZER, weights_of
from prefopt.store.builds import Build
from prefopt.tables import write_table

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from prefopt.inputs.prompt_sets import PromptSet

log = logging.getLogger(__name__)

_OUTPUTS = "outputs"


def prepare_prompts(build: Build, options: RunOptions) -> None:
    """Write prompts.parquet, refused.parquet and the tokenizer; with ``outputs`` also a baseline's answers.

    The answers are written as the ``generate`` stage writes a model's: outputs.json and responses.parquet.
    """
    from prefopt.inputs.prompt_sets import read_prompts
    from prefopt.inputs.rendering import style_of, template_record
    from prefopt.models import load_tokenizer
    from prefopt.tokens import tokenize_prompts

    spec = build.node.spec
    path = build.node.execution.get("path")
    found = read_prompts(spec["source"], Path(path) if path else None)
    weights = weights_of(build.parent("base"))
    tokenizer = load_tokenizer(weights.folder, trust_remote_code=weights.trusted)
    how = TokensSpec.model_validate(dict(spec["tokens"]))
    asked = found.table if spec[_OUTPUTS] else found.table.drop(columns="output")
    tokens, refused = tokenize_prompts(asked, tokenizer, how)
    if tokens.empty:
        raise BadInput(f"all {len(found.table)} prompts were refused when tokenising; raise tokens.max_prompt_tokens")
    table = found.table.merge(tokens, on="prompt_id", validate="one_to_one").assign(split="test")
    if spec[_OUTPUTS]:
        _write_outputs(build, found, table, tokenizer)
    write_table(build.work / PROMPTS, table.drop(columns="output"))
    write_table(build.work / "refused.parquet", refused)
    tokenizer.save_pretrained(build.work / TOKENIZER)
    reasons = refused["reason"].value_counts().to_dict()
    build.summary |= template_record(tokenizer, [style_of(tokenizer, one, how.template) for one in table["prompt"]])
    build.summary |= {
        "prompts": len(table),
        "repeated": found.repeated,
        "refused": {**found.refused, **{str(reason): int(count) for reason, count in reasons.items()}},
        "mean_prompt_tokens": round(float(table["prompt_tokens"].mean()), 2),
    }
    log.info("%d prompts, %d repeated, %d refused", len(table), found.repeated, sum(build.summary["refused"].values()))


def _write_outputs(build: Build, found: PromptSet, table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> None:
    """The rows' own outputs as answers of one model; token ids are the reading model's."""
    import pandas as pd

    from prefopt.engine.answers import instruction_text
    from prefopt.inputs.rendering import end_ids, response_ids, style_of

    without = found.table["output"].isna()
    if without.any():
        row, count = found.table[without].iloc[0], f"{int(without.sum())} of {len(without)} rows"
        raise BadInput(
            f"{row['source']}: row {row['source_row'] + 1} has no 'output' ({count} have none); answers to judge "
            "against are needed for every prompt"
        )
    records, rows = [], []
    template = build.node.spec["tokens"]["template"]
    for row in table.to_dict("records"):
        text = instruction_text(row["prompt"])
        records.append(
            {
                "instruction": text,
                "output": row["output"],
                "generator": found.generator,
                "dataset": row["dataset"],
                "prompt_id": row["prompt_id"],
            }
        )
        style = style_of(tokenizer, row["prompt"], template)
        said = row["output"].strip()  # an empty answer is an answer
        ids = response_ids(tokenizer, row["output"], style) if said else end_ids(tokenizer, style)
        rows.append({"prompt_id": row["prompt_id"], "prompt_ids": row["prompt_ids"], "response_ids": ids})
    responses = pd.DataFrame(rows)
    responses["tokens"] = responses["response_ids"].map(len)
    write_json(build.work / "outputs.json", records)
    write_table(build.work / "responses.parquet", responses.assign(ended=True))
