"""Learning rates and optimisers as a training section declares them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from prefopt.specs import TrainSpec
else:
    torch = LazyModule("torch")


def total_steps(spec: TrainSpec, size: int) -> int:
    """Optimiser steps of a run over ``size`` rows: steps, or ceil(epochs * size / batch_size)."""
    if spec.steps is not None:
        return spec.steps
    assert spec.epochs is not None  # a section declares one of the two
    return math.ceil(round(spec.epochs * size / spec.batch_size, 9))


def rate_factor(spec: TrainSpec, step: int, steps: int) -> float:
    """Learning rate of a 0-based step over the peak rate: linear warm-up from 0, then the schedule down to 0.

    step/warmup before warmup; then, with u = (step - warmup) / (steps - warmup): constant 1, linear 1 - u, cosine
    (1 + cos(pi u)) / 2. These are the formulas of transformers.get_scheduler.
    """
    if step < spec.warmup_steps:
        return step / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, steps - spec.warmup_steps)
    if spec.schedule == "linear":
        return max(0.0, 1.0 - done)
    if spec.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def new_optimizer(model: PreTrainedModel, spec: TrainSpec) -> Optimizer:
    """AdamW (betas 0.9, 0.999) or RMSprop (alpha 0.99); weight decay on matrices, not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=spec.learning_rate)
    return torch.optim.AdamW(groups, lr=spec.learning_rate, fused=True)
