"""JSON schemas of the declarations, generated from the specs so that they cannot say anything else."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from prefopt.losses import COMPOSITIONS, LOSSES
from prefopt.specs import (
    Config,
    DataSpec,
    DisagreementItemSpec,
    ExactItemSpec,
    GridItemSpec,
    ItemSpec,
    JudgeSpec,
    ModelSpec,
    VoteWeightItemSpec,
)
from prefopt.studies import STUDIES


def schemas() -> dict[str, str]:
    """File name -> JSON schema text for config.yaml, item files, datasets.yaml, models.yaml and judges.yaml."""
    models = {
        "config.schema.json": TypeAdapter(Config).json_schema(),
        "item.schema.json": _item_schema(),
        "datasets.schema.json": TypeAdapter(dict[str, DataSpec]).json_schema(),
        "models.schema.json": TypeAdapter(dict[str, ModelSpec]).json_schema(),
        "judges.schema.json": TypeAdapter(dict[str, JudgeSpec]).json_schema(),
    }
    return {name: json.dumps(schema, indent=2, sort_keys=True) + "\n" for name, schema in models.items()}


def _item_schema() -> dict[str, Any]:
    """The kind of item that a key of its own tells, else one with arms: each with its own errors."""
    schema = TypeAdapter(
        ItemSpec | GridItemSpec | DisagreementItemSpec | VoteWeightItemSpec | ExactItemSpec
    ).json_schema()
    schema["$defs"]["LossSpec"]["properties"]["name"]["enum"] = [*LOSSES, *COMPOSITIONS]
    schema["$defs"]["StudySpec"]["properties"]["name"]["enum"] = [*STUDIES]
    kinds = {
        "study": ExactItemSpec,
        "conditions": GridItemSpec,
        "annotated": DisagreementItemSpec,
        "betas": VoteWeightItemSpec,
    }
    chosen: dict[str, Any] = {"$ref": f"#/$defs/{ItemSpec.__name__}"}
    for key, model in reversed(kinds.items()):
        chosen = {"if": {"required": [key]}, "then": {"$ref": f"#/$defs/{model.__name__}"}, "else": chosen}
    return {"$defs": schema["$defs"]} | chosen
