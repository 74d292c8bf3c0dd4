"""Distillation recovers the RLHF optimum where the pairs connect the responses, and only there.

Source: 2405.19316, theorem 1; the weaker condition and the counter-example are this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule
from prefopt.studies.registry import StudyResult, study
from prefopt.tabular import PairObjective, free_policy, gradient_flow, kl, minimise, rlhf_optimum, rlhf_value

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")

Positive = Annotated[float, Field(gt=0.0)]
Pairs = Sequence[tuple[int, int]]


@study("distillation_recovery", "distance of the distilled policy to the RLHF optimum for several pair distributions")
def distillation_recovery(
    *,
    ref: Annotated[list[Positive], Field(min_length=4)] = [0.1, 0.2, 0.3, 0.4],  # noqa: B006
    reward: list[float] = [1.0, -0.5, 0.25, 2.0],  # noqa: B006
    beta: Positive = 0.5,
    shift: float = 123.4,
    draws: Annotated[int, Field(ge=1)] = 20,
    responses: Annotated[int, Field(ge=4)] = 6,
    horizon: Positive = 1e6,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> StudyResult:
    """Distil ``reward`` on connected and on disconnected pairs; ``draws`` random problems of ``responses`` arms each.

    ``horizon`` is learning rate x steps of an unregularised reward model on one pair.
    """
    if len(ref) != len(reward):
        raise BadInput(f"study 'distillation_recovery': {len(ref)} responses, {len(reward)} rewards")
    rng = np.random.default_rng(seed)
    ref_p, rewards = np.array(ref) / sum(ref), np.array(reward)
    optimum = rlhf_optimum(ref_p, rewards, beta)
    best = rlhf_value(optimum, ref_p, rewards, beta)
    policies = {name: _distilled(ref_p, rewards, beta, *rho) for name, rho in _connected(len(ref_p), rng).items()}
    shifted = _distilled(ref_p, rewards + shift, beta, *_connected(len(ref_p), rng)["uniform"])
    random = _random_problems(rng, draws, responses, beta)
    split = _disconnected(ref_p, rewards, beta, rng)
    margins = _reward_model_margins([horizon / 1e4, horizon / 1e2, horizon])
    values = {
        **{f"optimum_{n}": float(p) for n, p in enumerate(optimum)},
        "optimum_value": best,
        "optimum_advantage": best - float(ref_p @ rewards),
        "identity_gap": best - float(ref_p @ rewards) - beta * kl(ref_p, optimum),
        **{f"gap_{name}": float(np.abs(policy - optimum).max()) for name, policy in policies.items()},
        "gap_shifted": float(np.abs(shifted - optimum).max()),
        **{f"random_gap_{name}": gap for name, gap in random.items()},
        "disconnected_largest_loss": float(split["loss"].max()),
        "disconnected_value_from_reference": float(split["value"].iloc[0]),
        "disconnected_value_from_elsewhere": float(split["value"].iloc[1]),
        "reward_margin_early": margins[1],
        "reward_margin_late": margins[2],
    }
    frame = pd.DataFrame({"response": range(len(ref_p)), "reference": ref_p, "optimum": optimum, **policies})
    figure = _figure(frame, split, _value_by_mass(ref_p, rewards, beta), best)
    return StudyResult(values, {"policies": frame, "disconnected": split}, {"connected_and_disconnected_pairs": figure})


def _connected(count: int, rng: np.random.Generator) -> dict[str, tuple[Pairs, np.ndarray]]:
    """Three distributions over pairs whose graph connects all responses."""
    every = [(i, j) for i in range(count) for j in range(count) if i != j]
    path = [(i, i + 1) for i in range(count - 1)]
    return {
        "uniform": (every, np.full(len(every), 1 / len(every))),
        "random": (every, rng.dirichlet(np.full(len(every), 0.5))),
        "path": (path, np.full(len(path), 1 / len(path))),
    }


def _distilled(ref: np.ndarray, reward: np.ndarray, beta: float, pairs: Pairs, weights: np.ndarray) -> np.ndarray:
    policy = free_policy(ref)
    objective = PairObjective(policy, ref, pairs, "distill", {"beta": beta}, weights=weights, rewards=reward[None])
    return policy.probabilities(minimise(objective, np.zeros(len(ref))))


def _random_problems(rng: np.random.Generator, draws: int, responses: int, beta: float) -> dict[str, float]:
    """Largest distance to the optimum over random references and rewards, per pair distribution."""
    worst: dict[str, float] = {}
    for _ in range(draws):
        ref, reward = rng.dirichlet(np.full(responses, 2.0)), rng.normal(size=responses)
        optimum = rlhf_optimum(ref, reward, beta)
        for name, rho in _connected(responses, rng).items():
            gap = float(np.abs(_distilled(ref, reward, beta, *rho) - optimum).max())
            worst[name] = max(worst.get(name, 0.0), gap)
    return worst


def _halves(count: int) -> list[Pairs]:
    """Two chains of pairs with no pair between them."""
    middle = count // 2
    return [[(i, i + 1) for i in range(low, high - 1)] for low, high in ((0, middle), (middle, count))]


def _disconnected(ref: np.ndarray, reward: np.ndarray, beta: float, rng: np.random.Generator) -> pd.DataFrame:
    """Zero-loss policies on disconnected pairs, reached from the reference and from somewhere else."""
    policy = free_policy(ref)
    pairs = [pair for half in _halves(len(ref)) for pair in half]
    objective = PairObjective(policy, ref, pairs, "distill", {"beta": beta}, rewards=reward[None])
    rows = []
    for start, theta in (("reference", np.zeros(len(ref))), ("elsewhere", rng.normal(scale=3.0, size=len(ref)))):
        found = minimise(objective, theta)
        probabilities = policy.probabilities(found)
        rows.append(
            {
                "start": start,
                "loss": objective.value(found),
                "first_component_mass": float(probabilities[: len(ref) // 2].sum()),
                "value": rlhf_value(probabilities, ref, reward, beta),
            }
        )
    return pd.DataFrame(rows)


def _value_by_mass(ref: np.ndarray, reward: np.ndarray, beta: float) -> pd.DataFrame:
    """RLHF value of the zero-loss policies as a function of the first component's mass."""
    optimum, middle = rlhf_optimum(ref, reward, beta), len(ref) // 2
    parts = [optimum[:middle] / optimum[:middle].sum(), optimum[middle:] / optimum[middle:].sum()]
    masses = np.linspace(0.0, 1.0, 201)[1:-1]
    values = [rlhf_value(np.concatenate([m * parts[0], (1 - m) * parts[1]]), ref, reward, beta) for m in masses]
    return pd.DataFrame({"mass": masses, "value": values})


