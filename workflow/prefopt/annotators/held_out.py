"""Policies against held-out votes: sigma(beta x margin) as the probability that an annotator prefers a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefopt.annotators.calibration import calibration_error, fitted_scale, vote_accuracy, vote_log_loss
from prefopt.errors import FailedCheck
from prefopt.grids.estimates import crossed_interval, seed_interval

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

METRICS = {
    "log_loss": "log-loss (nats)",
    "scaled_log_loss": "log-loss, scale fitted",
    "calibration_error": "calibration error",
    "accuracy": "accuracy",
}
LOWER_IS_BETTER = frozenset({"log_loss", "scaled_log_loss", "calibration_error"})
_RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Margins:
    """One run on held-out pairs: ``logit`` = beta x margin of chosen over rejected [N], ``share`` of votes for chosen.

    ``prompt`` [N] names the pairs' prompts, ``split`` [N] is validation or test.
    """

    logit: Floats
    share: Floats
    prompt: NDArray[Any]
    split: NDArray[Any]

    def part(self, split: str) -> Margins:
        """The pairs of one split. Raises FailedCheck where it has none."""
        mask = self.split == split
        if not mask.any():
            raise FailedCheck(f"held-out votes: no pair in the split '{split}'")
        return Margins(self.logit[mask], self.share[mask], self.prompt[mask], self.split[mask])


def by_prompt(values: Floats, prompts: NDArray[Any]) -> Floats:
    """Mean over the pairs of every prompt, prompts in sorted order; NaN values are left out."""
    names, place = np.unique(prompts, return_inverse=True)
    there = np.isfinite(values)
    total = np.bincount(place[there], values[there], len(names))
    count = np.bincount(place[there], minlength=len(names))
    return np.divide(total, count, out=np.full(len(names), np.nan), where=count > 0)


def measured(run: Margins) -> dict[str, Floats]:
    """Metrics of one run on its test pairs, per prompt [P]; ``calibration_error`` is one number over all pairs [1].

    ``scaled_log_loss``: after one factor on the logits, the best one for the validation pairs, so that runs which only
    differ in their scale are equal.
    """
    test, validation = run.part("test"), run.part("validation")
    scale = fitted_scale(validation.logit, validation.share)
    return {
        "log_loss": by_prompt(vote_log_loss(test.logit, test.share), test.prompt),
        "scaled_log_loss": by_prompt(vote_log_loss(scale * test.logit, test.share), test.prompt),
        "calibration_error": np.array([calibration_error(test.logit, test.share)]),
        "accuracy": by_prompt(vote_accuracy(test.logit, test.share), test.prompt),
        "scale": np.array([scale]),
    }


def selected_beta(runs: Mapping[tuple[int, int], Margins], betas: int, seeds: Sequence[int]) -> int:
    """Number of the beta with the lowest mean log-loss on the validation pairs over the seeds; runs by (beta, seed)."""
    losses = []
    for beta in range(betas):
        parts = [runs[beta, seed].part("validation") for seed in seeds]
        losses.append(np.mean([by_prompt(vote_log_loss(p.logit, p.share), p.prompt).mean() for p in parts]))
    return int(np.argmin(losses))


def _interval(values: Floats) -> dict[str, Any]:
    """Mean over [seeds, prompts] with the interval of the crossed layout; over seeds alone for one column."""
    values = values[:, np.isfinite(values).all(axis=0)]
    found = crossed_interval(values) if values.shape[1] > 1 else seed_interval(values[:, 0])
    return found.summary()


def compare_arms(
    runs: Mapping[str, Mapping[tuple[int, int], Margins]],
    betas: Sequence[float],
    seeds: Sequence[int],
    contrasts: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """All arms at their selected beta, and the declared differences, each with 95 % t intervals.

    Seeds and prompts are both random and crossed (see ``grids.estimates``); differences are taken seed by seed and
    prompt by prompt, with the sign that above 0 is better for the first arm. ``calibration_error`` has one number per
    seed and is paired over the seeds.
    """
    arms: dict[str, Any] = {}
    values: dict[str, dict[str, Floats]] = {}
    for name, found in runs.items():
        beta = selected_beta(found, len(betas), seeds)
        each = [measured(found[beta, seed]) for seed in seeds]
        values[name] = {metric: np.array([one[metric] for one in each]) for metric in METRICS}
        arms[name] = {
            "beta": betas[beta],
            "scale": float(np.mean([one["scale"] for one in each])),
            "metrics": {metric: _interval(table) for metric, table in values[name].items()},
            "every_beta": [
                {metric: float(np.nanmean([measured(found[b, seed])[metric] for seed in seeds])) for metric in METRICS}
                for b in range(len(betas))
            ],
        }
    differences = {}
    for arm, than in contrasts:
        for metric in METRICS:
            sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
            differences[f"{arm}.over.{than}.{metric}"] = _interval(sign * (values[arm][metric] - values[than][metric]))
    return {"arms": arms, "differences": differences, "bounds": _bounds(next(iter(runs.values())))}


def _bounds(runs: Mapping[tuple[int, int], Margins]) -> dict[str, float]:
    """Log-loss on the test votes of a guess of one half, and of each pair's own share of votes, which nobody knows."""
    test = next(iter(runs.values())).part("test")
    with np.errstate(divide="ignore"):
        known = vote_log_loss(np.clip(np.log(test.share) - np.log1p(-test.share), -50, 50), test.share)
    half = vote_log_loss(np.zeros(len(test.share)), test.share)
    return {
        "log_loss_of_one_half": float(by_prompt(half, test.prompt).mean()),
        "log_loss_of_the_votes_themselves": float(by_prompt(known, test.prompt).mean()),
        "pairs": float(len(test.share)),
        "prompts": float(len(np.unique(test.prompt))),
    }


