"""MallowsPO's bandit: frontiers of reward against KL (figures 8a and 8b) and the arms' probabilities (figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule
from prefopt.specs import Count, Positive
from prefopt.studies.registry import StudyResult, study

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from prefopt.mallows.bandit import Paths
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")

Phi = Annotated[float, Field(gt=0.0, lt=1.0)]

_SHOWN = {"dpo": "DPO", "phi": "MallowsPO-phi"}
_CURVE_POINTS = 240


def _paths(method: str, betas: Sequence[float], steps: int, phi: float, width: float) -> Paths:
    from prefopt.mallows import bandit

    return bandit.descend(bandit.dpo_slope if method == "dpo" else bandit.phi_slope(phi, width), betas, steps=steps)


@study(
    "mallows_bandit_frontier", "five-armed bandit, one end point per beta: reward against KL for DPO and the phi link"
)
def frontier(
    *,
    dpo_betas: list[Positive],
    phi_betas: list[Positive],
    dpo_more: list[Positive],
    phi_more: list[Positive],
    steps: Count = 500_000,
    phi: Phi = 0.05,
    width: Positive = 0.05,
    compare_at: list[Positive],
    path_beta: Positive = 0.05,
    long_beta: Positive = 0.005,
    long_steps: Count = 5_000_000,
) -> StudyResult:
    """End points of all runs; ``dpo_betas`` and ``phi_betas`` are the published ones, ``*_more`` extend the range.

    Values: ``<method>_<beta>_kl`` and ``_reward`` of every end point; ``<method>_best_beta`` and ``_best_reward`` of
    the published ones; at each KL k of ``compare_at`` the end-point frontiers ``<method>_at_<k>`` (linear between
    published betas), ``dpo_early_at_<k>`` (the best DPO run of any beta when it first passes k) and
    ``<method>_path_at_<k>`` (the run at ``path_beta`` on its way), the latter two where a run reaches that KL;
    ``dpo_limit_<beta>_*``, DPO after infinitely many steps; ``phi_long_arm<i>``, gradient flow of the phi link at
    ``long_beta`` for ``long_steps``.

    Raises BadInput where ``path_beta`` is not among the betas of both methods.

    Source: 2405.14953, figure 8a; what the paper leaves open is identified by its curves.
    """
    from prefopt.mallows import bandit

    published = {"dpo": dpo_betas, "phi": phi_betas}
    if path_beta not in {*dpo_betas, *dpo_more} & {*phi_betas, *phi_more}:
        raise BadInput(f"mallows_bandit_frontier: path_beta {path_beta:g} must be one of the betas of both methods")
    runs = {
        "dpo": _paths("dpo", [*dpo_betas, *dpo_more], steps, phi, width),
        "phi": _paths("phi", [*phi_betas, *phi_more], steps, phi, width),
    }
    table = pd.concat([_end_points(method, runs[method], published[method]) for method in runs], ignore_index=True)
    values: dict[str, float] = {}
    for row in table.to_dict("records"):
        values[f"{row['method']}_{row['beta']:g}_kl"] = row["kl"]
        values[f"{row['method']}_{row['beta']:g}_reward"] = row["reward"]
    for method, part in table[table["published"]].groupby("method"):
        best = part.loc[part["reward"].idxmax()]
        values |= {f"{method}_best_beta": float(best["beta"]), f"{method}_best_reward": float(best["reward"])}
        by_kl = part.sort_values("kl")
        for kl in compare_at:
            values[f"{method}_at_{kl:g}"] = float(np.interp(kl, by_kl["kl"], by_kl["reward"]))
            at_kl = _reward_at(runs[method], kl)
            reached = {f"{method}_path_at_{kl:g}": at_kl[runs[method].betas == path_beta].max()}
            if method == "dpo":
                reached[f"dpo_early_at_{kl:g}"] = np.fmax.reduce(at_kl)
            values |= {name: float(value) for name, value in reached.items() if np.isfinite(value)}
    for beta, policy in zip((1.0, 0.3), bandit.dpo_limit([1.0, 0.3]), strict=True):
        values[f"dpo_limit_{beta:g}_kl"] = float(bandit.kl_from_uniform(policy))
        values[f"dpo_limit_{beta:g}_reward"] = float(bandit.expected_reward(policy))
    for arm, share in enumerate(bandit.flow(bandit.phi_slope(phi, width), long_beta, steps=long_steps), start=1):
        values[f"phi_long_arm{arm}"] = float(share)
    figure = _frontier_figure(table, _envelope(runs["dpo"]))
    return StudyResult(values, {"end_points": table}, {"frontier": figure})


def _end_points(method: str, paths: Paths, published: Sequence[float]) -> pd.DataFrame:
    from prefopt.mallows.bandit import expected_reward, kl_from_uniform

    arms = {f"arm{arm + 1}": paths.final[:, arm] for arm in range(paths.final.shape[1])}
    return pd.DataFrame(
        {"method": method, "beta": paths.betas, "published": np.isin(paths.betas, published)}
        | {"kl": kl_from_uniform(paths.final), "reward": expected_reward(paths.final)}
        | arms
    )


def _reward_at(paths: Paths, kl: float) -> NDArray[np.float64]:
    """Reward of each run where it first passes that KL, linear between records; NaN for a run that does not."""
    from prefopt.mallows.bandit import expected_reward, kl_from_uniform

    reached = np.maximum.accumulate(kl_from_uniform(paths.policies), axis=0)
    reward = expected_reward(paths.policies)
    found = np.full(reached.shape[1], np.nan)
    for run in np.flatnonzero(reached[-1] >= kl):
        after = int(np.searchsorted(reached[:, run], kl))
        found[run] = np.interp(kl, reached[after - 1 : after + 1, run], reward[after - 1 : after + 1, run])
    return found


def _envelope(paths: Paths) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL and the best reward of any run on its way there."""
    kls = np.arange(0.02, 1.5, 0.02)
    return kls, np.array([np.fmax.reduce(_reward_at(paths, kl)) for kl in kls])


