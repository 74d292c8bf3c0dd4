"""Prompt difficulties for the length-controlled win rate, from one joint fit over several models.

eta_mi = constant_m + slope_m t_mi + difficulty_i with t_mi = tanh(dl / sd(dl)) of model m (``length_term``): the
difficulty has coefficient 1 in every model, and is 0 for a reference prompt. High means easy to beat the baseline on.
Source: AlpacaEval 2.0 (2404.04475) and the notebook that made its difficulties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import BadInput
from prefopt.evaluation.joint_fit import JointRows, fit_joint
from prefopt.evaluation.length_control import N_FOLDS, PENALTIES, length_term
from prefopt.winrate import model_win_probability

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class JointFit:
    """``difficulty`` [largest index + 1], NaN where no model has a preference; ``models``: constant and slope of each.

    ``diagnostics``: ``C``; counts; ``log_loss`` per comparison with and ``log_loss_without`` the difficulties;
    ``half_correlation`` of the difficulties that the models of even and of odd place give alone (of four models or
    more), and ``reliability`` = 2 r / (1 + r), what that says about all of them together; ``not_fitted``: prompts
    without any preference.
    """

    difficulty: Floats
    models: dict[str, dict[str, float]]
    diagnostics: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """Columns ``index`` and ``instruction_difficulty``, as ``win-rate --difficulty`` reads them."""
        import pandas as pd

        known = np.flatnonzero(~np.isnan(self.difficulty))
        return pd.DataFrame({"index": known, "instruction_difficulty": self.difficulty[known]})


def fit_difficulty(annotations: pd.DataFrame, *, C: float | None = None, reference: int | None = None) -> JointFit:  # noqa: N803
    """argmin sum [log(1 + e^eta) - p eta] + ||b||_1 / C over constants, slopes and difficulties, without intercept.

    ``annotations``: ``model``, ``index``, ``preference``, ``len_model``, ``len_baseline``, all against one baseline.
    ``C`` None: five-fold cross-validated log-loss over ``logspace(-4, 4, 10)`` with fold = (model + prompt) modulo 5.
    ``reference``: index of the prompt of difficulty 0, the lowest one by default.

    Raises BadInput for unusable rows, fewer than two models, or a model that answers a prompt twice; FailedCheck where
    the fit does not converge.
    """
    table, p = _checked(annotations)
    rows, names, prompts = _rows_to_fit(table, p, reference)
    chosen = _choose(rows) if C is None else _positive(C)
    b = fit_joint(rows, chosen)
    k, n = len(names), len(rows.labels)
    difficulty = np.full(int(table["index"].max()) + 1, np.nan)
    difficulty[prompts] = b[2 * k :]
    diagnostics = {
        "C": chosen,
        "n_models": k,
        "n_prompts": len(prompts),
        "n_comparisons": n,
        "n_missing": int(np.isnan(p).sum()),
        "n_zero": int((b[2 * k :] == 0).sum()),
        "not_fitted": sorted(set(table["index"].tolist()) - set(prompts.tolist())),
        "log_loss": rows.loss(b) / n,
        "log_loss_without": rows.loss(fit_joint(rows, chosen, equal_prompts=True)) / n,
        **_reliability(rows, chosen),
    }
    models = {name: {"constant": float(b[m]), "length": float(b[k + m])} for m, name in enumerate(names)}
    return JointFit(difficulty, models, diagnostics)


def _checked(annotations: pd.DataFrame) -> tuple[pd.DataFrame, Floats]:
    needed = ("model", "index", "preference", "len_model", "len_baseline")
    if absent := [name for name in needed if name not in annotations]:
        raise BadInput(f"joint fit: annotations lack the column '{absent[0]}'; there: {', '.join(annotations)}")
    rows = annotations.reset_index(drop=True)
    index = rows["index"].to_numpy(dtype=float)
    whole = np.isfinite(index) & (index >= 0) & (index == np.floor(index))
    if not whole.all():
        row = int(np.argmin(whole))
        raise BadInput(f"joint fit: row {row} has index {index[row]}; expected the prompt's number from 0")
    rows = rows.assign(index=index.astype(np.int64))
    lengths = np.isfinite(rows[["len_model", "len_baseline"]].to_numpy(dtype=float)).all(axis=1)
    if not lengths.all():
        raise BadInput(f"joint fit: row {int(np.argmin(lengths))} has no output length")
    if (twice := rows.duplicated(["model", "index"])).any():
        again = rows.iloc[int(np.argmax(twice))]
        raise BadInput(f"joint fit: two rows of model '{again['model']}' for prompt {again['index']}; keep one")
    p = model_win_probability(rows["preference"])
    if (count := rows.loc[~np.isnan(p), "model"].nunique()) < 2:
        raise BadInput(f"joint fit: preferences of {count} models; difficulties need two or more, on the same prompts")
    return rows, p


def _rows_to_fit(rows: pd.DataFrame, p: Floats, reference: int | None) -> tuple[JointRows, list[str], Numbers]:
    """The rows that have a preference, the models' names, and the indices of the prompts."""
    # over all rows of a model, also those without a preference, as in the length-controlled win rate
    delta = (rows["len_baseline"] - rows["len_model"]).astype(float)
    length = delta.groupby(rows["model"]).transform(lambda d: length_term(d.to_numpy())).to_numpy()
    there = ~np.isnan(p)
    names = sorted(rows.loc[there, "model"].unique())
    model = np.searchsorted(names, rows.loc[there, "model"].to_numpy())
    prompts, prompt = np.unique(rows.loc[there, "index"], return_inverse=True)
    zero = prompts[0] if reference is None else reference
    if zero not in prompts:
        raise BadInput(f"joint fit: reference prompt {zero} has no preference; there: {prompts[0]} to {prompts[-1]}")
    place = int(np.searchsorted(prompts, zero))
    return JointRows(model, prompt, length[there], p[there], len(names), len(prompts), place), names, prompts


def _choose(rows: JointRows) -> float:
    """C of ``PENALTIES`` with the least held-out log-loss, the first on ties."""
    folds = (rows.model + rows.prompt) % N_FOLDS  # every prompt and every model in all folds: each can be predicted
    losses = np.zeros(len(PENALTIES))
    for fold in range(N_FOLDS):
        held = folds == fold
        b = None
        for position, penalty in enumerate(PENALTIES):
            b = fit_joint(rows.subset(~held), penalty, b)
            losses[position] += rows.subset(held).loss(b)
    return float(PENALTIES[losses.argmin()])


def _reliability(rows: JointRows, penalty: float) -> dict[str, float | None]:
    if rows.models < 4:
        return {"half_correlation": None, "reliability": None}
    halves = [fit_joint(rows.subset(rows.model % 2 == part), penalty)[2 * rows.models :] for part in (0, 1)]
    if min(np.ptp(half) for half in halves) == 0:
        return {"half_correlation": None, "reliability": None}
    r = float(np.asarray(np.corrcoef(halves))[0, 1])
    return {"half_correlation": r, "reliability": 2 * r / (1 + r)}


def _positive(value: float) -> float:
    if not (np.isfinite(value) and value > 0):
        raise BadInput(f"joint fit: C is {value}; it must be a positive number")
    return float(value)
