"""Hugging Face folders on this machine: what is checked before a library reads them, and how they are read.

Weights are safetensors or refused, and a model's own code runs only where its declaration trusts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.engine.adapters import ADAPTER_CONFIG
from prefopt.errors import BadInput
from prefopt.inputs.sources import check_safe_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NOT_WHOLE = "this is not a whole causal language model"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop")


def model_folder(folder: Path | str) -> Path:
    """The folder, once it is seen to hold config.json, safetensors and a tokenizer.

    Raises BadInput where one of them is missing, and for an adapter in place of a model or beside it.
    """
    folder = existing(folder)
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise BadInput(f"{folder}: only an adapter, no model; name the artifact that it belongs to, or merge it")
        raise BadInput(f"{folder}: no config.json, so this is no model folder; save one with model.save_pretrained")
    if (folder / ADAPTER_CONFIG).is_file():  # the library would take the weights from where the adapter says
        raise BadInput(f"{folder}: an adapter beside the model ({ADAPTER_CONFIG}); merge it, or take it out")
    check_safe_weights(folder)
    require_tokenizer(folder)
    return folder


def existing(folder: Path | str) -> Path:
    """The folder as a path; BadInput where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the path of a Hugging Face model folder")
    return folder


def require_tokenizer(folder: Path) -> None:
    """BadInput where a folder holds the files of no tokenizer that the library knows."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadInput(f"{folder}: no tokenizer in it; save one there with tokenizer.save_pretrained('{folder}')")


def from_folder(auto: Any, folder: Path, trust_remote_code: bool, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model with dropout off, in fp32, and the names of weights the folder lacks.

    ``auto``: the library's class that picks the architecture; ``settings`` go into its configuration. Raises BadInput
    where the folder cannot be loaded, and where it needs code that is not trusted.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()  # a new reward head is reported as missing weights, over many lines
    library_logging.disable_progress_bar()
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **common, **settings)
        _zero_dropout(config)
        _check_attention(config, trust_remote_code)
        model, info = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **common
        )
    except Exception as error:  # unknown architecture, broken file, wrong shape: all mean an unusable folder
        raise BadInput(f"{folder}: the model cannot be loaded ({reason(error)})") from error
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.eval(), sorted(info["missing_keys"])


def require_all(folder: Path, missing: Sequence[str], otherwise: str) -> None:
    """BadInput with the first of the weights that a folder lacks; ``otherwise`` says what the folder is then."""
    if missing:
        raise BadInput(f"{folder}: no weights for {missing[0]}; {otherwise}")


def _check_attention(config: PreTrainedConfig, trusted: bool) -> None:
    """ValueError where a configuration names an attention of the hub, which is code like any other."""
    named = getattr(config, "_attn_implementation", None)
    if isinstance(named, str) and "/" in named and not trusted:
        raise ValueError(f"attention '{named}' is code from the hub, which needs trust_remote_code")


def _zero_dropout(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            _zero_dropout(value)
        elif any(word in name for word in _DROPOUT_WORDS) and isinstance(value, int | float) and value:
            setattr(config, name, 0.0)


def reason(error: Exception) -> str:
    """Why the library could not read a folder, as half a line; missing trust comes with the way out."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it has code of its own, which has to run; declare 'trust_remote_code: true' with the model if you trust it"
        )
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
