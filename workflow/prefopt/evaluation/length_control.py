"""AlpacaEval's length-controlled win rate: a small L1-penalised logistic model, its solver and its predictions.

Per row i: t_i = tanh(dl_i / sd(dl, ddof 1)) with dl = len(baseline output) - len(model output) in code points, and
eta_i = b_length t_i + b_difficulty difficulty_i + b_model. The answer is what the fit predicts at t = 0. Which terms
exist depends on what is known about the prompts (``Comparison.variant``). Source: the metric as published with
AlpacaEval 2.0 (2404.04475).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput, FailedCheck

Floats = NDArray[np.float64]

PENALTIES = np.logspace(-4, 4, 10)
N_FOLDS = 5
GAMED_WEIGHT = 0.1  # lambda / 2 with lambda = 0.2: the two gamed runs share it
_KKT_AIM = 1e-11  # of the largest value a gradient entry could take
_KKT_ACCEPTED = 1e-9  # nearly collinear columns stop short of the aim by rounding
_NEWTON_STEPS = 200
_SWEEPS = 200


def sigmoid(eta: ArrayLike) -> Floats:
    """1 / (1 + exp(-eta)) without overflow."""
    return 0.5 * (1 + np.tanh(np.asarray(eta, dtype=float) / 2))


def length_term(delta_length: ArrayLike) -> Floats:
    """tanh(dl / sd(dl, ddof 1)), not centred; 0 where all differences are equal, for they carry no information."""
    delta = np.asarray(delta_length, dtype=float)
    spread = delta.std(ddof=1) if delta.size > 1 else 0.0
    return np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)


@dataclass(frozen=True)
class Comparison:
    """A model's rows against the baseline, and the gamed runs of the baseline that tie the shared coefficients.

    ``p`` [n] 0 baseline .. 1 model, NaN = no preference; ``delta_length`` [n] code points; ``difficulty`` [n] or None;
    ``gamed`` [m, 3] columns p, tanh length, difficulty, or None.
    """

    p: Floats
    delta_length: Floats
    difficulty: Floats | None
    gamed: Floats | None

    @property
    def variant(self) -> str:
        """The official name of the metric that these inputs allow."""
        if self.difficulty is None:
            return "length_controlled_minimal"
        return "length_controlled_noreg" if self.gamed is None else "length_controlled_v1"

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the coefficients, in their order."""
        return ("length", "model") if self.difficulty is None else ("length", "difficulty", "model")

    def training_rows(self) -> tuple[Floats, Floats, Floats]:
        """Design [N, k], soft labels [N], weights [N]: gamed rows, then the model's rows that have a preference."""
        length = length_term(self.delta_length)  # over all rows, also those without a preference
        columns = [length, np.ones_like(length)]
        if self.difficulty is not None:
            columns.insert(1, self.difficulty)
        there = ~np.isnan(self.p)
        design, labels = np.column_stack(columns)[there], self.p[there]
        weights = np.ones(len(labels))
        if self.gamed is not None:
            anchored = np.column_stack([self.gamed[:, 1:], np.zeros(len(self.gamed))])  # plays no model's own term
            design, labels = np.vstack([anchored, design]), np.concatenate([self.gamed[:, 0], labels])
            weights = np.concatenate([np.full(len(self.gamed), GAMED_WEIGHT), weights])
        return design, labels, weights

    def resampled(self, rows: NDArray[np.int64]) -> Comparison:
        """The same with these of the model's rows, some of them several times."""
        difficulty = None if self.difficulty is None else self.difficulty[rows]
        return replace(self, p=self.p[rows], delta_length=self.delta_length[rows], difficulty=difficulty)

    def without_length(self, weights: ArrayLike) -> Floats:
        """q_i = sigma(b_model + b_difficulty difficulty_i) for every row, also those without a preference."""
        named = dict(zip(self.terms, np.asarray(weights, dtype=float), strict=True))
        if self.difficulty is None:
            return np.full(self.p.size, float(sigmoid(named["model"])))
        return sigmoid(named["model"] + named["difficulty"] * self.difficulty)


