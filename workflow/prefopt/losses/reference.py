"""Second step: what the policy is compared with. Results [B] in nats, without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.steps import Reference, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


@step("reference", "single", needs={"reference"})
def single(batch: PairBatch) -> Reference:
    """The model that training starts from."""
    return Reference(
        batch.ref_chosen_logp, batch.ref_rejected_logp, batch.ref_chosen_token_logp, batch.ref_rejected_token_logp
    )


@step("reference", "none")
def no_reference(batch: PairBatch) -> None:
    """None: log-ratios are the policy's log-probabilities."""
    return


def _clipped(batch: PairBatch, clip: float) -> tuple[Tensor, Tensor]:
    """The second reference's log-probabilities, within a share of the first one's on either side.

    The share is clip * |b| / (|b chosen| + |b rejected|) for the chosen response, the rest of clip for the rejected;
    b is the mean log-probability of the two references.
    """
    first, second = _both(batch)
    centre = [((a + b) / 2).abs() for a, b in zip(first, second, strict=True)]
    chosen = clip * _share(centre[0], centre[1])
    shares = chosen, clip - chosen
    return tuple(
        torch.clamp(b, min=a * (1 + share), max=a * (1 - share))
        for a, b, share in zip(first, second, shares, strict=True)
    )


def _both(batch: PairBatch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first = batch.ref_chosen_logp, batch.ref_rejected_logp
    return first, (batch.other_ref_chosen_logp, batch.other_ref_rejected_logp)


def _share(part: Tensor, other: Tensor) -> Tensor:
    """part / (part + other), one half where both are zero."""
    whole = part + other
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.5)


def harmonic_weight(batch: PairBatch) -> Tensor:
    """Share of the second reference [B]: |its margin| over the sum of both references' |margins|, before clipping."""
    first, second = _both(batch)
    return _share((second[0] - second[1]).abs(), (first[0] - first[1]).abs())


def _harmonic(batch: PairBatch, second: tuple[Tensor, Tensor], weight: Tensor | float) -> Reference:
    """log 1 / ((1 - weight) / ref + weight / second) of either response."""
    weight = torch.as_tensor(weight, dtype=batch.ref_chosen_logp.dtype, device=batch.ref_chosen_logp.device)
    first = batch.ref_chosen_logp, batch.ref_rejected_logp
    sides = (
        -torch.logaddexp(torch.log1p(-weight) - a, torch.log(weight) - b) for a, b in zip(first, second, strict=True)
    )
    return Reference(*sides)


_TWO = {"reference", "second_reference"}


@step("reference", "harmonic", needs=_TWO, knows="sequence")
def harmonic(batch: PairBatch, *, second_weight: float = 0.5) -> Reference:
    """1 / ((1 - second_weight) / ref + second_weight / second ref)."""
    return _harmonic(batch, _both(batch)[1], second_weight)


@step("reference", "harmonic_clipped", needs=_TWO, knows="sequence")
def harmonic_clipped(batch: PairBatch, *, second_weight: float = 0.5, clip: float = 0.1) -> Reference:
    """``harmonic`` with the second reference's log-probability clipped to a share around the first one's."""
    return _harmonic(batch, _clipped(batch, clip), second_weight)


@step("reference", "harmonic_adaptive", needs=_TWO, knows="sequence")
def harmonic_adaptive(batch: PairBatch, *, clip: float = 0.1) -> Reference:
    """``harmonic_clipped`` with weights in proportion to each reference's unclipped |chosen - rejected|."""
    return _harmonic(batch, _clipped(batch, clip), harmonic_weight(batch))


@step("reference", "harmonic_crossed", needs=_TWO, knows="sequence")
def harmonic_crossed(batch: PairBatch, *, clip: float = 0.1) -> Reference:
    """``harmonic_adaptive`` with each weight on the other reference, and 1e-6 added to the sum of both margins."""
    first, second = _both(batch)
    margins = [(chosen - rejected).abs() for chosen, rejected in (first, second)]
    return _harmonic(batch, _clipped(batch, clip), 1 - margins[1] / (margins[0] + margins[1] + 1e-6))