@study("mallows_bandit_average", "five-armed bandit, four betas averaged along training: reward against KL")
def average(
    *,
    betas: list[Positive],
    steps: Count = 500_000,
    phi: Phi = 0.05,
    width: Positive = 0.05,
    axis_factor: Positive = 4.0,
) -> StudyResult:
    """Mean reward against mean KL of the runs, every 100 steps; ``printed_kl`` is the mean KL over ``axis_factor``.

    Values, for both methods: KL, KL over the factor, and reward where the mean reward is highest and at the end;
    ``ceiling_at_printed_end``: the highest reward that any policy can have at the KL printed for the phi link's end.

    Source: 2405.14953, figure 8b.
    """
    from prefopt.mallows.bandit import expected_reward, kl_from_uniform

    values: dict[str, float] = {}
    rows: list[Any] = []
    for method in _SHOWN:
        paths = _paths(method, betas, steps, phi, width)
        kl, reward = kl_from_uniform(paths.policies).mean(axis=1), expected_reward(paths.policies).mean(axis=1)
        for place, at in (("peak", int(reward.argmax())), ("end", -1)):
            values |= {
                f"{method}_{place}_kl": float(kl[at]),
                f"{method}_{place}_printed_kl": float(kl[at] / axis_factor),
                f"{method}_{place}_reward": float(reward[at]),
            }
        rows.append(pd.DataFrame({"method": method, "step": paths.steps, "kl": kl, "reward": reward}))
    values["ceiling_at_printed_end"] = _best_reward(values["phi_end_printed_kl"])
    table = pd.concat(rows, ignore_index=True)
    table["printed_kl"] = table["kl"] / axis_factor
    return StudyResult(values, {"curves": table}, {"average": _average_figure(table, len(betas), axis_factor)})


def _best_reward(kl: float) -> float:
    """Highest expected reward within that KL of the uniform policy: the arms weighted by exp(reward / temperature)."""
    from scipy.optimize import brentq

    from prefopt.mallows.bandit import MEAN_REWARD, expected_reward, kl_from_uniform, softmax

    sharpness = brentq(lambda x: float(kl_from_uniform(softmax(x * MEAN_REWARD))) - kl, 0.0, 5.0)
    return float(expected_reward(softmax(sharpness * MEAN_REWARD)))


