"""First step: from token log-probabilities to one log-ratio per response.

Shapes: token fields [B, T] with masks that are 1 on response tokens, which may start anywhere in the row; results [B]
in nats. What stands beyond a mask reaches neither values nor gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.steps import Ratios, Reference, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def mean_token_logp(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Policy log-probability per response token, chosen and rejected, each [B] in nats."""
    return batch.chosen_logp / batch.chosen_tokens, batch.rejected_logp / batch.rejected_tokens


def log_ratios(batch: PairBatch, reference: Reference | None) -> tuple[Tensor, Tensor]:
    """log pi - log ref of the chosen and of the rejected response, each [B] in nats; log pi without a reference."""
    if reference is None:
        return batch.chosen_logp, batch.rejected_logp
    return batch.chosen_logp - reference.chosen, batch.rejected_logp - reference.rejected


@step("aggregation", "sum")
def total(batch: PairBatch, reference: Reference | None) -> Ratios:
    """Sum over response tokens."""
    chosen, rejected = log_ratios(batch, reference)
    if reference is None:
        return Ratios(chosen, rejected, batch.policy_margin)
    return Ratios(chosen, rejected, batch.policy_margin - (reference.chosen - reference.rejected))


@step("aggregation", "mean")
def mean(batch: PairBatch, reference: Reference | None) -> Ratios:
    """Mean over response tokens: length normalisation."""
    chosen, rejected = log_ratios(batch, reference)
    chosen, rejected = chosen / batch.chosen_tokens, rejected / batch.rejected_tokens
    return Ratios(chosen, rejected, chosen - rejected)


@step("aggregation", "expected_subset")
def expected_subset(batch: PairBatch, reference: Reference | None) -> Ratios:
    """ratio * min(chosen tokens, rejected tokens) / tokens: what ``subset`` gives in expectation."""
    chosen, rejected = log_ratios(batch, reference)
    kept = torch.minimum(batch.chosen_tokens, batch.rejected_tokens)
    chosen, rejected = chosen * kept / batch.chosen_tokens, rejected * kept / batch.rejected_tokens
    return Ratios(chosen, rejected, chosen - rejected)


def _weighted(batch: PairBatch, reference: Reference | None, chosen_weight: Tensor, rejected_weight: Tensor) -> Ratios:
    """Sum over response tokens of weight * log-ratio."""
    chosen, rejected = batch.chosen_token_logp, batch.rejected_token_logp
    if reference is not None:
        chosen, rejected = chosen - reference.chosen_tokens, rejected - reference.rejected_tokens
    chosen = (chosen * chosen_weight).masked_fill(batch.chosen_mask == 0, 0.0).sum(dim=1)
    rejected = (rejected * rejected_weight).masked_fill(batch.rejected_mask == 0, 0.0).sum(dim=1)
    return Ratios(chosen, rejected, chosen - rejected)


@step("aggregation", "ld", needs={"tokens"}, level="tokens")
def length_desensitised(batch: PairBatch, reference: Reference | None, *, tail_weight: float = 0.5) -> Ratios:
    """Sum in which tokens beyond the shorter response's length count tail_weight."""
    chosen_index, rejected_index = batch.chosen_mask.cumsum(dim=1), batch.rejected_mask.cumsum(dim=1)
    shorter = torch.minimum(chosen_index[:, -1:], rejected_index[:, -1:])
    ones = torch.ones_like(batch.chosen_token_logp[:, :1])
    chosen_weight = torch.where(chosen_index <= shorter, ones, tail_weight * ones)
    rejected_weight = torch.where(rejected_index <= shorter, ones, tail_weight * ones)
    return _weighted(batch, reference, chosen_weight, rejected_weight)


def _decayed(batch: PairBatch, reference: Reference | None, decay: float, first: int) -> Ratios:
    base = torch.full_like(batch.chosen_token_logp[:, :1], decay)
    exponents = ((mask.cumsum(dim=1) - 1).clamp(min=0) + first for mask in (batch.chosen_mask, batch.rejected_mask))
    return _weighted(batch, reference, *(base**exponent for exponent in exponents))


@step("aggregation", "decay", needs={"tokens"}, level="tokens")
def decayed(batch: PairBatch, reference: Reference | None, *, decay: float = 0.98) -> Ratios:
    """Sum of decay^t * ratio over response tokens t = 0, 1, ..."""
    return _decayed(batch, reference, decay, first=0)


@step("aggregation", "decay_from_one", needs={"tokens"}, level="tokens")
def decayed_from_one(batch: PairBatch, reference: Reference | None, *, decay: float = 0.98) -> Ratios:
    """Sum of decay^t * ratio over response tokens t = 1, 2, ...: ``decay`` times decay."""
    return _decayed(batch, reference, decay, first=1)


@step("aggregation", "subset", needs={"tokens", "subset"}, level="tokens")
def subset(batch: PairBatch, reference: Reference | None) -> Ratios:
    """Sum over as many tokens of either response as the shorter one has, drawn once for policy and reference."""
    return _weighted(batch, reference, batch.chosen_subset, batch.rejected_subset)


def _confidence(token_logp: Tensor, mask: Tensor, diff: Tensor, cap: float) -> Tensor:
    """1 + diff * min(1 / p, cap) [B, T] of a model's token probabilities p, without gradient."""
    inverse = torch.exp(-token_logp.detach().masked_fill(mask == 0, 0.0)).clamp(max=cap)
    return 1 + diff * inverse


@step("aggregation", "diff", needs={"tokens", "diff"}, level="tokens")
def diff_weighted(batch: PairBatch, reference: Reference | None, *, diff_cap: float = 2.0) -> Ratios:
    """Sum of (1 + diff * min(1 / pi, diff_cap)) * ratio; diff marks tokens that the other response has not."""
    weights = (
        _confidence(batch.chosen_token_logp, batch.chosen_mask, batch.chosen_diff, diff_cap),
        _confidence(batch.rejected_token_logp, batch.rejected_mask, batch.rejected_diff, diff_cap),
    )
    return _weighted(batch, reference, *weights)


@step("aggregation", "diff_own", needs={"tokens", "diff"}, level="tokens")
def diff_weighted_by_each(batch: PairBatch, reference: Reference | None, *, diff_cap: float = 2.0) -> Ratios:
    """As ``diff``, but the reference's log-probabilities are weighted by 1 / its own probabilities."""
    policy = diff_weighted(batch, None, diff_cap=diff_cap)
    if reference is None:
        return policy
    sums = []
    for tokens, mask, diff in (
        (reference.chosen_tokens, batch.chosen_mask, batch.chosen_diff),
        (reference.rejected_tokens, batch.rejected_mask, batch.rejected_diff),
    ):
        weighted = tokens * _confidence(tokens, mask, diff, diff_cap)
        sums.append(weighted.masked_fill(mask == 0, 0.0).sum(dim=1))
    chosen, rejected = policy.chosen - sums[0], policy.rejected - sums[1]
    return Ratios(chosen, rejected, chosen - rejected)
