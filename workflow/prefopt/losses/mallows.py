"""MallowsPO: links whose steepness follows the dispersion of preferences over a prompt's responses.

Notation: s = beta * margin; lambda = -log phi >= 0 is ``neg_log_dispersion``; c is ``dispersion_weight``.
Shapes: [B]. Neither carries gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.batch import PairBatch
from prefopt.lazy import LazyModule
from prefopt.losses.aggregation import mean_token_logp
from prefopt.losses.registry import loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

_PAPER = "2405.14953"

# Taylor coefficients of x^2, x^4, x^6 in B(x) = x / (1 - exp(-x)) = 1 + x/2 + ...: Bernoulli numbers B_2i / (2i)!.
_B2, _B4, _B6 = 1 / 12, -1 / 720, 1 / 30240
# Where the series is used for a difference of two B, and for one value of B or B'.
_SERIES_BELOW = 0.05
_POINT_SERIES_BELOW = 1e-2


def _bernoulli(x: Tensor) -> Tensor:
    """B(x) = x / (1 - exp(-x)), B(0) = 1, for x >= 0."""
    small = x < _POINT_SERIES_BELOW
    safe = torch.where(small, torch.ones_like(x), x)
    series = 1 + x / 2 + _B2 * x**2 + _B4 * x**4 + _B6 * x**6
    return torch.where(small, series, safe / -torch.expm1(-safe))


def _bernoulli_slope(x: Tensor) -> Tensor:
    """B'(x) for x >= 0; B'(0) = 1/2."""
    small = x < _POINT_SERIES_BELOW
    safe = torch.where(small, torch.ones_like(x), x)
    decayed = -torch.expm1(-safe)
    series = 0.5 + 2 * _B2 * x + 4 * _B4 * x**3 + 6 * _B6 * x**5
    return torch.where(small, series, 1 / decayed - safe * torch.exp(-safe) / decayed**2)


def _excess_series(u: Tensor, lam: Tensor) -> Tensor:
    """G(u) - 1/2 for lam * (u + 1) < 0.05 by the Taylor series of B: no cancellation as lam -> 0."""
    # With middle = lam (u + 1/2) and half = lam / 2, G is [B(middle + half) - B(middle - half)] / (2 half).
    middle, half = lam * (u + 0.5), lam / 2
    m2, h2 = middle**2, half**2
    return middle * (2 * _B2 + 4 * _B4 * (m2 + h2) + 2 * _B6 * (3 * m2**2 + 10 * m2 * h2 + 3 * h2**2))


def _slope_series(u: Tensor, lam: Tensor) -> Tensor:
    """G'(u) by the same series."""
    m2, h2 = (lam * (u + 0.5)) ** 2, (lam / 2) ** 2
    return lam * (2 * _B2 + 4 * _B4 * (3 * m2 + h2) + 2 * _B6 * (15 * m2**2 + 30 * m2 * h2 + 3 * h2**2))


