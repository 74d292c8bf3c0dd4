"""Mallows laws of rankings: phi (Kendall distance), theta (squared rank distance), and their maximum likelihood.

A ranking lists items from best to worst; the central ranking is 0, 1, ..., n - 1; 0 <= phi <= 1, and small phi is
strong agreement.
"""

from prefopt.mallows.fit import MallowsFit, consensus, fit_mallows_phi, fit_phi
from prefopt.mallows.kendall import (
    kendall_distance,
    log_normaliser,
    log_probability,
    mean_distance,
    pairwise_marginal,
    sample_mallows_phi,
    top_item_law,
    variance_distance,
)
from prefopt.mallows.spearman import (
    sample_mallows_theta,
    spearman_distance,
    theta_conditional,
    theta_law,
    theta_log_normaliser,
    theta_pairwise,
)

__all__ = [
    "MallowsFit",
    "consensus",
    "fit_mallows_phi",
    "fit_phi",
    "kendall_distance",
    "log_normaliser",
    "log_probability",
    "mean_distance",
    "pairwise_marginal",
    "sample_mallows_phi",
    "sample_mallows_theta",
    "spearman_distance",
    "theta_conditional",
    "theta_law",
    "theta_log_normaliser",
    "theta_pairwise",
    "top_item_law",
    "variance_distance",
]
