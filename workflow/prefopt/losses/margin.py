"""Third step: parts that change beta, either side's log-ratio, or the shift of beta * (chosen - rejected) + shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.steps import Terms, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")


def _with_sides(terms: Terms, chosen: Tensor, rejected: Tensor) -> Terms:
    return terms._replace(chosen=chosen, rejected=rejected, difference=chosen - rejected)


@step("margin", "clamp_rejected")
def clamp_rejected(batch: PairBatch, terms: Terms) -> Terms:
    """rejected -> max(0, rejected): a response that is already less likely than under the reference is left alone."""
    return _with_sides(terms, terms.chosen, F.relu(terms.rejected))


@step("margin", "keep_chosen")
def keep_chosen(batch: PairBatch, terms: Terms, *, penalty_weight: float = 5.0) -> Terms:
    """chosen -> chosen - penalty_weight * max(0, -chosen)."""
    penalty = penalty_weight * F.relu(-terms.chosen)
    return terms._replace(chosen=terms.chosen - penalty, difference=terms.difference - penalty)


@step("margin", "odds")
def odds(batch: PairBatch, terms: Terms) -> Terms:
    """x -> x - log(1 - exp x): log-odds, for mean log-probabilities without a reference."""
    return _with_sides(terms, _log_odds(terms.chosen), _log_odds(terms.rejected))


def _log_odds(logp: Tensor) -> Tensor:
    # A probability that rounds to one has infinite odds; the bound keeps the loss and its gradient finite.
    below_zero = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return below_zero - torch.log(-torch.expm1(below_zero))


@step("margin", "dispersion", needs={"dispersion"}, changes="scale")
def dispersion(batch: PairBatch, terms: Terms) -> Terms:
    """beta -> beta * c, the dispersion weight of the prompt."""
    return terms._replace(beta=terms.beta * batch.dispersion_weight)


@step("margin", "batch_beta", changes="scale", couples_pairs=True)
def batch_beta(batch: PairBatch, terms: Terms, *, sensitivity: float = 0.6, baseline_margin: float = 0.0) -> Terms:
    """beta -> beta * (1 + sensitivity * (mean difference - baseline_margin)), detached, at least 1e-3."""
    beta = terms.beta * (1 + sensitivity * (terms.difference.detach().mean() - baseline_margin))
    return terms._replace(beta=beta.clamp(min=1e-3))


@step("margin", "target", changes="shift")
def target(batch: PairBatch, terms: Terms, *, target_margin: float = 0.5) -> Terms:
    """shift - target_margin."""
    return terms.shifted(-target_margin)


@step("margin", "length", changes="shift")
def length(batch: PairBatch, terms: Terms, *, length_weight: float = 0.01) -> Terms:
    """shift + length_weight * (chosen tokens - rejected tokens)."""
    surplus = (batch.chosen_tokens - batch.rejected_tokens).to(terms.difference.dtype)
    return terms.shifted(length_weight * surplus)


def spread(reward: Tensor) -> Tensor:
    """Standard deviation over members (ddof 0) [B] of rewards [B, K]; 0 for one member."""
    return reward.detach().std(dim=1, correction=0)


@step("margin", "uncertainty_mul", needs={"rewards"})
def uncertainty_mul(batch: PairBatch, terms: Terms, *, temperature: float = 1.0) -> Terms:
    """x -> exp(-u / temperature) * x on either side, u the ensemble's spread on that response."""
    chosen, rejected = (torch.exp(-spread(r) / temperature) for r in (batch.chosen_reward, batch.rejected_reward))
    return _with_sides(terms, chosen * terms.chosen, rejected * terms.rejected)


@step("margin", "uncertainty_lcb", needs={"rewards"}, changes="shift")
def uncertainty_lcb(batch: PairBatch, terms: Terms, *, penalty: float = 0.1) -> Terms:
    """shift - penalty * (u chosen - u rejected): the difference of two lower confidence bounds."""
    return terms.shifted(-penalty * (spread(batch.chosen_reward) - spread(batch.rejected_reward)))


@step("margin", "uncertainty_att", needs={"rewards"}, changes="shift")
def uncertainty_att(batch: PairBatch, terms: Terms, *, penalty: float = 0.1) -> Terms:
    """shift + penalty * (u chosen + u rejected): uncertain pairs count as better ordered than they are."""
    return terms.shifted(penalty * (spread(batch.chosen_reward) + spread(batch.rejected_reward)))