@study("mallows_bandit_arms", "five-armed bandit: the arms' probabilities during training")
def arms(
    *, betas: list[Positive], steps: Count = 500_000, phi: Phi = 0.05, width: Positive = 0.05
) -> StudyResult:  # fmt: skip
    """Policies of both methods at each beta along training.

    Values at the end: ``<method>_<beta>_arm<i>``, ``_kl`` and ``_reward``; ``<method>_<beta>_largest``, the likeliest
    arm's probability.

    Source: 2405.14953, figure 9.
    """
    runs = {method: _paths(method, betas, steps, phi, width) for method in _SHOWN}
    table = pd.concat([_end_points(method, runs[method], betas) for method in runs], ignore_index=True)
    columns = [name for name in table if name.startswith("arm")]
    table["largest"] = table[columns].max(axis=1)
    values = {
        f"{row['method']}_{row['beta']:g}_{column}": float(row[column])
        for row in table.to_dict("records")
        for column in (*columns, "kl", "reward", "largest")
    }
    return StudyResult(values, {"end_points": table.drop(columns="published")}, {"arms": _arms_figure(runs)})


def _frontier_figure(table: pd.DataFrame, early_dpo: tuple[Any, Any]) -> str:
    from prefopt.figures import COLOURS, drawing

    with drawing(7.2, 3.6) as canvas:
        published, wider = canvas.figure.subplots(1, 2)
        for (method, name), colour in zip(_SHOWN.items(), COLOURS, strict=False):
            part = table[table["method"] == method].sort_values("kl")
            shown, more = part[part["published"]], part[~part["published"]]
            published.plot(shown["kl"], shown["reward"], "o-", markersize=4, linewidth=1.2, color=colour, label=name)
            wider.plot(shown["kl"], shown["reward"], "o", markersize=4, color=colour)
            wider.plot(more["kl"], more["reward"], "o", markersize=5, fillstyle="none", color=colour)
        published.set_title("end points, published betas")
        wider.plot(*early_dpo, linewidth=1.2, color=COLOURS[0], label="DPO, best run on its way")
        wider.set_title("with further betas (open)")
        wider.set_ylim(15.3, 16.12)
        for panel in (published, wider):
            panel.set_xlabel("KL from the reference (nats)")
        published.set_ylabel("expected reward")
        published.legend(loc="lower right")
        wider.legend(loc="lower center")
    return canvas.svg


def _average_figure(table: pd.DataFrame, betas: int, factor: float) -> str:
    from matplotlib.ticker import MaxNLocator

    from prefopt.figures import COLOURS, drawing

    axes = (("kl", "mean KL (nats)"), ("printed_kl", f"mean KL / {factor:g}, the printed axis"))
    with drawing(7.2, 3.2) as canvas:
        panels = canvas.figure.subplots(1, 2, sharey=True)
        for panel, (column, label) in zip(panels, axes, strict=True):
            for number, (method, name) in enumerate(_SHOWN.items()):
                curve = table[table["method"] == method].iloc[_sparse(int((table["method"] == method).sum()))]
                panel.plot(curve[column], curve["reward"], color=COLOURS[number], linewidth=1.6, label=name)
                panel.plot(curve[column].iloc[-1], curve["reward"].iloc[-1], "o", color=COLOURS[number], markersize=5)
            panel.set_xlabel(label)
        # The printed plot ends before DPO's curve does.
        panels[1].set_xlim(0, 0.15)
        panels[1].xaxis.set_major_locator(MaxNLocator(4))
        panels[0].set_ylabel(f"mean reward of {betas} betas")
        panels[0].set_ylim(14.5, 16.1)
        panels[0].legend(loc="lower right")
    return canvas.svg


def _arms_figure(runs: dict[str, Paths]) -> str:
    from prefopt.figures import COLOURS, drawing

    betas = next(iter(runs.values())).betas
    with drawing(7.2, 4.6) as canvas:
        panels = canvas.figure.subplots(len(runs), len(betas), sharex=True, sharey=True, squeeze=False)
        for row, (method, paths) in zip(panels, runs.items(), strict=True):
            keep = _sparse(len(paths.steps))
            for number, panel in enumerate(row):
                for arm in range(paths.final.shape[1]):
                    share = paths.policies[keep, number, arm]
                    panel.plot(paths.steps[keep] / 1000, share, color=COLOURS[arm], label=f"arm {arm + 1}")
                panel.set_title(f"{_SHOWN[method]}, beta = {betas[number]:g}")
            row[0].set_ylabel("probability")
        for panel in panels[-1]:
            panel.set_xlabel("thousand steps")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return canvas.svg


def _sparse(records: int) -> NDArray[np.int64]:
    """Some of the records, dense at the start, where the curves turn."""
    return np.unique(np.round(np.geomspace(1, records, _CURVE_POINTS)).astype(int) - 1)