def comparison_of(p: Floats, annotations: Any, difficulty: Any, gamed: Any, by_position: bool) -> Comparison:
    """Check and align the inputs of ``winrate.length_controlled_win_rate``; raises BadInput naming what is wrong."""
    columns = ["len_model", "len_baseline"] + (["index"] if difficulty is not None and not by_position else [])
    if absent := [name for name in columns if name not in annotations]:
        raise BadInput(f"length control: annotations lack the column '{absent[0]}'; there: {', '.join(annotations)}")
    lengths = annotations[["len_baseline", "len_model"]].to_numpy(dtype=float)
    if not np.isfinite(lengths).all():
        raise BadInput(f"length control: row {int(np.argmin(np.isfinite(lengths).all(axis=1)))} has no output length")
    if difficulty is None:
        if gamed is not None:
            raise BadInput("length control: gamed rows need difficulties; give both, difficulties alone, or neither")
        return Comparison(p, lengths[:, 0] - lengths[:, 1], None, None)
    index = np.arange(len(p)) if by_position else annotations["index"].to_numpy()
    return Comparison(p, lengths[:, 0] - lengths[:, 1], _difficulty_at(difficulty, index), _gamed_rows(gamed))


def _difficulty_at(difficulty: ArrayLike, index: NDArray[Any]) -> Floats:
    table = np.asarray(difficulty, dtype=float).ravel()
    known = (index >= 0) & (index < table.size)
    numbers = np.where(known, index, 0).astype(int)
    known &= (numbers == index) & np.isfinite(table[numbers])
    if not known.all():
        row = int(np.argmin(known))
        raise BadInput(
            f"length control: row {row} has index {index[row]}, which has no difficulty ({table.size} values given)"
        )
    return table[numbers]


def _gamed_rows(gamed: Any) -> Floats | None:
    if gamed is None:
        return None
    columns = ["preference", "std_delta_len", "instruction_difficulty"]
    if absent := [name for name in columns if name not in gamed]:
        raise BadInput(f"length control: gamed rows lack the column '{absent[0]}'; there: {', '.join(gamed)}")
    rows = gamed[columns].to_numpy(dtype=float)
    usable = np.isfinite(rows).all(axis=1) & (rows[:, 0] >= 0) & (rows[:, 0] <= 1)
    if not usable.all():
        row = int(np.argmin(usable))
        raise BadInput(f"length control: gamed row {row} is {rows[row].tolist()}; its preference must be 0 to 1")
    return np.column_stack([rows[:, 0], np.tanh(rows[:, 1]), rows[:, 2]])


def kkt_residual(design: Floats, labels: Floats, weights: Floats, b: Floats, penalty: float) -> float:
    """Largest violation of the optimality conditions of ``fit_l1_logistic`` at ``b``; 0 at the optimum."""
    gradient = design.T @ (weights * (sigmoid(design @ b) - labels))
    return float(_violations(gradient, b, 1 / penalty).max())


def _violations(gradient: Floats, b: Floats, strength: float) -> Floats:
    at_zero = np.maximum(np.abs(gradient) - strength, 0)
    return np.where(b == 0, at_zero, np.abs(gradient + strength * np.sign(b)))


def fit_l1_logistic(
    design: Floats, labels: Floats, weights: Floats, penalty: float, start: Floats | None = None
) -> Floats:
    """argmin_b sum_i w_i [log(1 + e^eta_i) - p_i eta_i] + ||b||_1 / C with eta = design b, and no other intercept.

    Proximal Newton: the quadratic model plus the L1 term is minimised by coordinate descent, then a line search.
    ``design`` [N, k], ``labels`` [N] in [0, 1], ``weights`` [N], ``penalty`` = C. Raises FailedCheck where the
    optimality conditions are not met in the end.
    """
    strength = 1 / penalty
    scale = max(1.0, strength, float((weights[:, None] * np.abs(design)).sum(axis=0).max(initial=0.0)))
    b = np.zeros(design.shape[1]) if start is None else start.copy()
    eta = design @ b
    objective = _objective(eta, b, labels, weights, strength)
    for _ in range(_NEWTON_STEPS):
        q = sigmoid(eta)
        gradient = design.T @ (weights * (q - labels))
        if _violations(gradient, b, strength).max() <= _KKT_AIM * scale:
            return b
        hessian = design.T @ ((weights * q * (1 - q))[:, None] * design)
        step = _quadratic_step(gradient, hessian, b, strength)
        along = float(gradient @ step) + strength * float(np.abs(b + step).sum() - np.abs(b).sum())
        size = 1.0
        while True:
            tried = b + size * step
            eta = design @ tried
            value = _objective(eta, tried, labels, weights, strength)
            # the last term lets rounding errors pass: near the optimum the gain is below them
            if value <= objective + 1e-4 * size * along + 1e-13 * abs(objective) or size < 1e-12:
                break
            size /= 2
        moved = float(np.abs(tried - b).max())
        b, objective = tried, value
        if moved <= 1e-15 * (1 + np.abs(b).max()):
            break
    residual = kkt_residual(design, labels, weights, b, penalty)
    if residual > _KKT_ACCEPTED * scale:
        raise FailedCheck(f"length control: no convergence at C = {penalty:g}, optimality violated by {residual:.1e}")
    return b


