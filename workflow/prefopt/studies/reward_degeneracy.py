"""What minimising the DPO loss allows, and what descent does, for policies small enough to be exact.

Source: 2405.19316, the degeneracy proposition and its corollary; the parametrised cases are this project's own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefopt.lazy import LazyModule
from prefopt.studies.registry import StudyResult, study
from prefopt.tabular import LinearPolicy, PairObjective, bag_of_words, free_policy, gradient_flow, minimise

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")

Positive = Annotated[float, Field(gt=0.0)]

_REF = (0.2, 0.3, 0.05, 0.05, 0.25, 0.15)
_PAIRS = ((0, 1), (2, 3))  # the last two responses are in no pair
_CHOSEN, _REJECTED, _UNSEEN = [0, 2], [1, 3], [4, 5]
_TOKENS, _LENGTH = 4, 5
_FIGURE_EXPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800)
_FLOOR = 1e-45  # losses below are not drawn


@study("dpo_degeneracy", "policies that minimise the DPO loss while the chosen responses vanish; what descent does")
def dpo_degeneracy(
    *,
    exponents: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [2, 4, 8, 5000],  # noqa: B006
    betas: Annotated[list[Positive], Field(min_length=1)] = [0.01, 0.1, 1.0, 10.0],  # noqa: B006
    horizon: Positive = 1e5,
    words_beta: Positive = 0.1,
    words_horizon: Positive = 1e6,
    target: float = 1.0,
    gamma: Positive = 0.1,
) -> StudyResult:
    """An explicit minimising sequence, then gradient flow of three policies, then what regularisers change.

    ``exponents`` k give chosen probabilities 10^-k and rejected ones 10^-3k; ``horizon`` is learning rate x steps.
    """
    sequence = _sequence(exponents, betas)
    courses = {
        "free": _free(horizon),
        "shared feature": _shared(horizon),
        "bag of words": _words(words_beta, words_horizon),
    }
    values = _sequence_values(sequence, exponents) | _course_values(courses) | _regularised(target, gamma)
    course = pd.concat([frame.assign(policy=name) for name, frame in courses.items()])
    figures = {
        "descent_of_three_policies": _descent_figure(courses),
        "loss_along_the_sequence": _sequence_figure(_sequence(list(_FIGURE_EXPONENTS), betas)),
    }
    return StudyResult(
        values, {"descent": course[course["shown"]].drop(columns="shown"), "sequence": sequence}, figures
    )


def _sequence(exponents: list[int], betas: list[float]) -> pd.DataFrame:
    """Loss and masses along chosen = 10^-k, rejected = 10^-3k, the rest on responses outside the data."""
    policy = free_policy(_REF)
    rows = []
    for k in exponents:
        logp = np.empty(len(_REF))
        logp[_CHOSEN], logp[_REJECTED] = -k * math.log(10), -3 * k * math.log(10)
        logp[_UNSEEN] = math.log1p(-np.exp(logp[_CHOSEN + _REJECTED]).sum()) - math.log(len(_UNSEEN))
        mass = np.exp(logp)
        for beta in betas:
            loss = PairObjective(policy, np.array(_REF), _PAIRS, "dpo", {"beta": beta}).value(logp - policy.base)
            shares = {"chosen_mass": mass[_CHOSEN].sum(), "unseen_mass": mass[_UNSEEN].sum()}
            rows.append({"exponent": k, "beta": beta, "loss": loss, **shares})
    return pd.DataFrame(rows)


def _sequence_values(sequence: pd.DataFrame, exponents: list[int]) -> dict[str, float]:
    at = sequence.groupby("exponent").first()
    last = sequence[sequence["exponent"] == max(exponents)]
    values = {f"sequence_chosen_mass_{k}": float(at.loc[k, "chosen_mass"]) for k in exponents}
    return values | {
        "sequence_largest_loss": float(last["loss"].max()),
        "sequence_unseen_mass": float(last["unseen_mass"].min()),
    }


def _times(horizon: float) -> np.ndarray:
    return np.concatenate([[0.0], np.geomspace(0.01 * min(1.0, horizon), horizon, 60)])


def _course(times: np.ndarray, loss: list[float], **logs: np.ndarray) -> pd.DataFrame:
    """Loss and log-masses over time; every sixth row is also shown in the table."""
    shown = np.arange(len(times)) % 6 == 0
    return pd.DataFrame({"time": times, "loss": loss, **logs, "shown": shown})


def _log_mass(logp: np.ndarray, members: list[int]) -> np.ndarray:
    return np.logaddexp.reduce(logp[:, members], axis=1)


def _free(horizon: float) -> pd.DataFrame:
    policy = free_policy(_REF)
    objective = PairObjective(policy, np.array(_REF), _PAIRS, "dpo", {"beta": 1.0})
    times = _times(horizon)
    course = gradient_flow(objective, np.zeros(len(_REF)), times)
    logp = policy.log_probabilities(course)
    frame = _course(
        times,
        [objective.value(theta) for theta in course],
        chosen=_log_mass(logp, _CHOSEN),
        rejected=_log_mass(logp, _REJECTED),
        unseen=_log_mass(logp, _UNSEEN),
    )
    frame.attrs["unseen_score_change"] = float(np.abs(course[:, _UNSEEN]).max())
    return frame


def _three_arms() -> LinearPolicy:
    """One parameter moves all scores: chosen 1, rejected 0, and a response outside the data 3 times as fast."""
    return LinearPolicy(np.array([[1.0], [0.0], [3.0]]), np.zeros(3))


def _shared(horizon: float) -> pd.DataFrame:
    policy, ref = _three_arms(), np.full(3, 1 / 3)
    objective = PairObjective(policy, ref, [(0, 1)], "dpo", {"beta": 1.0})
    times = _times(horizon)
    course = gradient_flow(objective, [0.0], times)
    chosen, rejected, unseen = policy.log_probabilities(course).T
    return _course(times, [objective.value(t) for t in course], chosen=chosen, rejected=rejected, unseen=unseen)


def _words(beta: float, horizon: float) -> pd.DataFrame:
    """iiiij is preferred to iiiii: the shared i goes down with every step, and iiiij with it."""
    policy, sequences = bag_of_words(_TOKENS, _LENGTH)
    size = len(sequences)
    objective = PairObjective(policy, np.full(size, 1 / size), [(1, 0)], "dpo", {"beta": beta})
    times = _times(horizon)
    course = gradient_flow(objective, np.zeros(_TOKENS), times)
    logp = policy.log_probabilities(course)
    unseen = _log_mass(logp, list(range(2, size)))
    loss = [objective.value(theta) for theta in course]
    return _course(times, loss, chosen=logp[:, 1], rejected=logp[:, 0], unseen=unseen)


def _course_values(courses: dict[str, pd.DataFrame]) -> dict[str, float]:
    free, shared, words = courses.values()
    first, last = free.iloc[0], free.iloc[-1]
    return {
        "free_chosen_mass_start": math.exp(first["chosen"]),
        "free_chosen_mass_end": math.exp(last["chosen"]),
        "free_unseen_mass_end": math.exp(last["unseen"]),
        "free_rejected_mass_end": math.exp(last["rejected"]),
        "free_unseen_score_change": free.attrs["unseen_score_change"],
        "shared_loss_end": float(shared["loss"].iloc[-1]),
        "shared_chosen_end": math.exp(shared["chosen"].iloc[-1]),
        "shared_unseen_end": math.exp(shared["unseen"].iloc[-1]),
        "words_loss_start": float(words["loss"].iloc[0]),
        "words_loss_end": float(words["loss"].iloc[-1]),
        "words_chosen_logp_start": float(words["chosen"].iloc[0]),
        "words_chosen_logp_end": float(words["chosen"].iloc[-1]),
        "words_rejected_logp_end": float(words["rejected"].iloc[-1]),
    }


def _regularised(target: float, gamma: float) -> dict[str, float]:
    """Where distillation and p-DPO stop the shared feature."""
    policy, ref = _three_arms(), np.full(3, 1 / 3)
    rewards = np.array([[target, 0.0, 0.0]])
    distill = PairObjective(policy, ref, [(0, 1)], "distill", {"beta": 1.0}, rewards=rewards)
    pessimistic = PairObjective(policy, ref, [(0, 1)], "dpo", {"beta": 1.0}, gamma=gamma)
    values = {"reference_chosen": 1 / 3}
    for name, objective in (("distill", distill), ("p_dpo", pessimistic)):
        theta = minimise(objective, [0.0])
        values |= {f"{name}_theta": float(theta[0]), f"{name}_chosen": float(policy.probabilities(theta)[0])}
    return values


def _descent_figure(courses: dict[str, pd.DataFrame]) -> str:
    from prefopt.figures import COLOURS, drawing

    with drawing(7.2, 2.9) as canvas:
        axes = canvas.figure.subplots(1, len(courses))
        for panel, (name, frame) in zip(axes, courses.items(), strict=True):
            later = frame.iloc[1:]
            for column, colour, dash in zip(("chosen", "rejected", "unseen"), COLOURS, ("-", "--", ":"), strict=False):
                panel.plot(later["time"], later[column], color=colour, linestyle=dash, linewidth=1.8, label=column)
            panel.set_xscale("log")
            panel.set_title(name)
            panel.set_xlabel("learning rate × steps")
            panel.grid(axis="y", alpha=0.2, linewidth=0.6)
        axes[0].set_ylabel("log probability mass (nats)")
        canvas.figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas.svg


def _sequence_figure(sequence: pd.DataFrame) -> str:
    from prefopt.figures import COLOURS, DASHES, INK, drawing

    with drawing(7.2, 2.7) as canvas:
        panel = canvas.figure.subplots()
        for number, (beta, frame) in enumerate(sequence.groupby("beta")):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            seen = frame[frame["loss"] > _FLOOR]
            panel.plot(seen["exponent"], seen["loss"], marker="o", markersize=3, label=f"beta {beta:g}", **style)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(_FLOOR, 10.0)
        panel.set_xlabel("k: chosen probabilities 10$^{-k}$, rejected ones 10$^{-3k}$")
        panel.set_ylabel("DPO loss")
        panel.axhline(math.log(2), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        canvas.figure.legend(loc="outside lower center", ncols=4)
    return canvas.svg
