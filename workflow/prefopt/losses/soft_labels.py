"""Losses whose label is the share of annotators who voted for the chosen response, not a choice of one side.

Shapes: Tensor [B] from a PairBatch. p = ``vote_share``, ties half, without gradient; a level vote is p = 1/2.
Exchanging the two responses, with p for 1 - p, changes nothing.
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

_DPO = "2305.18290"


def _cross_entropy(share: Tensor, logits: Tensor) -> Tensor:
    """-p log sigmoid(logits) - (1 - p) log sigmoid(-logits)."""
    return share * F.softplus(-logits) + (1 - share) * F.softplus(logits)


def _smoothed(share: Tensor, label_smoothing: float) -> Tensor:
    """(1 - 2 eps) p + eps: a vote is miscast with probability eps."""
    return (1 - 2 * label_smoothing) * share + label_smoothing


@loss("dpo_votes", needs={"reference", "vote_share"}, paper=_DPO, equation="eq. 7 with shares of votes as labels")
def dpo_votes(batch: PairBatch, *, beta: float) -> Tensor:
    """p * dpo + (1 - p) * dpo of the swapped pair; a unanimous vote is DPO."""
    return _cross_entropy(batch.vote_share, beta * batch.margin)


@loss("em_dpo", needs={"reference", "responsibilities"}, paper="2405.15065", equation="M-step of one type")
def em_dpo(batch: PairBatch, *, beta: float) -> Tensor:
    """g * dpo + h * dpo of the swapped pair, g and h the responsibilities of one annotator type, summed over those
    who voted for the chosen and for the rejected response; a tie says nothing. Belongs to rounds of kind ``em``.
    """
    z = beta * batch.margin
    return batch.agreeing * F.softplus(-z) + batch.opposing * F.softplus(z)


@loss("cdpo_votes", needs={"reference", "vote_share"}, paper=_DPO, equation="smoothed labels from shares of votes")
def cdpo_votes(batch: PairBatch, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """``dpo_votes`` with (1 - 2 eps) p + eps for p; a unanimous vote is ``cdpo``."""
    return _cross_entropy(_smoothed(batch.vote_share, label_smoothing), beta * batch.margin)


@loss(
    "distill_votes",
    needs={"reference", "vote_share"},
    paper="2405.19316",
    equation="d-DPO on the log-odds of the votes",
)
def distill_votes(batch: PairBatch, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """(log-odds of (1 - 2 eps) p + eps - beta * margin)^2; eps keeps a unanimous vote finite and must be above 0."""
    return (torch.logit(_smoothed(batch.vote_share, label_smoothing)) - beta * batch.margin) ** 2
