"""A policy as a folder that ``mlflow.transformers.load_model`` loads: its weights where they are, or copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from prefopt.files import read_json, write_text

MODEL_FILE = "MLmodel"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)


def is_whole_model(weights: Path) -> bool:
    """Whether the folder is a model by itself, and not adapters on another one."""
    return (weights / "config.json").is_file()


def model_folder(weights: Path, out: Path, model_id: str, copy: bool) -> None:
    """Write into ``out`` what MLflow keeps of a causal LM in ``weights``: its description, the tokenizer, and on
    ``copy`` the weights.

    Without a copy the description has the absolute path of ``weights``, as MLflow itself does for a local base model;
    ``mlflow.transformers.load_model(uri, base_model_path=...)`` names another place after a move.
    """
    import yaml

    flavor: dict[str, Any] = {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": read_json(weights / "config.json")["architectures"][0],
        "source_model_name": str(weights),
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
    }
    if copy:
        flavor |= {"model_binary": "model"}
        shutil.copytree(weights, out / "model", ignore=shutil.ignore_patterns(".snakemake_timestamp"))
    else:
        flavor |= {"local_base_model_path": str(weights)}
    (out / "components" / "tokenizer").mkdir(parents=True)
    for pattern in TOKENIZER_FILES:
        for path in weights.glob(pattern):
            shutil.copyfile(path, out / "components" / "tokenizer" / path.name)
    content = {"flavors": {"transformers": flavor}, "model_id": model_id, "artifact_path": "."}
    write_text(out / MODEL_FILE, yaml.safe_dump(content))