def reliability(runs: Sequence[Margins]) -> list[tuple[float, float]]:
    """Mean predicted probability and share of votes in ten equal groups, pairs of all runs seen from both sides."""
    tests = [run.part("test") for run in runs]
    p = np.concatenate([1 / (1 + np.exp(-test.logit)) for test in tests])
    share = np.concatenate([test.share for test in tests])
    p, share = np.concatenate([p, 1 - p]), np.concatenate([share, 1 - share])
    groups = np.array_split(np.argsort(p, kind="stable"), _RELIABILITY_BINS)
    return [(float(p[group].mean()), float(share[group].mean())) for group in groups]


def values_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number under the name that claims use: ``<arm>.<metric>``, ``<arm>.over.<than>.<metric>``, with limits."""
    values = {f"bounds.{name}": number for name, number in result["bounds"].items()}
    named = {f"{arm}.{m}": one for arm, found in result["arms"].items() for m, one in found["metrics"].items()}
    for name, one in (named | result["differences"]).items():
        values[name] = one["mean"]
        values |= {f"{name}.{key}": one[key] for key in ("low", "high") if one[key] is not None}
    return values | {f"{arm}.beta": found["beta"] for arm, found in result["arms"].items()}


def arm_rows(result: Mapping[str, Any]) -> pd.DataFrame:
    """A row per arm: the selected beta, the fitted scale and all metrics with intervals."""
    import pandas as pd

    from prefopt.annotators.estimates import interval_text

    return pd.DataFrame(
        [
            {"arm": arm, "beta": found["beta"], "scale": round(found["scale"], 3)}
            | {label: interval_text(found["metrics"][metric]) for metric, label in METRICS.items()}
            for arm, found in result["arms"].items()
        ]
    )


def beta_rows(result: Mapping[str, Any], betas: Sequence[float]) -> pd.DataFrame:
    """A row per arm and beta that was tried: means of all metrics."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"arm": arm, "beta": beta, "selected": beta == found["beta"]}
            | {METRICS[m]: round(v, 4) for m, v in one.items()}
            for arm, found in result["arms"].items()
            for beta, one in zip(betas, found["every_beta"], strict=True)
        ]
    )


def difference_rows(result: Mapping[str, Any]) -> pd.DataFrame:
    """A row per declared pair of arms: differences in all metrics, above 0 where the first arm is better."""
    import pandas as pd

    from prefopt.annotators.estimates import interval_text

    pairs = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in result["differences"]))
    return pd.DataFrame(
        [
            {"arms": pair.replace(".over.", " over ")}
            | {label: interval_text(result["differences"][f"{pair}.{metric}"]) for metric, label in METRICS.items()}
            for pair in pairs
        ]
    )
