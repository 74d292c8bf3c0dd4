"""The linear layers of a frozen body in 4 bits, as QLoRA has them (arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

NF4 = "nf4"


def quantize_body(model: PreTrainedModel, device: str) -> None:
    """Replace the body's linear layers by NF4 ones on ``device``, one by one; embeddings, norms and head stay.

    Raises BadInput where bitsandbytes is not installed, and for a body without such layers.
    """
    from prefopt.engine.products import is_linear

    make = _layer_class()
    body = model.base_model
    layers = [(name, layer) for name, layer in body.named_modules() if is_linear(layer)]
    if not layers:
        raise BadInput(f"adapter.quantize: {type(body).__name__} has no linear layers; remove 'quantize'")
    for name, layer in layers:
        where, _, last = name.rpartition(".")
        setattr(body.get_submodule(where), last, make(layer).to(device))
    body.is_loaded_in_4bit = True  # by which peft knows


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether ``quantize_body`` was called on the model."""
    return getattr(model.base_model, "is_loaded_in_4bit", False)


def _layer_class() -> type:
    try:
        import bitsandbytes
    except ImportError:
        raise BadInput(
            "adapter.quantize nf4: bitsandbytes is not installed here; install it on a machine with a CUDA GPU "
            "(pip install bitsandbytes), or remove 'quantize' to train the adapter on the weights as they are"
        ) from None
    import torch

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        """A layer that multiplies in the type of the autocast around it, and in fp32 without one."""

        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None, quant_type=NF4)
            self.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=NF4)
            self.bias = layer.bias

        def train(self, mode: bool = True) -> Linear4bit:
            """Stay in training mode: out of it, bitsandbytes' layers give no gradients on a CPU."""
            return super().train(True)

        def forward(self, x: Any) -> Any:
            kind = x.device.type
            self.compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
            self.compute_type_is_set = True
            return super().forward(x)

    return Linear4bit