def _objective(eta: Floats, b: Floats, labels: Floats, weights: Floats, strength: float) -> float:
    return float(weights @ (np.logaddexp(0, eta) - labels * eta)) + strength * float(np.abs(b).sum())


def _quadratic_step(gradient: Floats, hessian: Floats, b: Floats, strength: float) -> Floats:
    """argmin_d g'd + d'Hd / 2 + ||b + d||_1 / C by cyclic coordinate descent."""
    curved = hessian + 1e-12 * (1 + np.trace(hessian)) * np.eye(len(b))
    step = np.zeros_like(b)
    slope = gradient.copy()
    for _ in range(_SWEEPS):
        largest = 0.0
        for j in range(len(b)):
            now = b[j] + step[j]
            pull = now * curved[j, j] - slope[j]
            new = np.sign(pull) * max(abs(pull) - strength, 0.0) / curved[j, j]
            if new != now:
                slope += curved[j] * (new - now)
                step[j] += new - now
                if new == 0:
                    step[j] = -b[j]  # exactly zero, which a sum of differences need not be
                largest = max(largest, abs(new - now))
        if largest <= 1e-15 * (1 + np.abs(b + step).max()):
            break
    return step


def checked_folds(folds: ArrayLike | None, rows: int) -> NDArray[np.int64]:
    """Fold number per training row: as given (trailing NaN ignored), else the row's number modulo 5."""
    if folds is None:
        if rows < N_FOLDS:
            raise BadInput(f"length control: {rows} rows are too few for {N_FOLDS}-fold cross-validation; give C")
        return np.arange(rows) % N_FOLDS
    given = np.asarray(folds, dtype=float).ravel()
    used = given[: np.flatnonzero(~np.isnan(given)).max(initial=-1) + 1]
    if used.size != rows or np.isnan(used).any() or len(np.unique(used)) < 2:
        raise BadInput(
            f"length control: {used.size} fold numbers for {rows} training rows (gamed rows, then rows with a "
            "preference); each row needs one, of at least two folds"
        )
    return used.astype(int)


def choose_penalty(design: Floats, labels: Floats, weights: Floats, folds: NDArray[np.int64]) -> float:
    """C of ``PENALTIES`` with the least mean over folds of the held-out mean of weight x log-loss; first on ties."""
    losses = np.zeros(len(PENALTIES))
    for fold in np.unique(folds):
        held = folds == fold
        b = None
        for position, penalty in enumerate(PENALTIES):
            b = fit_l1_logistic(design[~held], labels[~held], weights[~held], penalty, b)
            losses[position] += _objective(design[held] @ b, b, labels[held], weights[held], 0.0) / held.sum()
    return float(PENALTIES[losses.argmin()])


def mean_and_error(q: Floats) -> dict[str, float]:
    """100 mean(q) and 100 sd(q, ddof 1) / sqrt(n), under their published names; NaN error for one row."""
    # shifted by a value of its own, so that equal predictions have exactly no spread
    error = 100 * float((q - q[0]).std(ddof=1)) / q.size**0.5 if q.size > 1 else float("nan")
    return {"length_controlled_win_rate": 100 * float(q.mean()), "lc_standard_error": error}


def length_controlled_from_weights(
    weights: Mapping[str, float], difficulty: ArrayLike, baseline: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The prediction step alone: 100 mean sigma(b_model + b_difficulty difficulty), from stored weights.

    ``weights`` with ``model`` and ``difficulty``; ``difficulty`` [n], one value per row of the annotations. With
    ``baseline`` (weights of another model fitted against the same reference) its coefficients are subtracted, which
    predicts the win rate against that model: LC(a, b) = 100 - LC(b, a). Returns ``length_controlled_win_rate`` and
    ``lc_standard_error``. Raises BadInput for missing weights.
    """
    other = {"model": 0.0, "difficulty": 0.0} if baseline is None else baseline
    for given in (weights, other):
        if absent := {"model", "difficulty"} - set(given):
            raise BadInput(f"length control: weights lack '{min(absent)}'; there: {', '.join(given)}")
    slope = weights["difficulty"] - other["difficulty"]
    return mean_and_error(sigmoid(weights["model"] - other["model"] + slope * np.asarray(difficulty, dtype=float)))
