"""Fourth step: from the margin, or from both log-ratios, to a loss per pair [B].

z is beta * difference + shift; ``softplus(-z)`` is -log sigmoid(z).
"""

from __future__ import annotations

import math
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


@step("link", "logistic")
def logistic(batch: PairBatch, terms: Terms) -> Tensor:
    """-log sigmoid(z)."""
    return F.softplus(-terms.z)


@step("link", "logistic_per_beta")
def logistic_per_beta(batch: PairBatch, terms: Terms) -> Tensor:
    """-log sigmoid(z) / beta: at a margin of zero its slope is the same for every beta."""
    return F.softplus(-terms.z) / terms.beta


@step("link", "logistic_times_beta")
def logistic_times_beta(batch: PairBatch, terms: Terms) -> Tensor:
    """-beta * log sigmoid(z / beta): beta weighs the loss and not the margin."""
    return terms.beta * F.softplus(-terms.unscaled)


@step("link", "smoothed")
def smoothed(batch: PairBatch, terms: Terms, *, label_smoothing: float = 0.1) -> Tensor:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z)."""
    z = terms.z
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)


@step("link", "debiased")
def debiased(batch: PairBatch, terms: Terms, *, label_smoothing: float = 0.1) -> Tensor:
    """[-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps)."""
    z = terms.z
    difference = (1 - label_smoothing) * F.softplus(-z) - label_smoothing * F.softplus(z)
    return difference / (1 - 2 * label_smoothing)


@step("link", "soft_labels", needs={"rewards"})
def soft_labels(batch: PairBatch, terms: Terms) -> Tensor:
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z), p = sigmoid(mean reward margin)."""
    z, rewards = terms.z, batch.reward_margin.mean(dim=1)
    return torch.sigmoid(rewards) * F.softplus(-z) + torch.sigmoid(-rewards) * F.softplus(z)


@step("link", "relabelled", needs={"rewards"})
def relabelled(batch: PairBatch, terms: Terms) -> Tensor:
    """-log sigmoid(sign(mean reward margin) * z); log 2 where that margin is zero."""
    return F.softplus(-terms.z * batch.reward_margin.mean(dim=1).sign())


@step("link", "focal")
def focal(batch: PairBatch, terms: Terms, *, gamma: float = 0.05) -> Tensor:
    """-p^gamma log p, p = sigmoid(z); the gradient goes through p^gamma and turns round where p < exp(-1 / gamma)."""
    logp = F.logsigmoid(terms.z)
    return -torch.exp(gamma * logp) * logp


@step("link", "focal_detached")
def focal_detached(batch: PairBatch, terms: Terms, *, gamma: float = 0.05) -> Tensor:
    """-p^gamma log p with p^gamma held fixed in the gradient: confident pairs count more, none turns round."""
    logp = F.logsigmoid(terms.z)
    return -torch.exp(gamma * logp.detach()) * logp


@step("link", "hinge")
def hinge(batch: PairBatch, terms: Terms, *, hinge_at: float = 1.0) -> Tensor:
    """max(0, hinge_at - z)."""
    return F.relu(hinge_at - terms.z)


@step("link", "square")
def square(batch: PairBatch, terms: Terms) -> Tensor:
    """(z / beta - 1/(2 beta))^2."""
    return (terms.unscaled - 1 / (2 * terms.beta)) ** 2


@step("link", "square_scaled")
def square_scaled(batch: PairBatch, terms: Terms) -> Tensor:
    """(z - 1/2)^2."""
    return (terms.z - 0.5) ** 2


@step("link", "exo")
def exo(batch: PairBatch, terms: Terms, *, target_smoothing: float = 1e-3) -> Tensor:
    """KL((q, 1 - q) || (1 - eps, eps)), q = sigmoid(z)."""
    z = terms.z
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-target_smoothing))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(target_smoothing))


@step("link", "anchored_zero", reads="sides")
def anchored_zero(batch: PairBatch, terms: Terms) -> Tensor:
    """1 - sigmoid(beta * chosen) + sigmoid(beta * rejected): the chosen response up, the rejected one down."""
    return torch.sigmoid(-terms.beta * terms.chosen) + torch.sigmoid(terms.beta * terms.rejected)


@step("link", "anchored_down", reads="sides")
def anchored_down(batch: PairBatch, terms: Terms) -> Tensor:
    """sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected)): both down, the rejected one further."""
    return torch.sigmoid(terms.beta * terms.chosen) + torch.sigmoid(-terms.beta * terms.difference)


@step("link", "kahneman_tversky", reads="sides", couples_pairs=True)
def kahneman_tversky(
    batch: PairBatch,
    terms: Terms,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_kl: float | None = None,
) -> Tensor:
    """Mean of w+ (1 - sigmoid(beta (chosen - k))) and w- (1 - sigmoid(beta (k - rejected))); k anchors both."""
    if reference_kl is None:
        anchor = ((terms.chosen + terms.rejected).detach().mean() / 2).clamp(min=0)
    else:
        anchor = torch.as_tensor(reference_kl, dtype=terms.chosen.dtype, device=terms.chosen.device)
    gain = desirable_weight * torch.sigmoid(-terms.beta * (terms.chosen - anchor))
    return (gain + undesirable_weight * torch.sigmoid(-terms.beta * (anchor - terms.rejected))) / 2


@step("link", "mean_reward", needs={"rewards"})
def mean_reward(batch: PairBatch, terms: Terms) -> Tensor:
    """(mean over members of the reward margin - z)^2."""
    return (batch.reward_margin.mean(dim=1) - terms.z) ** 2


@step("link", "win_rate", needs={"win_rates"})
def win_rate(batch: PairBatch, terms: Terms) -> Tensor:
    """(calibrated win rate of chosen - of rejected - z)^2."""
    return (batch.chosen_win_rate - batch.rejected_win_rate - terms.z) ** 2


@step("link", "reward_head", needs={"rewards", "reward_head"}, reads="nothing")
def reward_head(batch: PairBatch, terms: None) -> Tensor:
    """(mean over members of the reward margin - margin of the policy's own reward head)^2."""
    return (batch.reward_margin.mean(dim=1) - batch.head_margin) ** 2
