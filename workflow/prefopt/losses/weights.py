"""Sixth step: weights per pair [B], without gradient, that multiply the sum of link and add-ons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.margin import spread
from prefopt.losses.steps import Terms, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")


@step("weight", "uncertainty", needs={"rewards"}, reads="nothing")
def uncertainty(batch: PairBatch, terms: Terms | None) -> Tensor:
    """exp(-u), u the ensemble's spread on the reward margin."""
    return torch.exp(-spread(batch.reward_margin))


def density_ratios(losses: Tensor, temperature: float) -> Tensor:
    """exp(-loss / temperature) over its mean [B]: the density that a learner wants over the one it has."""
    return torch.softmax(-losses / temperature, dim=0) * len(losses)


@step("weight", "density_ratio", needs={"rewards"}, reads="nothing", couples_pairs=True)
def density_ratio(
    batch: PairBatch, terms: Terms | None, *, risk_temperature: float = 0.5, reject_below: float = 0.0
) -> Tensor:
    """exp(-L / risk_temperature) over its mean, 0 up to reject_below; L is the members' mean loss on the label."""
    risk = F.softplus(-batch.reward_margin.detach()).mean(dim=1)
    ratio = density_ratios(risk, risk_temperature)
    return torch.where(ratio > reject_below, ratio, 0.0)


@step("weight", "likelihood")
def likelihood(batch: PairBatch, terms: Terms, *, likelihood_power: float = 0.5) -> Tensor:
    """(exp chosen + exp rejected)^likelihood_power of the aggregated log-ratios."""
    return torch.exp(likelihood_power * torch.logaddexp(terms.chosen, terms.rejected)).detach()
