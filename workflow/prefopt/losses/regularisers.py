"""Penalties that pull the policy to the reference, kept apart from the pair losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.lazy import LazyModule
from prefopt.losses.registry import regulariser

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")


@regulariser("forward_kl", needs={"reference_samples"}, paper="2405.19316", equation="gamma KL(ref || policy)")
def forward_kl(policy_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log ref(y) - log pi(y) [S] of responses y sampled from the reference, summed over tokens, nats.

    Its mean over samples is an unbiased estimate of KL(ref || policy), and so is its gradient. Single values may
    be negative.
    """
    return ref_logp - policy_logp


@regulariser("reverse_kl", needs={"reference_samples"}, paper="2405.00747", equation="gamma KL(policy || ref)")
def reverse_kl(policy_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """r log r - r + 1 [S], r = pi(y) / ref(y), of responses y sampled from the reference; never negative.

    Its mean over samples is an unbiased estimate of KL(policy || ref), and so is its gradient: no response has to be
    drawn from the policy. The variance grows with the distance of the two.
    """
    log_ratio = policy_logp - ref_logp
    return torch.exp(log_ratio) * (log_ratio - 1) + 1


def token_forward_kl(policy_logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """sum_t mask_t * sum_v ref(v) [log ref(v) - log pi(v)] along a reference sample, nats [S].

    Logits [S, T, V] at the positions that predict each response token; mask [S, T] is 1 on response tokens. Same
    expectation over reference samples as the sum of ``forward_kl``, with less variance.
    """
    policy_logp = F.log_softmax(policy_logits, dim=-1)
    ref_logp = F.log_softmax(ref_logits, dim=-1)
    per_token = F.kl_div(policy_logp, ref_logp, reduction="none", log_target=True).sum(dim=-1)
    return per_token.masked_fill(mask == 0, 0.0).sum(dim=-1)


def linear_gamma(step: int, steps: int, start: float, end: float) -> float:
    """start + (end - start) * step / steps: the weight of the regulariser at a 0-based step."""
    return start + (end - start) * step / steps
