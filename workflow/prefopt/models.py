"""Causal language models and tokenizers: random ones from a spec, or folders on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.engine.adapters import is_adapted, merge_adapters, whole_state
from prefopt.engine.model_folders import (
    NOT_WHOLE,
    existing,
    from_folder,
    model_folder,
    reason,
    require_all,
    require_tokenizer,
)
from prefopt.engine.precision import Precision, set_precision
from prefopt.engine.quantized import quantize_body
from prefopt.errors import BadInput

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.specs import ScratchModel


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is cuda where a GPU is usable. Raises BadInput for cuda without one."""
    if name not in ("auto", "cpu", "cuda"):
        raise BadInput(f"device '{name}'; known: auto, cpu, cuda")
    if name == "cpu":
        return name
    import torch

    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise BadInput("device 'cuda', but torch sees no usable GPU; use 'auto' or 'cpu', or install a CUDA build")
    return "cuda" if usable else "cpu"


def load_tokenizer(folder: Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model folder. Raises BadInput where there is none or it cannot be read."""
    folder = existing(folder)
    require_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # many kinds, from three libraries; all mean the files are not usable
        raise BadInput(f"{folder}: the tokenizer cannot be read ({reason(error)})") from error


def load_config(folder: Path | str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the language model in a folder. Raises BadInput where it cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the tokenizer
        raise BadInput(f"{folder}: the model's configuration cannot be read ({reason(error)})") from error
    return config.get_text_config()


def new_causal_lm(spec: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random fp32 weights from ``spec.seed``, embeddings tied, one row per token of the tokenizer.

    The global random state is left as it was. Raises BadInput for sizes that do not fit or a tokenizer without an
    end token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so responses could never end; give it one")
    if spec.hidden % spec.heads or (spec.hidden // spec.heads) % 2:
        raise BadInput(
            f"scratch model: hidden {spec.hidden} over {spec.heads} heads; hidden/heads must be a whole, even number"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return LlamaForCausalLM(config).eval()


def load_causal_lm(
    folder: Path | str,
    *,
    device: str,
    precision: Precision = "fp32",
    adapters: Sequence[Path] = (),
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a folder: fp32 weights, dropout off, gradients on, ``adapters`` merged in order.

    ``quantize``: the body in 4 bits, after that. An adapter that was trained on such a body stays beside one. Raises
    BadInput for a folder without config.json, safetensors or tokenizer, or with weights missing in it.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(folder)
    model, missing = from_folder(AutoModelForCausalLM, folder, trust_remote_code)
    require_all(folder, missing, NOT_WHOLE)
    merge_adapters(model, adapters, device)
    if quantize is not None:
        quantize_body(model, device)
    return set_precision(model.to(device), precision)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write an ordinary Hugging Face folder: config, safetensors, tokenizer. Adapters are merged in what is written."""
    model.save_pretrained(folder, **({"state_dict": whole_state(model)} if is_adapted(model) else {}))
    tokenizer.save_pretrained(folder)
