"""One value per prompt for the length-controlled win rate, so that it can be averaged over seeds and compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from prefopt.evaluation.length_control import Comparison, Floats, sigmoid


def prompt_values(compared: Comparison, weights: ArrayLike) -> Floats:
    """Values [n] in points whose mean is the length-controlled win rate and whose spread is its error over prompts.

    The infinitesimal jackknife at fixed penalty: v_i = q_i + n g . H^-1 x_i (p_i - sigma(x_i . b)), centred on the mean
    of q, with q_i the prediction at equal lengths, g the mean of its gradient, and H the curvature of the loss over the
    coefficients that are not 0. The spread of the length differences is taken as known; a row without a preference
    moves no coefficient.
    """
    b = np.asarray(weights, dtype=float)
    design, _, row_weights = compared.training_rows()
    there = ~np.isnan(compared.p)
    own = design[len(design) - int(there.sum()) :]  # the model's rows are the last ones
    held = b != 0
    slope = sigmoid(design @ b)
    curvature = design[:, held].T @ ((row_weights * slope * (1 - slope))[:, None] * design[:, held])
    q = compared.without_length(b)
    equal = own.copy()
    equal[:, 0] = 0.0
    at_equal = sigmoid(equal @ b)
    gradient = ((at_equal * (1 - at_equal))[:, None] * equal[:, held]).mean(axis=0)
    pushed = np.zeros(len(q))
    residual = compared.p[there] - sigmoid(own @ b)
    pushed[there] = len(q) * (own[:, held] @ (np.linalg.pinv(curvature) @ gradient)) * residual
    return 100 * (q + pushed - pushed.mean())
