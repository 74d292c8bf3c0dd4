"""Models and tokenizers: random ones from a spec, or Hugging Face folders on this machine."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.errors import BadInput

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.specs import ScratchModel

Precision = Literal["fp32", "bf16"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop")


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
    folder = _existing(folder)
    _require_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # many kinds, from three libraries; all mean the files are not usable
        raise BadInput(f"{folder}: the tokenizer cannot be read ({_first_line(error)})") from error


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
    folder: Path | str, *, device: str, precision: Precision = "fp32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of a folder: fp32 weights, dropout off, gradients on.

    Raises BadInput for a folder without config.json, safetensors or tokenizer, or with weights missing in it.
    """
    from transformers import AutoModelForCausalLM

    folder = _model_folder(folder)
    model, missing = _from_folder(AutoModelForCausalLM, folder, trust_remote_code)
    if missing:
        raise BadInput(f"{folder}: no weights for {missing[0]}; this is not a whole causal language model")
    return set_precision(model.to(device), precision)


def new_reward_model(
    causal_folder: Path | str,
    seed: int,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A scalar reward model: the causal model's body under a new head with N(0, 1/(hidden + 1)) weights from ``seed``.

    Head initialisation as in Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1. Raises BadInput as
    ``load_causal_lm`` does, and where the architecture has no linear score head.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = _model_folder(causal_folder)
    with torch.random.fork_rng(devices=[]):  # the library draws the missing head before we do
        model, missing = _from_folder(AutoModelForSequenceClassification, folder, trust_remote_code, num_labels=1)
    name, head = score_head(model)
    lost = [key for key in missing if not key.startswith(f"{name}.")]
    if lost:
        raise BadInput(f"{folder}: no weights for {lost[0]}; this is not a whole causal language model")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator)
        if head.bias is not None:
            head.bias.zero_()
    return set_precision(model.to(device), precision)


def load_reward_model(
    folder: Path | str, *, device: str, precision: Precision = "fp32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The reward model of a folder. Raises BadInput as ``load_causal_lm`` does, and where there is no trained head."""
    from transformers import AutoModelForSequenceClassification

    folder = _model_folder(folder)
    model, missing = _from_folder(AutoModelForSequenceClassification, folder, trust_remote_code, num_labels=1)
    if missing:
        raise BadInput(f"{folder}: no weights for {missing[0]}; this is no reward model, train one from it")
    score_head(model)
    return set_precision(model.to(device), precision)


def score_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Name and module of a sequence classifier's linear head with one output; BadInput where it has none."""
    from torch import nn

    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return name, head
    raise BadInput(f"{type(model).__name__} has no linear score head with one output; use another base model")


def set_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Let the body run in ``precision``; weights, head and log-softmax stay as they are, that is in fp32.

    bf16 is torch's autocast around the body alone, so scoring, training and generation with one model all follow
    the same policy. Returns the model.
    """
    import torch

    body = model.base_model
    wrapped = vars(body).pop("forward", None)
    if wrapped is not None:
        model.set_attn_implementation(wrapped.attention_before)
    if precision == "bf16":
        plain, attention = body.forward, model.config._attn_implementation

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(model.device.type, torch.bfloat16):
                return plain(*args, **kwargs)

        forward.attention_before = attention
        body.forward = forward
        if model.device.type == "cpu" and attention == "sdpa":  # twice as slow as eager in bf16 on CPUs
            model.set_attn_implementation("eager")
    return model


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write an ordinary Hugging Face folder: config, safetensors, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_folder(auto: Any, folder: Path, trust_remote_code: bool, **settings: Any) -> tuple[PreTrainedModel, list]:
    """A model with dropout off, in fp32, and the names of weights the folder lacks."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()  # a new reward head is reported as missing weights, over many lines
    library_logging.disable_progress_bar()
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **common, **settings)
        _zero_dropout(config)
        model, info = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **common
        )
    except Exception as error:  # unknown architecture, broken file, wrong shape: all mean an unusable folder
        raise BadInput(f"{folder}: the model cannot be loaded ({_first_line(error)})") from error
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.eval(), sorted(info["missing_keys"])


def _zero_dropout(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            _zero_dropout(value)
        elif any(word in name for word in _DROPOUT_WORDS) and isinstance(value, int | float) and value:
            setattr(config, name, 0.0)


def _existing(folder: Path | str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the path of a Hugging Face model folder")
    return folder


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadInput(f"{folder}: no tokenizer in it; save one there with tokenizer.save_pretrained('{folder}')")


def _model_folder(folder: Path | str) -> Path:
    """The folder, once it is seen to hold config.json, safetensors and a tokenizer."""
    folder = _existing(folder)
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json, so this is no model folder; save one with model.save_pretrained")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(folder.glob("*.bin"))
        found = f"only pickled weights ({pickles[0].name}), which can run code when read" if pickles else "no weights"
        raise BadInput(f"{folder}: {found}; save the model as safetensors with model.save_pretrained('{folder}')")
    _require_tokenizer(folder)
    return folder


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