def _log_tails(u: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """log G(u) and log(1 - G(u)) for u > 0, without cancellation at either end."""
    small = lam * (u + 1) < _SERIES_BELOW
    # Each branch sees only arguments it can digest, so that neither puts a NaN into the other's gradient.
    zero, one = torch.zeros_like(u), torch.ones_like(u)
    excess = _excess_series(torch.where(small, u, zero), torch.where(small, lam, zero))
    far_u, far_lam = torch.where(small, one, u), torch.where(small, one, lam)
    lower, upper = _bernoulli(far_lam * far_u), _bernoulli(far_lam * (far_u + 1))
    log_miss = -far_lam * far_u + torch.log((lower - torch.exp(-far_lam) * upper) / far_lam)
    log_hit = torch.log1p(-torch.exp(log_miss))
    return (
        torch.where(small, torch.log(0.5 + excess), log_hit),
        torch.where(small, torch.log(0.5 - excess), log_miss),
    )


def _log_cubic(s: Tensor, lam: Tensor, smoothing: Tensor) -> Tensor:
    """log P(s) for |s| < smoothing, P the odd-about-1/2 cubic with the link's value and slope at +-smoothing."""
    small = lam * (smoothing + 1) < _SERIES_BELOW
    log_hit, log_miss = _log_tails(smoothing, lam)
    excess = torch.where(small, _excess_series(smoothing, torch.where(small, lam, 0 * lam)), torch.exp(log_hit) - 0.5)
    slope = torch.where(
        small,
        _slope_series(smoothing, torch.where(small, lam, 0 * lam)),
        _bernoulli_slope(lam * (smoothing + 1)) - _bernoulli_slope(lam * smoothing),
    )
    chord = excess / smoothing
    a1, a3 = (3 * chord - slope) / 2, (slope - chord) / (2 * smoothing**2)
    # Left of 0 the cubic is expanded about -smoothing, where all its terms are positive: its value there can be
    # as small as exp(-lambda * smoothing), which 1/2 + a1 s + a3 s^3 would lose to rounding.
    right = torch.where(s >= 0, s, torch.zeros_like(s))
    left = torch.where(s < 0, s, torch.zeros_like(s)) + smoothing
    value_left = torch.exp(log_miss) + slope * left - a3 * left**2 * (3 * smoothing - left)
    return torch.where(s >= 0, torch.log(0.5 + a1 * right + a3 * right**3), torch.log(value_left))


def log_link(s: Tensor, lam: Tensor) -> Tensor:
    """log g(s), the exact pairwise log-probability of Mallows-phi: g = G(s) for s > 0, 1 - G(-s) for s < 0.

    G(u) = [B(lam (u + 1)) - B(lam u)] / lam with B(x) = x / (1 - exp(-x)); g(0) = 1/2, where g jumps. Float64 inside.

    Source: 2405.14953, corollary 3.
    """
    wide, lam = s.double(), lam.detach().double().expand_as(s)
    at_jump = wide == 0
    log_hit, log_miss = _log_tails(torch.where(at_jump, torch.ones_like(wide), wide.abs()), lam)
    outside = torch.where(wide > 0, log_hit, log_miss)
    return torch.where(at_jump, outside.new_tensor(0.5).log(), outside).to(s.dtype)


def log_link_smooth(s: Tensor, lam: Tensor, smoothing: Tensor | float) -> Tensor:
    """``log_link`` with g replaced by a cubic on (-smoothing, smoothing) that matches its values and slopes.

    s [B]; lam [B]; smoothing a positive number or [B], in units of s. Computed in float64, returned in s's dtype.

    Source: 2405.14953, section 3.4 (ii).
    """
    wide, lam = s.double(), lam.detach().double().expand_as(s)
    width = torch.as_tensor(smoothing, dtype=wide.dtype, device=wide.device).expand_as(wide)
    inside = wide.abs() < width
    cubic = _log_cubic(torch.where(inside, wide, torch.zeros_like(wide)), lam, width)
    log_hit, log_miss = _log_tails(torch.where(inside, width, wide.abs()), lam)
    return torch.where(inside, cubic, torch.where(wide > 0, log_hit, log_miss)).to(s.dtype)


@loss("mallows_theta", needs={"reference", "dispersion"}, paper=_PAPER, equation="eq. 7 with corollary 2")
def mallows_theta(batch: PairBatch, *, beta: float) -> Tensor:
    """-log sigmoid(c * beta * margin); c = 1 is DPO."""
    return F.softplus(-beta * batch.dispersion_weight * batch.margin)


@loss("mallows_phi", needs={"reference", "dispersion"}, paper=_PAPER, equation="eq. 7 with corollary 3, smoothed (ii)")
def mallows_phi(batch: PairBatch, *, beta: float, smoothing: float = 0.1) -> Tensor:
    """-log g_smooth(beta * margin; phi), the cubic replacing the jump on (-smoothing, smoothing)."""
    return -log_link_smooth(beta * batch.margin, batch.neg_log_dispersion, smoothing)


@loss("mallows_phi_adaptive", needs={"reference", "dispersion"}, paper=_PAPER, equation="as mallows_phi, -2 log phi")
def mallows_phi_adaptive(batch: PairBatch, *, beta: float) -> Tensor:
    """``mallows_phi`` with a smoothing width of its own for every pair: -2 log phi = 2 lambda."""
    width = 2 * batch.neg_log_dispersion.detach()
    return -log_link_smooth(beta * batch.margin, batch.neg_log_dispersion, width)


@loss("mallows_phi_sigmoid", needs={"reference", "dispersion"}, paper=_PAPER, equation="eq. 7, smoothed (i)")
def mallows_phi_sigmoid(batch: PairBatch, *, beta: float) -> Tensor:
    """-log sigmoid(lambda * beta * margin): agrees with the exact link at beta * margin = +-1."""
    return F.softplus(-beta * batch.neg_log_dispersion * batch.margin)


@loss("mallows_ipo", needs={"reference", "dispersion"}, paper=_PAPER, equation="contextual scaling of IPO")
def mallows_ipo(batch: PairBatch, *, beta: float) -> Tensor:
    """(c * margin - 1/(2 beta))^2; compare with ``ipo``."""
    return (batch.dispersion_weight * batch.margin - 1 / (2 * beta)) ** 2


@loss("mallows_ipo_scaled", needs={"reference", "dispersion"}, paper=_PAPER, equation="contextual scaling of IPO")
def mallows_ipo_scaled(batch: PairBatch, *, beta: float) -> Tensor:
    """(beta * c * margin - 1/2)^2: the same minimiser with beta^2 times the scale; compare with ``ipo_scaled``."""
    return (beta * batch.dispersion_weight * batch.margin - 0.5) ** 2


@loss("mallows_simpo", needs={"dispersion"}, paper=_PAPER, equation="contextual scaling of SimPO")
def mallows_simpo(batch: PairBatch, *, beta: float, target_margin: float = 0.5) -> Tensor:
    """-log sigmoid(c * (beta * (per-token chosen - per-token rejected) - target_margin)); c = 1 is SimPO."""
    chosen, rejected = mean_token_logp(batch)
    return F.softplus(-batch.dispersion_weight * (beta * (chosen - rejected) - target_margin))
