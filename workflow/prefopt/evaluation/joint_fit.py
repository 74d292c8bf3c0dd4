"""L1-penalised logistic regression with a constant and a slope per model and a free effect per prompt.

The prompts' block of the Hessian is diagonal, so that a Newton step costs a system of two unknowns per model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import FailedCheck
from prefopt.evaluation.length_control import sigmoid

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_STEPS = 1000
_OPTIMAL = 1e-8  # largest violation of the optimality conditions, in units of one comparison
_SHORTEST = 1e-4  # shorter Newton steps than this gain less than the plain step that always gains


@dataclass(frozen=True)
class JointRows:
    """Comparisons [n]: model and prompt by number, length term, label in [0, 1]; coefficients constants [models],
    slopes [models], effects [prompts], that of ``reference`` held at 0."""

    model: Numbers
    prompt: Numbers
    length: Floats
    labels: Floats
    models: int
    prompts: int
    reference: int

    def subset(self, chosen: NDArray[np.bool_]) -> JointRows:
        """The chosen comparisons, with the same numbering."""
        arrays = {name: getattr(self, name)[chosen] for name in ("model", "prompt", "length", "labels")}
        return replace(self, **arrays)

    def eta(self, b: Floats) -> Floats:
        """constant + slope length + effect [n]."""
        k = self.models
        return b[self.model] + b[k + self.model] * self.length + b[2 * k + self.prompt]

    def loss(self, b: Floats) -> float:
        """sum log(1 + e^eta) - label eta."""
        eta = self.eta(b)
        return float((np.logaddexp(0, eta) - self.labels * eta).sum())

    def columns(self, values: Floats, squared: bool = False) -> Floats:
        """X' values, or (X * X)' values, [2 models + prompts]."""
        length = self.length**2 if squared else self.length
        return np.concatenate(
            [
                np.bincount(self.model, values, self.models),
                np.bincount(self.model, values * length, self.models),
                np.bincount(self.prompt, values, self.prompts),
            ]
        )


def fit_joint(rows: JointRows, penalty: float, start: Floats | None = None, *, equal_prompts: bool = False) -> Floats:
    """argmin_b loss(b) + ||b||_1 / penalty, [2 models + prompts]; ``equal_prompts`` holds all effects at 0.

    Newton steps within the orthant of b (of the descent direction where b is 0), projected onto it; where that gains
    nothing, a proximal gradient step, which always does. Raises FailedCheck where the optimality conditions are not met
    to 1e-8 in the end.
    """
    strength = 1 / penalty
    size = 2 * rows.models + rows.prompts
    held = np.zeros(size, dtype=bool)
    held[2 * rows.models + (np.arange(rows.prompts) if equal_prompts else rows.reference)] = True
    # three columns touch a row: X'WX <= 3/4 diag(X'X), a step that cannot overshoot
    bound = 0.75 * rows.columns(np.ones(len(rows.labels)), squared=True) + 1e-12
    b = np.zeros(size) if start is None else start.copy()
    value = rows.loss(b) + strength * np.abs(b).sum()
    for _ in range(_STEPS):
        q = sigmoid(rows.eta(b))
        gradient = rows.columns(q - rows.labels)
        slope = np.where(b == 0, np.sign(gradient) * np.maximum(np.abs(gradient) - strength, 0), 0)
        slope = np.where(held, 0, np.where(b == 0, slope, gradient + strength * np.sign(b)))
        if np.abs(slope).max() <= _OPTIMAL:
            return b
        orthant = np.where(b == 0, -np.sign(slope), np.sign(b))
        step = _newton_step(rows, q * (1 - q), slope, (orthant != 0) & ~held)
        length = 1.0
        while length >= _SHORTEST:
            tried = b + length * step
            tried[tried * orthant <= 0] = 0
            now = rows.loss(tried) + strength * np.abs(tried).sum()
            if now <= value + 1e-4 * float(slope @ (tried - b)) + 1e-14 * abs(value) and (tried != b).any():
                break
            length /= 2
        else:
            aim = b - gradient / bound
            tried = np.where(held, 0, np.sign(aim) * np.maximum(np.abs(aim) - strength / bound, 0))
            now = rows.loss(tried) + strength * np.abs(tried).sum()
        b, value = tried, now
    raise FailedCheck(f"joint fit: no convergence at C = {penalty:g}, optimality violated by {np.abs(slope).max():.1e}")


def _newton_step(rows: JointRows, weights: Floats, slope: Floats, free: NDArray[np.bool_]) -> Floats:
    """-H^-1 slope over the free coefficients, by the Schur complement of the prompts' diagonal block; 0 elsewhere."""
    k = rows.models
    of_models, of_prompts = free[: 2 * k], free[2 * k :]
    diagonal = np.bincount(rows.prompt, weights, rows.prompts)
    inverse = np.divide(1, diagonal, out=np.zeros_like(diagonal), where=of_prompts & (diagonal > 0))
    cell = rows.model * rows.prompts + rows.prompt
    cross = np.concatenate([np.bincount(cell, w, k * rows.prompts) for w in (weights, weights * rows.length)])
    cross = cross.reshape(2 * k, rows.prompts)
    block = np.zeros((2 * k, 2 * k))
    of_pair = np.bincount(rows.model, weights * rows.length, k)
    block[np.arange(k), np.arange(k)] = np.bincount(rows.model, weights, k)
    block[np.arange(k, 2 * k), np.arange(k, 2 * k)] = np.bincount(rows.model, weights * rows.length**2, k)
    block[np.arange(k), np.arange(k, 2 * k)] = block[np.arange(k, 2 * k), np.arange(k)] = of_pair
    schur = (block - (cross * inverse) @ cross.T)[np.ix_(of_models, of_models)]
    schur += 1e-10 * (1 + np.trace(block) / (2 * k)) * np.eye(len(schur))  # models without rows, equal lengths
    step = np.zeros(len(slope))
    to_models = slope[: 2 * k] - (cross * inverse) @ slope[2 * k :]
    step[np.flatnonzero(of_models)] = -np.linalg.solve(schur, to_models[of_models])
    step[2 * k :] = -inverse * (slope[2 * k :] + cross.T @ step[: 2 * k])
    return step
