"""Losses of two sequence log-probabilities: DPO and the baselines it is compared with.

Shapes: every function maps a PairBatch of B pairs to a Tensor [B]. ``margin`` is the batch's
log-ratio difference in nats (policy - reference, chosen - rejected); ``softplus(-z)`` is -log sigmoid(z).
"""

from __future__ import annotations

import math
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


def mean_token_logp(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Policy log-probability per response token, chosen and rejected, each [B] in nats."""
    return batch.chosen_logp / batch.chosen_tokens, batch.rejected_logp / batch.rejected_tokens


def log_ratios(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """log pi - log ref of the chosen and of the rejected response, each [B] in nats."""
    return batch.chosen_logp - batch.ref_chosen_logp, batch.rejected_logp - batch.ref_rejected_logp


def mean_token_margin(batch: PairBatch) -> Tensor:
    """Length-normalised log-ratio of chosen - rejected [B], nats per token."""
    chosen, rejected = log_ratios(batch)
    return chosen / batch.chosen_tokens - rejected / batch.rejected_tokens


@loss("dpo", needs={"reference"}, paper="2305.18290", equation="eq. 7")
def dpo(batch: PairBatch, *, beta: float) -> Tensor:
    """-log sigmoid(beta * margin)."""
    return F.softplus(-beta * batch.margin)


@loss("dpo_mean", needs={"reference"}, paper="2305.18290", equation="eq. 7 per token")
def dpo_mean(batch: PairBatch, *, beta: float) -> Tensor:
    """-log sigmoid(beta * margin of per-token log-ratios): length-normalised DPO."""
    return F.softplus(-beta * mean_token_margin(batch))


@loss("dpo_nll", needs={"reference"}, paper="2404.19733", equation="DPO with an NLL term")
def dpo_nll(batch: PairBatch, *, beta: float, nll_weight: float = 1.0) -> Tensor:
    """DPO + nll_weight * negative log-likelihood per token of the chosen response."""
    chosen, _ = mean_token_logp(batch)
    return dpo(batch, beta=beta) - nll_weight * chosen


@loss("ipo", needs={"reference"}, paper="2310.12036", equation="eq. 17")
def ipo(batch: PairBatch, *, beta: float) -> Tensor:
    """(margin - 1/(2 beta))^2 on summed log-probabilities; beta is the paper's tau."""
    return (batch.margin - 1 / (2 * beta)) ** 2


@loss("ipo_mean", needs={"reference"}, paper="2310.12036", equation="eq. 17 per token")
def ipo_mean(batch: PairBatch, *, beta: float) -> Tensor:
    """(margin of per-token log-ratios - 1/(2 beta))^2: length-normalised IPO."""
    return (mean_token_margin(batch) - 1 / (2 * beta)) ** 2


@loss("ipo_scaled", needs={"reference"}, paper="2310.12036", equation="eq. 17 times beta^2")
def ipo_scaled(batch: PairBatch, *, beta: float) -> Tensor:
    """(beta * margin - 1/2)^2: IPO's minimiser with beta^2 times its scale."""
    return (beta * batch.margin - 0.5) ** 2


@loss("slic_hinge", needs={"reference"}, paper="2309.06657", equation="hinge loss, reference-normalised")
def slic_hinge(batch: PairBatch, *, beta: float) -> Tensor:
    """max(0, 1 - beta * margin): SLiC's hinge on reference-normalised log-probabilities."""
    return F.relu(1 - beta * batch.margin)


@loss("slic_hf", paper="2305.10425", equation="rank calibration with cross-entropy")
def slic_hf(batch: PairBatch, *, beta: float, target_margin: float = 1.0, nll_weight: float = 0.1) -> Tensor:
    """max(0, target_margin - beta * policy_margin) - nll_weight * chosen_logp; the paper has beta = 1."""
    return F.relu(target_margin - beta * batch.policy_margin) - nll_weight * batch.chosen_logp


@loss("cdpo", needs={"reference"}, paper="2305.18290", equation="eq. 7 with smoothed labels")
def cdpo(batch: PairBatch, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """(1 - eps) * dpo + eps * dpo of the swapped pair."""
    logits = beta * batch.margin
    return (1 - label_smoothing) * F.softplus(-logits) + label_smoothing * F.softplus(logits)


@loss("robust_dpo", needs={"reference"}, paper="2403.00409", equation="unbiased loss")
def robust_dpo(batch: PairBatch, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """[(1 - eps) * dpo - eps * dpo of the swapped pair] / (1 - 2 eps): unbiased under label flips of rate eps."""
    logits = beta * batch.margin
    difference = (1 - label_smoothing) * F.softplus(-logits) - label_smoothing * F.softplus(logits)
    return difference / (1 - 2 * label_smoothing)


@loss("exo_pair", needs={"reference"}, paper="2402.00856", equation="EXO on pairs, KL to smoothed labels")
def exo_pair(batch: PairBatch, *, beta: float, target_smoothing: float = 1e-3) -> Tensor:
    """KL(q || (1 - eps, eps)) with q = sigmoid(beta * margin); target_smoothing is eps, above 0."""
    logits = beta * batch.margin
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-target_smoothing))
    return chosen + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(target_smoothing))