def _reward_model_margins(times: list[float]) -> list[float]:
    """Margin of an unregularised tabular reward model fitted to one annotation of one pair, over time.

    With a uniform reference and beta 1 the DPO loss of scores is the Bradley-Terry likelihood of rewards.
    """
    ref = np.full(2, 0.5)
    objective = PairObjective(free_policy(ref), ref, [(0, 1)], "dpo", {"beta": 1.0})
    return [float(theta[0] - theta[1]) for theta in gradient_flow(objective, np.zeros(2), times)]


def _figure(frame: pd.DataFrame, split: pd.DataFrame, by_mass: pd.DataFrame, best: float) -> str:
    from prefopt.figures import COLOURS, INK, drawing

    with drawing(7.2, 3.1) as canvas:
        left, right = canvas.figure.subplots(1, 2)
        places = frame["response"]
        left.bar(places, frame["optimum"], color=INK, alpha=0.3, width=0.7, label="RLHF optimum")
        for number, name in enumerate(("uniform", "random", "path")):
            left.plot(
                places + 0.2 * (number - 1), frame[name], "osD"[number], color=COLOURS[number], label=f"pairs: {name}"
            )
        left.set_xticks(places)
        left.set_xlabel("response")
        left.set_ylabel("probability")
        left.set_title("connected pairs")
        left.legend(loc="upper left")
        right.plot(by_mass["mass"], by_mass["value"], color=COLOURS[0], linewidth=1.8, label="zero distillation loss")
        right.axhline(best, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        right.annotate("RLHF optimum", (1.0, best), (0, 4), textcoords="offset points", ha="right")
        for row, marker, colour in zip(split.itertuples(), "os", COLOURS[1:], strict=False):
            label = f"reached from {'the reference' if row.start == 'reference' else row.start}"
            right.plot(row.first_component_mass, row.value, marker, color=colour, markersize=8, label=label)
        right.set_xlabel("mass of the first component")
        right.set_ylabel("RLHF value")
        right.set_title("disconnected pairs")
        right.margins(y=0.12)
        right.legend(loc="lower left")
    return canvas.svg
