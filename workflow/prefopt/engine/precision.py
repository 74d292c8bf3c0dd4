"""The precision that a model computes in: bf16 around the body alone, weights and losses in fp32."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
Precision = Literal["fp32", "bf16"]


def set_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Let the body run in ``precision``; weights, logits and log-softmax stay as they are, that is in fp32.

    bf16 is torch's autocast around the body alone, so scoring, training and generation with one model all follow
    the same policy; gradients of the head are products of bf16 values too, see ``fused_head``. It is done on every
    device, since results depend on it; a warning says where the device has no instructions for it. Products in fp32
    are those of ``products``. Returns the model.
    """
    import torch

    from prefopt.engine.products import multiply_by_onednn

    multiply_by_onednn(model)
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

        vars(forward)["attention_before"] = attention
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
