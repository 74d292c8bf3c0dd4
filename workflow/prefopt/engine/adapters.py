"""LoRA adapters (arXiv 2106.09685): small trainable matrices beside the linear layers of a model's frozen body.

A layer gives W x + (alpha / rank) B A x. B starts at zero, so that the model at step 0 is its own reference, and the
reference stays at hand as the same model with the adapters off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.engine.quantized import NF4, is_quantized, quantize_body
from prefopt.errors import BadInput, nearest
from prefopt.inputs.sources import check_safe_weights
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from prefopt.specs import AdapterSpec
else:
    torch = LazyModule("torch")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NAME = "default"
_QUANTIZED = "quantized"  # in the file's metadata, where the adapter was trained on weights in 4 bits
_PREFIX = "base_model.model."  # of every key in an adapter file that peft reads


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether the model's body has adapters that are not merged."""
    return hasattr(model.base_model, "peft_config")


def add_adapter(model: PreTrainedModel, spec: AdapterSpec, *, seed: int, head: nn.Module | None = None) -> None:
    """Put adapters into the body, A drawn from ``seed`` and B = 0; only they and ``head`` take gradients.

    The model keeps its class and its body, so that packing, scoring and generation treat it as any other. The global
    random state is left as it was. Raises BadInput for a target that is no linear layer of the body.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    body = model.base_model
    linear = {name: part for name, part in body.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}
    names = sorted({name.rsplit(".", 1)[-1] for name in linear})
    targets = names if spec.targets == "auto" else sorted(set(spec.targets))
    for target in targets:
        if target not in names:
            raise BadInput(
                f"adapter.targets: no linear layer '{target}' in {type(body).__name__}; {nearest(target, names)}"
            )
    if not targets:
        raise BadInput(f"adapter: {type(body).__name__} has no linear layers; train it without adapter")
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in linear.values()),
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
    )
    model.requires_grad_(False)
    gpus = range(torch.cuda.device_count()) if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, body, adapter_name=_NAME)
    if head is not None:
        head.requires_grad_(True)


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without its adapters: what it was before training, from the same weights in memory."""
    layers = [layer for _, layer in _lora_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapters, and the head that was trained with them, as a folder that peft reads; nothing of the body."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    body, prefix = model.base_model, _body_prefix(model)
    state = {prefix + name: value for name, value in get_peft_model_state_dict(body, adapter_name=_NAME).items()}
    heads = {
        name: value
        for name, value in model.named_parameters()
        if value.requires_grad and not (prefix and name.startswith(prefix))
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = body.peft_config[_NAME]
    config.inference_mode = True
    config.modules_to_save = sorted({name.rsplit(".", 1)[0] for name in heads}) or None
    config.save_pretrained(folder)
    config.inference_mode, config.modules_to_save = False, None
    path = folder / ADAPTER_CONFIG  # peft writes a set in an order that changes from run to run
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"].sort()
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in (state | heads).items()}
    about = {"format": "pt"} | ({_QUANTIZED: NF4} if is_quantized(model) else {})
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=about)


def merge_adapter(model: PreTrainedModel, folder: Path, device: str = "cpu") -> bool:
    """Add (alpha / rank) B A of an adapter folder to the weights, and take over its head; whether it had one.

    Weights in 4 bits cannot hold the sum: an adapter that was trained on them stays beside them, on ``device``.
    Raises BadInput where the folder cannot be read or does not fit the model.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from safetensors import safe_open

    if is_quantized(model):
        raise BadInput(f"{folder}: no adapter stands on weights in 4 bits; train what it stands on without 'quantize'")
    check_safe_weights(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            state = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            quantized = (file.metadata() or {}).get(_QUANTIZED) == NF4
    except Exception as error:  # of several libraries; all mean an unusable folder
        raise BadInput(f"{folder}: the adapter cannot be read ({type(error).__name__}: {error})") from error
    config.task_type = config.modules_to_save = None
    prefix, body = _body_prefix(model), model.base_model
    if quantized:
        quantize_body(model, device)
    in_body = {name.removeprefix(prefix): value for name, value in state.items() if _is_adapter(name)}
    heads = {name: value for name, value in state.items() if not _is_adapter(name)}
    try:
        tuner = LoraModel(body, config, _NAME)
        _take_over(body, in_body)
        unknown = model.load_state_dict(heads, strict=False).unexpected_keys
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{folder}: the adapter does not fit {type(model).__name__} ({error})") from error
    if unknown:
        raise BadInput(f"{folder}: the adapter does not fit {type(model).__name__}, which has no {unknown[0]}")
    if not quantized:
        tuner.merge_and_unload()
        model.requires_grad_(True)
    return bool(heads)


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path], device: str) -> bool:
    """``merge_adapter`` for each folder in order; whether the last one came with a head."""
    return [merge_adapter(model, folder, device) for folder in folders][-1:] == [True]


def whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of the model with its adapters merged, under the names that it has without them; it stays as it is.

    Raises BadInput for weights in 4 bits.
    """
    if is_quantized(model):
        raise BadInput("weights in 4 bits cannot be written as a whole model; sample with the engine 'transformers'")
    state = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if not _is_adapter(name)
    }
    for name, layer in _lora_layers(model):
        state[f"{name}.weight"] = layer.get_base_layer().weight.detach() + layer.get_delta_weight(_NAME).detach()
    return state


def _take_over(body: nn.Module, state: dict[str, Tensor]) -> None:
    """Load adapter weights; ValueError where some are missing or too many."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(body, adapter_name=_NAME).keys()
    different = sorted(wanted ^ state.keys())
    if different:
        raise ValueError(f"{'no' if different[0] in wanted else 'needless'} weights for {different[0]}")
    set_peft_model_state_dict(body, state, adapter_name=_NAME)


def _lora_layers(model: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    return ((name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer))


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _body_prefix(model: PreTrainedModel) -> str:
    """What names of the body's parameters begin with in the model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."
