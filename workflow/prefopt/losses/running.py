"""Losses that follow the margins over the run: what they compare a batch with is state of the training.

Shapes: Tensor [B] from a PairBatch; gap_mean, gap_sd and keep_draw carry no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.lazy import LazyModule
from prefopt.losses.registry import loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from prefopt.batch import PairBatch
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

_LEAST = 1e-3  # of beta, as in the authors' code
_NARROWEST = 1e-6  # nats


def kept_pairs(margin: Tensor, mean: Tensor, sd: Tensor, draw: Tensor, filter_share: float) -> Tensor:
    """1 for the pairs that the filter keeps [B]: (1 - filter_share) B of them, at least one.

    They are drawn without replacement with weights exp(-((margin - mean) / sd)^2 / 2), by the largest of log weight
    plus a Gumbel number made of ``draw``, uniform in (0, 1).
    """
    weight = -0.5 * ((margin - mean) / sd.clamp(min=_NARROWEST)) ** 2
    keys = weight - torch.log(-torch.log(draw.clamp(min=1e-12, max=1 - 1e-7)))
    count = max(1, round((1 - filter_share) * len(margin)))
    return torch.zeros_like(margin).scatter(0, keys.topk(count).indices, 1.0)


@loss(
    "beta_dpo_filtered",
    needs={"reference", "gap_state"},
    paper="2407.08639",
    equation="batch-level beta with its filter",
    couples_pairs=True,
)
def beta_dpo_filtered(batch: PairBatch, *, beta: float, sensitivity: float = 0.6, filter_share: float = 0.2) -> Tensor:
    """``beta_dpo`` with the running baseline and the filter of the authors' code: beta * (1 + sensitivity * (mean D of
    the kept - M)), at least 1e-3 and detached; M and S are the margins' mean and standard deviation with decay .9 over
    batches, those before this batch (at the first, its own). (1 - filter_share) of the batch is kept, drawn by a
    Gaussian of mean M and deviation S, and counts for all of it. Whether the code updates M before or after it uses it
    was not confirmed.
    """
    margin = batch.margin
    seen = margin.detach()
    kept = kept_pairs(seen, batch.gap_mean, batch.gap_sd, batch.keep_draw, filter_share)
    share = kept / kept.mean()
    used = beta * (1 + sensitivity * ((share * seen).mean() - batch.gap_mean.mean()))
    return share * F.softplus(-used.clamp(min=_LEAST) * margin)
