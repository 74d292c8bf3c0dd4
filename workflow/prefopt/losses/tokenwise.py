"""Losses that weigh single response tokens.

Shapes: Tensor [B] from a PairBatch with token fields [B, T]; masks are 1 on response tokens, which may start
anywhere in the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.registry import loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")


def _weighted_margin(batch: PairBatch, chosen_weight: Tensor, rejected_weight: Tensor) -> Tensor:
    """Sum over response tokens of weight * (log pi - log ref), chosen - rejected [B]."""
    chosen = (batch.chosen_token_logp - batch.ref_chosen_token_logp) * chosen_weight
    rejected = (batch.rejected_token_logp - batch.ref_rejected_token_logp) * rejected_weight
    chosen = chosen.masked_fill(batch.chosen_mask == 0, 0.0)
    return chosen.sum(dim=1) - rejected.masked_fill(batch.rejected_mask == 0, 0.0).sum(dim=1)


@loss("ld_dpo", needs={"reference", "tokens"}, paper="2409.06411", equation="length-desensitised DPO")
def ld_dpo(batch: PairBatch, *, beta: float, tail_weight: float = 0.5) -> Tensor:
    """DPO with the tokens beyond the shorter response's length scaled by tail_weight; 1 is DPO."""
    chosen_index, rejected_index = batch.chosen_mask.cumsum(dim=1), batch.rejected_mask.cumsum(dim=1)
    shorter = torch.minimum(chosen_index[:, -1:], rejected_index[:, -1:])
    ones = torch.ones_like(batch.chosen_token_logp[:, :1])
    chosen_weight = torch.where(chosen_index <= shorter, ones, tail_weight * ones)
    rejected_weight = torch.where(rejected_index <= shorter, ones, tail_weight * ones)
    return F.softplus(-beta * _weighted_margin(batch, chosen_weight, rejected_weight))


@loss("temporal_decay", needs={"reference", "tokens"}, paper="2502.14340", equation="temporally decayed DPO")
def temporal_decay(batch: PairBatch, *, beta: float, decay: float = 0.98) -> Tensor:
    """DPO with response token t = 0, 1, ... weighted by decay^t; 1 is DPO."""
    base = torch.full_like(batch.chosen_token_logp[:, :1], decay)
    chosen_weight = base ** (batch.chosen_mask.cumsum(dim=1) - 1).clamp(min=0)
    rejected_weight = base ** (batch.rejected_mask.cumsum(dim=1) - 1).clamp(min=0)
    return F.softplus(-beta * _weighted_margin(batch, chosen_weight, rejected_weight))
