"""Pair losses and regularisers by name. Importing this package does not import torch."""

from prefopt.losses import advantages, baselines, distill, mallows, methods, regularisers, running, soft_labels
from prefopt.losses.entries import Composition, Loss, Regulariser
from prefopt.losses.registry import COMPOSITIONS, LOSSES, REGULARISERS, get_loss, get_regulariser, loss, regulariser
from prefopt.losses.regularisers import forward_kl, linear_gamma, reverse_kl, token_forward_kl
from prefopt.losses.steps import KINDS, NEEDS, STEPS, Combination

__all__ = [
    "COMPOSITIONS",
    "KINDS",
    "LOSSES",
    "NEEDS",
    "REGULARISERS",
    "STEPS",
    "Combination",
    "Composition",
    "Loss",
    "Regulariser",
    "advantages",
    "baselines",
    "distill",
    "forward_kl",
    "get_loss",
    "get_regulariser",
    "linear_gamma",
    "loss",
    "mallows",
    "methods",
    "regulariser",
    "regularisers",
    "reverse_kl",
    "running",
    "soft_labels",
    "token_forward_kl",
]
