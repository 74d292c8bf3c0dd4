"""Pair losses and regularisers by name. Importing this package does not import torch."""

from prefopt.losses import distill, mallows, pairwise, regularisers, tokenwise
from prefopt.losses.registry import (
    COMPOSITIONS,
    LOSSES,
    NEEDS,
    REGULARISERS,
    Composition,
    Loss,
    Regulariser,
    get_loss,
    get_regulariser,
    loss,
    regulariser,
)
from prefopt.losses.regularisers import forward_kl, linear_gamma, token_forward_kl

__all__ = [
    "COMPOSITIONS",
    "LOSSES",
    "NEEDS",
    "REGULARISERS",
    "Composition",
    "Loss",
    "Regulariser",
    "distill",
    "forward_kl",
    "get_loss",
    "get_regulariser",
    "linear_gamma",
    "loss",
    "mallows",
    "pairwise",
    "regulariser",
    "regularisers",
    "token_forward_kl",
    "tokenwise",
]
