"""Arithmetic on the weights of models of one shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


def extrapolate(model: nn.Module, before: nn.Module, momentum: float) -> None:
    """Set every parameter of ``model`` to w + momentum (w - w'), w' the one of ``before``, in place.

    In parameters that log-probabilities are linear in, this is pi (pi / pi')^momentum up to its norm (2410.06293).
    Raises BadInput where the two do not have the same parameters.
    """
    others = dict(before.named_parameters())
    own = dict(model.named_parameters())
    odd = [name for name in {*own, *others} if name not in own or name not in others]
    odd += [name for name in own if name in others and own[name].shape != others[name].shape]
    if odd:
        raise BadInput(f"models of two shapes cannot be extrapolated: '{sorted(odd)[0]}' differs")
    with torch.no_grad():
        for name, weight in own.items():
            weight.add_(weight - others[name], alpha=momentum)
