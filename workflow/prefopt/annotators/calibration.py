"""How well probabilities of a preference fit held-out votes: log-loss, calibration, accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput

Floats = NDArray[np.float64]

_BINS = 10
_SCALES = (1e-3, 1e3)


def vote_log_loss(logit: ArrayLike, share: ArrayLike) -> Floats:
    """-share log sigma(logit) - (1 - share) log sigma(-logit) [N], nats: mean log-loss over an item's votes.

    ``share`` of the votes for the first response, ties half. log 2 = 0.693 for a logit of 0.

    Raises BadInput for shares outside [0, 1].
    """
    logits, shares = np.asarray(logit, dtype=float), np.asarray(share, dtype=float)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise BadInput("vote log-loss: a share of votes is outside 0 to 1")
    return shares * np.logaddexp(0, -logits) + (1 - shares) * np.logaddexp(0, logits)


def calibration_error(logit: ArrayLike, share: ArrayLike, bins: int = _BINS) -> float:
    """Mean |share - sigma(logit)| over ``bins`` equally large groups by probability, each pair seen from both sides.

    From both sides: a pair enters as (p, share) and as (1 - p, 1 - share), so that which response comes first does not
    matter.
    """
    p, shares = 1 / (1 + np.exp(-np.asarray(logit, dtype=float))), np.asarray(share, dtype=float)
    p, shares = np.concatenate([p, 1 - p]), np.concatenate([shares, 1 - shares])
    groups = np.array_split(np.argsort(p, kind="stable"), bins)
    return float(sum(abs(float((shares[g] - p[g]).sum())) for g in groups) / len(p))


def fitted_scale(logit: ArrayLike, share: ArrayLike) -> float:
    """The factor on the logits with the smallest mean log-loss: one temperature, fitted on pairs apart."""
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logit, dtype=float)
    found = minimize_scalar(
        lambda power: float(vote_log_loss(np.exp(power) * logits, share).mean()),
        bounds=np.log(_SCALES),
        method="bounded",
    )
    return float(np.exp(found.x))


def vote_accuracy(logit: ArrayLike, share: ArrayLike) -> Floats:
    """1 where the sign of the logit is the majority's, 1/2 for a logit of 0, NaN for pairs without a majority [N]."""
    logits, lead = np.asarray(logit, dtype=float), np.asarray(share, dtype=float) - 0.5
    right = (np.sign(logits) * np.sign(lead) + 1) / 2
    return np.where(np.abs(lead) > 1e-9, right, np.nan)
