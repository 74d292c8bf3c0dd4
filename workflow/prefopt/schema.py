"""JSON schemas of the declarations, generated from the specs so that they cannot say anything else."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from prefopt.losses import COMPOSITIONS, LOSSES
from prefopt.specs import Config, DataSpec, ExactItemSpec, GridItemSpec, ItemSpec, JudgeSpec, ModelSpec
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
    """An exact item where a study is declared, a grid where conditions are, else an item: each with its own errors."""
    schema = TypeAdapter(ItemSpec | GridItemSpec | ExactItemSpec).json_schema()
    schema["$defs"]["LossSpec"]["properties"]["name"]["enum"] = [*LOSSES, *COMPOSITIONS]
    schema["$defs"]["StudySpec"]["properties"]["name"]["enum"] = [*STUDIES]
    exact, grid, item = ({"$ref": f"#/$defs/{model.__name__}"} for model in (ExactItemSpec, GridItemSpec, ItemSpec))
    arms = {"if": {"required": ["conditions"]}, "then": grid, "else": item}
    return {"$defs": schema["$defs"], "if": {"required": ["study"]}, "then": exact, "else": arms}