@loss("apo_zero", needs={"reference"}, paper="2408.06266", equation="APO-zero")
def apo_zero(batch: PairBatch, *, beta: float) -> Tensor:
    """1 - sigmoid(beta * chosen log-ratio) + sigmoid(beta * rejected log-ratio): anchored preference optimisation."""
    chosen, rejected = log_ratios(batch)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@loss("rdpo", needs={"reference"}, paper="2403.19159", equation="length-regularised DPO")
def rdpo(batch: PairBatch, *, beta: float, length_weight: float = 0.01) -> Tensor:
    """-log sigmoid(beta * margin + length_weight * (chosen_tokens - rejected_tokens))."""
    surplus = (batch.chosen_tokens - batch.rejected_tokens).to(batch.margin.dtype)
    return F.softplus(-(beta * batch.margin + length_weight * surplus))


@loss("dpop", needs={"reference"}, paper="2402.13228", equation="DPO-positive")
def dpop(batch: PairBatch, *, beta: float, penalty_weight: float = 5.0) -> Tensor:
    """-log sigmoid(beta * (margin - penalty_weight * max(0, -chosen log-ratio)))."""
    chosen, _ = log_ratios(batch)
    return F.softplus(-beta * (batch.margin - penalty_weight * F.relu(-chosen)))


@loss("beta_dpo", needs={"reference"}, paper="2407.08639", equation="batch-level beta", couples_pairs=True)
def beta_dpo(batch: PairBatch, *, beta: float, sensitivity: float = 0.6, baseline_margin: float = 0.0) -> Tensor:
    """DPO with beta_batch = beta * (1 + sensitivity * (mean margin - baseline_margin)), detached, at least 1e-3."""
    scale = beta * (1 + sensitivity * (batch.margin.detach().mean() - baseline_margin))
    return F.softplus(-scale.clamp(min=1e-3) * batch.margin)


@loss("simpo", paper="2405.14734", equation="eq. 6")
def simpo(batch: PairBatch, *, beta: float, target_margin: float = 0.5) -> Tensor:
    """-log sigmoid(beta * (per-token chosen - per-token rejected) - target_margin); target_margin is the gamma."""
    chosen, rejected = mean_token_logp(batch)
    return F.softplus(-(beta * (chosen - rejected) - target_margin))


@loss("cpo", paper="2401.08417", equation="preference loss plus NLL")
def cpo(batch: PairBatch, *, beta: float, nll_weight: float = 1.0) -> Tensor:
    """-log sigmoid(beta * policy_margin) + nll_weight * negative log-likelihood per token of the chosen response."""
    chosen, _ = mean_token_logp(batch)
    return F.softplus(-beta * batch.policy_margin) - nll_weight * chosen


@loss("orpo", paper="2403.07691", equation="eq. 6")
def orpo(batch: PairBatch, *, beta: float) -> Tensor:
    """Chosen NLL per token - beta * log sigmoid(log-odds ratio) of the per-token mean probabilities; beta is lambda."""
    chosen, rejected = mean_token_logp(batch)
    return -chosen + beta * F.softplus(_log_odds(rejected) - _log_odds(chosen))


def _log_odds(logp: Tensor) -> Tensor:
    # A probability that rounds to one has infinite odds; the bound keeps the loss and its gradient finite.
    below_zero = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return below_zero - torch.log(-torch.expm1(below_zero))


@loss("kto", needs={"reference"}, paper="2402.01306", equation="Kahneman-Tversky loss", couples_pairs=True)
def kto(
    batch: PairBatch,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_kl: float | None = None,
) -> Tensor:
    """Mean of a pair's two KTO terms, w+ (1 - sigmoid(beta (a+ - z))) and w- (1 - sigmoid(beta (z - a-))).

    a+, a- are the log-ratios; z is ``reference_kl`` in nats, or else the detached batch mean of all log-ratios,
    at least 0, which stands in for the KL that the paper estimates on mismatched prompts.
    """
    chosen, rejected = log_ratios(batch)
    if reference_kl is None:
        anchor = ((chosen + rejected).detach().mean() / 2).clamp(min=0)
    else:
        anchor = torch.as_tensor(reference_kl, dtype=chosen.dtype, device=chosen.device)
    gain = desirable_weight * torch.sigmoid(-beta * (chosen - anchor))
    return (gain + undesirable_weight * torch.sigmoid(-beta * (anchor - rejected))) / 2
