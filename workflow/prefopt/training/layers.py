"""How layers run in training: activations computed again instead of kept, or compiled; the results are the same."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from prefopt.engine.packed_attention import attention_named, leave_attention_uncompiled
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")

_COMPILERS = ("g++", "clang++", "cl")

_log = logging.getLogger(__name__)


@contextmanager
def layers_run(model: PreTrainedModel, *, checkpointing: bool, compiled: bool) -> Iterator[None]:
    """The model with layers that are checkpointed, compiled or both while gradients are on, and as they were after it.

    Checkpointing keeps only the layers' inputs for the backward pass and runs every layer again there: the same
    gradients from less memory. What is asked for and not possible is left out, with a warning that says why.
    """
    layers = _layers(model) if checkpointing or compiled else []
    reason = _why_not_compiled(model.device.type) if compiled else None
    for wanted, name, why in ((checkpointing, "checkpointed", None), (compiled, "compiled", reason)):
        why_not = why if layers else f"{type(model).__name__} has no layers that transformers names as such"
        if wanted and why_not:
            _log.warning("layers are not %s: %s", name, why_not)
    if compiled and reason is None:
        leave_attention_uncompiled()
    before = {layer: vars(layer).get("forward") for layer in layers}
    for layer in layers:
        run = layer.forward
        if compiled and reason is None:
            run = torch.compile(run, dynamic=True)
        if checkpointing:
            run = _checkpointed(model, run)
        layer.forward = _with_gradients(run, layer.forward)
    try:
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _with_gradients(run: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` where gradients are on; elsewhere nothing is kept, and generation has its own shapes."""

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (run if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _checkpointed(model: PreTrainedModel, run: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def forward(*args: Any, **kwargs: Any) -> Any:
        name = model.config._attn_implementation  # by the backward pass, the model has its own attention again
        return checkpoint(
            run,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), attention_named(model, name)),
            **kwargs,
        )

    return forward


def _why_not_compiled(kind: str) -> str | None:
    if kind == "cpu":
        names = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
        found = any(shutil.which(name) for name in names)
        return None if found else f"torch.compile needs a C++ compiler on a CPU, and there is no {' or '.join(names)}"
    return None if importlib.util.find_spec("triton") else "torch.compile needs the package triton on a GPU"
