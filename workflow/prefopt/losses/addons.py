"""Fifth step: terms [B] added to the link's loss; they read the policy's own log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.aggregation import mean_token_logp
from prefopt.losses.steps import step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")


@step("addon", "nll")
def nll(batch: PairBatch, beta: float, *, nll_weight: float = 1.0) -> Tensor:
    """nll_weight * negative log-likelihood per token of the chosen response."""
    return -nll_weight * mean_token_logp(batch)[0]


@step("addon", "nll_sum")
def nll_sum(batch: PairBatch, beta: float, *, nll_weight: float = 1.0) -> Tensor:
    """nll_weight * negative log-likelihood of the chosen response."""
    return -nll_weight * batch.chosen_logp


@step("addon", "advantage", needs={"auxiliary"})
def advantage(
    batch: PairBatch, beta: float, *, advantage_weight: float = 0.5, advantage_temperature: float = 1.0
) -> Tensor:
    """-advantage_weight * exp((auxiliary reward - value) / temperature) * chosen log-probability per token."""
    gain = (batch.auxiliary_reward - batch.value).detach() / advantage_temperature
    return -advantage_weight * torch.exp(gain) * mean_token_logp(batch)[0]


def expectile_loss(reward: Tensor, value: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(u < 0)| * u^2, u = reward - value [B]: the value that fits is that expectile of the rewards."""
    error = reward - value
    below = (error < 0).to(error.dtype)
    return (expectile - below).abs() * error**2


@step("addon", "value_fit", needs={"auxiliary"})
def value_fit(batch: PairBatch, beta: float, *, expectile: float = 0.7) -> Tensor:
    """|expectile - 1(u < 0)| * u^2, u = auxiliary reward - value: fits the value head and nothing else."""
    return expectile_loss(batch.auxiliary_reward, batch.value, expectile)


def _doubt(chosen: Tensor, rejected: Tensor, focus: float) -> Tensor:
    """(1 - sigmoid(chosen - rejected))^focus."""
    return torch.exp(focus * F.logsigmoid(rejected - chosen))


def _log_unlikelihood(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)), finite where exp(logp) rounds to one."""
    return torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(logp.dtype).eps)))


def _unlikelihood(chosen: Tensor, rejected: Tensor) -> Tensor:
    return chosen + _log_unlikelihood(rejected)


def _log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    return chosen - _log_unlikelihood(chosen) - (rejected - _log_unlikelihood(rejected))


@step("addon", "contrast")
def contrast(batch: PairBatch, beta: float, *, focus: float = 2.0) -> Tensor:
    """-beta (1 - q)^focus [log p chosen + log(1 - p rejected)], p per token, q = sigmoid(log p - log p), q detached."""
    chosen, rejected = mean_token_logp(batch)
    return -beta * _doubt(chosen.detach(), rejected.detach(), focus) * _unlikelihood(chosen, rejected)


@step("addon", "contrast_attached")
def contrast_attached(batch: PairBatch, beta: float, *, focus: float = 2.0) -> Tensor:
    """``contrast`` with the gradient through q."""
    chosen, rejected = mean_token_logp(batch)
    return -beta * _doubt(chosen, rejected, focus) * _unlikelihood(chosen, rejected)


@step("addon", "contrast_odds")
def contrast_odds(batch: PairBatch, beta: float, *, focus: float = 2.0) -> Tensor:
    """-beta (1 - q)^focus [logit p chosen - logit p rejected], p and q as in ``contrast``, q detached."""
    chosen, rejected = mean_token_logp(batch)
    return -beta * _doubt(chosen.detach(), rejected.detach(), focus) * _log_odds_ratio(chosen, rejected)


@step("addon", "contrast_odds_attached")
def contrast_odds_attached(batch: PairBatch, beta: float, *, focus: float = 2.0) -> Tensor:
    """``contrast_odds`` with the gradient through q."""
    chosen, rejected = mean_token_logp(batch)
    return -beta * _doubt(chosen, rejected, focus) * _log_odds_ratio(chosen, rejected)
