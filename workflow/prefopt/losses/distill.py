"""Losses that fit the policy's implicit reward margin to explicit reward models.

Shapes: Tensor [B] from a PairBatch; ``reward_margin`` is [B, K], one column per reward model, raw scale.
Labels do not enter: swapping the responses of a pair changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.losses.registry import loss

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = "2405.19316"


def member_residuals(batch: PairBatch, beta: float) -> Tensor:
    """(reward margin of member k - beta * margin)^2 [B, K]."""
    return (batch.reward_margin - beta * batch.margin.unsqueeze(1)) ** 2


@loss("distill", needs={"reference", "rewards"}, paper=_PAPER, equation="d-DPO")
def distill(batch: PairBatch, *, beta: float) -> Tensor:
    """(reward margin of the first reward model - beta * margin)^2; further columns are not used."""
    return (batch.reward_margin[:, 0] - beta * batch.margin) ** 2


def best_member(batch: PairBatch, *, beta: float) -> Tensor:
    """Per pair the member with the smallest squared residual [B]; the lowest k wins ties."""
    return member_residuals(batch, beta).detach().argmin(dim=1)


def best_member_of_batch(batch: PairBatch, *, beta: float) -> Tensor:
    """The one member whose mean squared residual over the batch is smallest, repeated [B]; the lowest k wins ties."""
    best = member_residuals(batch, beta).detach().mean(dim=0).argmin()
    return best.expand(len(batch.pair_id))


def smallest_member(batch: PairBatch, *, beta: float) -> Tensor:
    """Per pair the member with the smallest |reward margin| [B], fixed for a pair; the lowest k wins ties."""
    return batch.reward_margin.abs().argmin(dim=1)


def _matched(batch: PairBatch, beta: float, member: Tensor) -> Tensor:
    """(reward margin of each pair's member - beta * margin)^2 [B]: the choice of member carries no gradient."""
    return member_residuals(batch, beta).gather(1, member.unsqueeze(1)).squeeze(1)


@loss(
    "distill_ensemble",
    needs={"reference", "rewards"},
    paper=_PAPER,
    equation="e-DPO, minimum per pair",
    member=best_member,
)
def distill_ensemble(batch: PairBatch, *, beta: float) -> Tensor:
    """min over members k of (reward margin k - beta * margin)^2, per pair; the lowest k wins ties."""
    return _matched(batch, beta, best_member(batch, beta=beta))


@loss(
    "distill_ensemble_batch",
    needs={"reference", "rewards"},
    paper=_PAPER,
    equation="e-DPO, minimum per batch",
    couples_pairs=True,
    member=best_member_of_batch,
)
def distill_ensemble_batch(batch: PairBatch, *, beta: float) -> Tensor:
    """Squared residuals to the one member whose batch mean is smallest; the lowest member wins ties."""
    return _matched(batch, beta, best_member_of_batch(batch, beta=beta))


@loss(
    "distill_smallest",
    needs={"reference", "rewards"},
    paper=_PAPER,
    equation="d-DPO on the member of smallest |reward margin|",
    member=smallest_member,
)
def distill_smallest(batch: PairBatch, *, beta: float) -> Tensor:
    """(smallest reward margin by size over members - beta * margin)^2: a fixed target, the control for e-DPO.

    From margins of 0 the minimum of e-DPO starts at this member; here it never switches.
    """
    return _matched(batch, beta, smallest_member(batch, beta=beta))


@loss("distill_mean", needs={"reference", "rewards"}, paper=_PAPER, equation="d-DPO on the ensemble mean")
def distill_mean(batch: PairBatch, *, beta: float) -> Tensor:
    """(mean over members of the reward margin - beta * margin)^2."""
    return (batch.reward_margin.mean(dim=1) - beta * batch.margin) ** 2


@loss(
    "mallows_distill", needs={"reference", "rewards", "dispersion"}, paper=_PAPER, equation="d-DPO with 2405.14953's c"
)
def mallows_distill(batch: PairBatch, *, beta: float) -> Tensor:
    """(mean over members of the reward margin - beta * c * margin)^2, c the dispersion weight."""
    return (batch.reward_margin.mean(dim=1) - beta * batch.dispersion_weight * batch.margin) ** 2
