"""p-DPO as exact pessimism over a likelihood confidence set, its closed forms, and what it identifies.

Source: 2405.19316 for the claim; proof, closed forms and the component masses are this project's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefopt.lazy import LazyModule
from prefopt.studies.registry import StudyResult, study
from prefopt.tabular import PairObjective, free_policy, gradient_flow, implicit_reward, minimise

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from scipy import special
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")
    special = LazyModule("scipy.special")

Positive = Annotated[float, Field(gt=0.0)]

_PAIRS = ((0, 1), (2, 3))  # two components; the last two responses are in no pair
_PARTS = {"pair_0": [0, 1], "pair_1": [2, 3], "unseen": [4, 5]}


@study("p_dpo_confidence_set", "p-DPO and dp-DPO optima: component masses, closed forms, and the saddle point over S_c")
def p_dpo_confidence_set(
    *,
    ref: Annotated[list[Positive], Field(min_length=6, max_length=6)] = [0.2, 0.3, 0.05, 0.05, 0.25, 0.15],  # noqa: B006
    beta: Positive = 0.5,
    gammas: list[Positive] = [0.1, 1.0],  # noqa: B006
    saddle_gammas: list[Positive] = [0.02, 0.1, 0.5],  # noqa: B006
    reward_margins: Annotated[list[float], Field(min_length=2, max_length=2)] = [1.0, -0.5],  # noqa: B006
    horizon: Positive = 1e5,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> StudyResult:
    """Pairs (0, 1) and (2, 3), two responses in no pair; ``horizon`` is learning rate x steps of unregularised DPO."""
    problem = _Problem(np.array(ref) / sum(ref), beta, np.array(reward_margins))
    optima = {gamma: problem.optimum("dpo", gamma) for gamma in gammas}
    distilled = {gamma: problem.optimum("distill", gamma) for gamma in gammas}
    masses = {"reference": problem.ref}
    masses |= {f"p-DPO, gamma {gamma:g}": policy for gamma, policy in optima.items()}
    masses |= {f"dp-DPO, gamma {gamma:g}": policy for gamma, policy in distilled.items()}
    free = problem.unregularised(horizon, np.random.default_rng(seed))
    frame = pd.DataFrame(
        [{"policy": name, **{part: p[members].sum() for part, members in _PARTS.items()}}
         for name, p in {**masses, **free}.items()]
    )  # fmt: skip
    saddle = pd.DataFrame([problem.saddle(gamma) for gamma in saddle_gammas])
    curve = problem.curve(np.geomspace(1e-3, 10.0, 25))
    regularised = [*optima.values(), *distilled.values()]
    values = {
        **{f"gamma_{g:g}_response_{n}": float(p) for g, policy in optima.items() for n, p in enumerate(policy)},
        "component_gap": max(problem.component_gap(policy) for policy in regularised),
        "unseen_gap": max(float(np.abs(policy - problem.ref)[_PARTS["unseen"]].max()) for policy in regularised),
        "closed_form_gap_p_dpo": float(curve["p_dpo_residual"].max()),
        "closed_form_gap_dp_dpo": float(curve["dp_dpo_residual"].max()),
        "dpo_unseen_mass": float(free["DPO"][_PARTS["unseen"]].sum()),
        "reference_unseen_mass": float(problem.ref[_PARTS["unseen"]].sum()),
        "distill_mass_spread": abs(float((free["d-DPO, start A"] - free["d-DPO, start B"])[_PARTS["unseen"]].sum())),
        "distill_largest_loss": max(problem.loss("distill", free[f"d-DPO, start {s}"]) for s in "AB"),
        "saddle_gap": float((saddle["worst_case"] - saddle["own"]).abs().max()),
        "saddle_largest_loss_excess": float((saddle["loss_at_worst"] - saddle["bound"]).max()),
    }
    figures = {"mass_of_each_component": _mass_figure(frame), "chosen_share_against_gamma": _curve_figure(curve)}
    return StudyResult(values, {"component_masses": frame, "saddle": saddle, "closed_forms": curve}, figures)


class _Problem:
    """One reference, two pairs, one reward model; every optimum that the study compares."""

    def __init__(self, ref: np.ndarray, beta: float, reward_margins: np.ndarray) -> None:
        self.ref, self.beta, self.reward_margins = ref, beta, reward_margins
        self.policy = free_policy(ref)
        self.rewards = np.zeros((1, len(ref)))
        self.rewards[0, [0, 2]] = reward_margins

    def objective(self, loss: str, gamma: float = 0.0) -> PairObjective:
        rewards = self.rewards if loss == "distill" else None
        return PairObjective(self.policy, self.ref, _PAIRS, loss, {"beta": self.beta}, gamma=gamma, rewards=rewards)

    def optimum(self, loss: str, gamma: float) -> np.ndarray:
        return self.policy.probabilities(minimise(self.objective(loss, gamma), np.zeros(len(self.ref))))

    def loss(self, name: str, policy: np.ndarray) -> float:
        return self.objective(name).value(np.log(policy) - self.policy.base)

    def component_gap(self, policy: np.ndarray) -> float:
        return max(abs(float((policy - self.ref)[members].sum())) for members in _PARTS.values())

    def unregularised(self, horizon: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """DPO after a long descent; two zero-loss policies of d-DPO."""
        course = gradient_flow(self.objective("dpo"), np.zeros(len(self.ref)), [horizon])
        found = {"DPO": self.policy.probabilities(course[-1])}
        for name in "AB":
            start = rng.normal(scale=1.5, size=len(self.ref))
            found[f"d-DPO, start {name}"] = self.policy.probabilities(minimise(self.objective("distill"), start))
        return found

    def saddle(self, gamma: float) -> dict[str, float]:
        """Worst advantage of the p-DPO optimum over rewards as likely as its own, found without using the theorem."""
        from scipy.optimize import minimize

        policy = self.optimum("dpo", gamma)
        likelihood = PairObjective(free_policy(np.full(6, 1 / 6)), np.full(6, 1 / 6), _PAIRS, "dpo", {"beta": 1.0})
        own = implicit_reward(policy, self.ref, self.beta)
        bound = likelihood.value(own)
        gap = policy - self.ref
        found = minimize(
            lambda r: gap @ r,
            1.5 * own,  # larger margins are more likely: a start strictly inside
            jac=lambda r: gap,
            constraints={
                "type": "ineq",
                "fun": lambda r: bound - likelihood.value(r),
                "jac": lambda r: -likelihood.gradient(r),
            },
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        at_worst = likelihood.value(found.x)
        own_value = float(gap @ own)
        row = {"gamma": gamma, "bound": bound, "own": own_value, "worst_case": float(found.fun)}
        return row | {"loss_at_worst": at_worst}

    def curve(self, gammas: np.ndarray) -> pd.DataFrame:
        """Share of the chosen response within the first pair, by Newton, and how far the closed forms are off there."""
        rows = []
        for gamma in gammas:
            row = {"gamma": gamma}
            for name, loss in (("p_dpo", "dpo"), ("dp_dpo", "distill")):
                policy = self.optimum(loss, gamma)
                residuals = [self._residual(policy, pair, loss, gamma, k) for k, pair in enumerate(_PAIRS)]
                row |= {name: float(policy[0] / policy[:2].sum()), f"{name}_residual": max(map(abs, residuals))}
            rows.append(row)
        return pd.DataFrame(rows)

    def _residual(self, policy: np.ndarray, pair: tuple[int, int], loss: str, gamma: float, k: int) -> float:
        """n gamma M (q - q0) minus the pull of the loss, with q the chosen share of the pair and M its mass."""
        chosen, mass = pair[0], self.ref[list(pair)].sum()
        margin = self.beta * float(np.diff(np.log(policy[list(pair)]) - np.log(self.ref[list(pair)]))[0] * -1)
        share = policy[chosen] / policy[list(pair)].sum() - self.ref[chosen] / mass
        distilled = 2 * self.beta * (self.reward_margins[k] - margin)
        pull = self.beta * float(special.expit(-margin)) if loss == "dpo" else distilled
        return float(len(_PAIRS) * gamma * mass * share - pull)


def _mass_figure(frame: pd.DataFrame) -> str:
    from prefopt.figures import COLOURS, drawing

    with drawing(7.2, 0.9 + 0.3 * len(frame)) as canvas:
        panel = canvas.figure.subplots()
        left = np.zeros(len(frame))
        for number, part in enumerate(_PARTS):
            label = {"pair_0": "responses of pair 0", "pair_1": "responses of pair 1"}.get(part, "in no pair")
            panel.barh(frame["policy"], frame[part], left=left, color=COLOURS[number], height=0.65, label=label)
            left = left + frame[part].to_numpy()
        panel.invert_yaxis()
        panel.set_xlim(0, 1)
        panel.set_xlabel("probability mass")
        panel.tick_params(axis="y", length=0)
        canvas.figure.legend(loc="outside lower center", ncols=3)
    return canvas.svg


def _curve_figure(curve: pd.DataFrame) -> str:
    from prefopt.figures import COLOURS, drawing

    with drawing(7.2, 2.6) as canvas:
        panel = canvas.figure.subplots()
        for name, label, colour, dash in zip(
            ("p_dpo", "dp_dpo"), ("p-DPO", "dp-DPO"), COLOURS, ("-", "--"), strict=False
        ):
            panel.plot(curve["gamma"], curve[name], color=colour, linestyle=dash, marker="o", markersize=3, label=label)
        panel.set_xscale("log")
        panel.set_ylim(0, 1.02)
        panel.set_xlabel("gamma")
        panel.set_ylabel("chosen share of pair 0")
        panel.legend()
    return canvas.svg
