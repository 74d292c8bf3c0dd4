"""JSON schemas of the declarations, generated from the specs so that they cannot say anything else."""

from __future__ import annotations

import json

from pydantic import TypeAdapter

from prefopt.losses import COMPOSITIONS, LOSSES
from prefopt.specs import Config, DataSpec, ItemSpec, ModelSpec


def schemas() -> dict[str, str]:
    """File name -> JSON schema text for config.yaml, item files, datasets.yaml and models.yaml."""
    item = TypeAdapter(ItemSpec).json_schema()
    item["$defs"]["LossSpec"]["properties"]["name"]["enum"] = [*LOSSES, *COMPOSITIONS]
    models = {
        "config.schema.json": TypeAdapter(Config).json_schema(),
        "item.schema.json": item,
        "datasets.schema.json": TypeAdapter(dict[str, DataSpec]).json_schema(),
        "models.schema.json": TypeAdapter(dict[str, ModelSpec]).json_schema(),
    }
    return {name: json.dumps(schema, indent=2, sort_keys=True) + "\n" for name, schema in models.items()}
