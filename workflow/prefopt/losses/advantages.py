"""Losses that regress log-ratios on advantages: both responses of a pair on their own, not their order.

Shapes: Tensor [B] from a PairBatch. Advantages are scores minus the mean score of the policy's responses to the prompt;
they come from rounds that sample (``rounds``), and the reference is the policy that was sampled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.losses.registry import loss

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.batch import PairBatch

_NEEDS = {"reference", "advantages"}


@loss("apa", needs=_NEEDS, paper="2306.02231", equation="advantage-induced alignment, whole responses")
def apa(batch: PairBatch, *, beta: float) -> Tensor:
    """Mean over both responses of (log-ratio - A / beta)^2; beta is the paper's lambda (.1 in the released code), the
    reference its old policy. The advantage is that of the whole response against the mean of the prompt's samples; the
    released code has a critic and generalised advantages per token, ``apa_tokens`` is nearer to it.
    """
    chosen = batch.chosen_logp - batch.ref_chosen_logp - batch.chosen_advantage / beta
    rejected = batch.rejected_logp - batch.ref_rejected_logp - batch.rejected_advantage / beta
    return 0.5 * (chosen**2 + rejected**2)


@loss("gpo", needs=_NEEDS, paper="2410.02197", equation="general preference optimization, log Z dropped")
def gpo(batch: PairBatch, *, beta: float) -> Tensor:
    """Mean over both responses of (log-ratio - s / beta)^2, s the score s(y over pi_t) of a general preference model,
    that is its mean over pi_t's other samples for the prompt. One form with ``apa``, since those scores sum to zero.
    The paper's beta is .001, its temperature .1, with vectors of 2 to 8 numbers.
    """
    return apa(batch, beta=beta)


@loss("apa_tokens", needs={*_NEEDS, "tokens"}, paper="2306.02231", equation="advantage-induced alignment, per token")
def apa_tokens(batch: PairBatch, *, beta: float) -> Tensor:
    """``apa`` per token: mean over tokens of (token log-ratio - A / beta)^2, then over both responses. Every token has
    the advantage of its whole response, which is what discount 1 without a critic gives.
    """

    def side(logp: Tensor, ref: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
        gap = (logp - ref - advantage.unsqueeze(1) / beta).masked_fill(mask == 0, 0.0)
        return (gap**2).sum(1) / mask.sum(1)

    chosen = (batch.chosen_token_logp, batch.ref_chosen_token_logp, batch.chosen_mask, batch.chosen_advantage)
    rejected = (batch.rejected_token_logp, batch.ref_rejected_token_logp, batch.rejected_mask, batch.rejected_advantage)
    return 0.5 * (side(*chosen) + side(*rejected))
