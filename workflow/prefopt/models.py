"""Models and tokenizers: random ones from a spec, or Hugging Face folders on this machine."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefopt.adapters import ADAPTER_CONFIG, is_adapted, merge_adapter, whole_state
from prefopt.errors import BadInput
from prefopt.quantized import quantize_body
from prefopt.sources import check_safe_weights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.specs import ScratchModel

_log = logging.getLogger(__name__)

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


def load_config(folder: Path | str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the language model in a folder. Raises BadInput where it cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the tokenizer
        raise BadInput(f"{folder}: the model's configuration cannot be read ({_first_line(error)})") from error
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

    folder = _model_folder(folder)
    model, missing = _from_folder(AutoModelForCausalLM, folder, trust_remote_code)
    if missing:
        raise BadInput(f"{folder}: no weights for {missing[0]}; this is not a whole causal language model")
    _merge(model, adapters, device)
    if quantize is not None:
        quantize_body(model, device)
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
    return new_shared_reward_model(
        causal_folder, [seed], device=device, precision=precision, trust_remote_code=trust_remote_code
    )


def new_shared_reward_model(
    causal_folder: Path | str,
    seeds: Sequence[int],
    *,
    frozen: bool = False,
    device: str = "cpu",
    precision: Precision = "fp32",
    adapters: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """One body under K heads, head k drawn from seeds[k] as ``new_reward_model`` draws its only one.

    ``frozen``: only the heads take gradients. ``adapters`` of the causal model are merged. These are no independent
    members. Raises BadInput as ``new_reward_model`` does.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder, heads = _model_folder(causal_folder), len(seeds)
    with torch.random.fork_rng(devices=[]):  # the library draws the missing head before we do
        model, missing = _from_folder(AutoModelForSequenceClassification, folder, trust_remote_code, num_labels=heads)
    name, head = score_head(model, heads)
    lost = [key for key in missing if not key.startswith(f"{name}.")]
    if lost:
        raise BadInput(f"{folder}: no weights for {lost[0]}; this is not a whole causal language model")
    with torch.no_grad():
        for row, seed in zip(head.weight, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            row.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator)
        if head.bias is not None:
            head.bias.zero_()
    _merge(model, adapters, device)
    model.base_model.requires_grad_(not frozen)
    return set_precision(model.to(device), precision)


def load_reward_model(
    folder: Path | str,
    *,
    members: int = 1,
    device: str,
    precision: Precision = "fp32",
    adapters: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The reward model of a folder, with ``members`` heads; or of a causal model, whose last adapter has the heads.

    Raises BadInput as ``load_causal_lm`` does, and where there are not so many trained heads.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = _model_folder(folder)
    with torch.random.fork_rng(devices=[]):  # the library draws a head that the folder does not have
        model, missing = _from_folder(AutoModelForSequenceClassification, folder, trust_remote_code, num_labels=members)
    name, _ = score_head(model, members)
    headed = _merge(model, adapters, device)
    missing = [key for key in missing if not (headed and key.startswith(f"{name}."))]
    if missing:
        raise BadInput(f"{folder}: no weights for {missing[0]}; this is no reward model, train one from it")
    return set_precision(model.to(device), precision)


def score_head(model: PreTrainedModel, outputs: int = 1) -> tuple[str, nn.Linear]:
    """Name and module of a sequence classifier's linear head with that many outputs; BadInput where it has none."""
    from torch import nn

    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == outputs:
            return name, head
    count = "one output" if outputs == 1 else f"{outputs} outputs"
    raise BadInput(f"{type(model).__name__} has no linear score head with {count}; use another base model")


def set_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Let the body run in ``precision``; weights, logits and log-softmax stay as they are, that is in fp32.

    bf16 is torch's autocast around the body alone, so scoring, training and generation with one model all follow
    the same policy; gradients of the head are products of bf16 values too, see ``fused_head``. It is done on every
    device, since results depend on it; a warning says where the device has no instructions for it. Returns the model.
    """
    import torch

    body = model.base_model
    wrapped = vars(body).pop("forward", None)
    if wrapped is not None:
        model.set_attn_implementation(wrapped.attention_before)
    if precision == "bf16":
        _warn_of_slow_bf16(model.device.type)
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


@functools.lru_cache
def _warn_of_slow_bf16(kind: str) -> None:
    import torch

    if kind == "cpu":
        fast = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if not fast:
        _log.warning("this %s has no bf16 instructions: bf16 is computed, but more slowly than fp32", kind)


def low_type(model: PreTrainedModel) -> torch.dtype | None:
    """The type of products that may be rounded, where ``set_precision`` has chosen one below the weights'."""
    import torch

    return torch.bfloat16 if hasattr(vars(model.base_model).get("forward"), "attention_before") else None


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write an ordinary Hugging Face folder: config, safetensors, tokenizer. Adapters are merged in what is written."""
    model.save_pretrained(folder, **({"state_dict": whole_state(model)} if is_adapted(model) else {}))
    tokenizer.save_pretrained(folder)


def _merge(model: PreTrainedModel, adapters: Sequence[Path], device: str) -> bool:
    """Merge adapters in order; whether the last one came with a head."""
    return [merge_adapter(model, folder, device) for folder in adapters][-1:] == [True]


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
        _check_attention(config, trust_remote_code)
        model, info = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **common
        )
    except Exception as error:  # unknown architecture, broken file, wrong shape: all mean an unusable folder
        raise BadInput(f"{folder}: the model cannot be loaded ({_first_line(error)})") from error
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.eval(), sorted(info["missing_keys"])


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
        if (folder / ADAPTER_CONFIG).is_file():
            raise BadInput(f"{folder}: only an adapter, no model; name the artifact that it belongs to, or merge it")
        raise BadInput(f"{folder}: no config.json, so this is no model folder; save one with model.save_pretrained")
    if (folder / ADAPTER_CONFIG).is_file():  # the library would take the weights from where the adapter says
        raise BadInput(f"{folder}: an adapter beside the model ({ADAPTER_CONFIG}); merge it, or take it out")
    check_safe_weights(folder)
    _require_tokenizer(folder)
    return folder


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it has code of its own, which has to run; declare 'trust_remote_code: true' with the model if you trust it"
        )
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
