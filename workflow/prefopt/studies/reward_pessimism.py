"""The pessimistic policy of a set of rewards: exact on the convex hull, and how the best single member compares.

Source: 2405.19316, theorem 2; that the set has to be convex is this project's own derivation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule
from prefopt.studies.registry import StudyResult, study
from prefopt.tabular import kl, mixture_value, pessimistic_optimum, pessimistic_value, rlhf_optimum, rlhf_value

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")

Positive = Annotated[float, Field(gt=0.0)]

_REWARDS = [[1.0, -0.5, 0.25, 2.0], [2.0, 1.0, -1.0, -1.5]]


@study("pessimistic_policy", "max-min over a reward set: the convex hull's solution against the member nearest to ref")
def pessimistic_policy(
    *,
    ref: list[Positive] = [0.1, 0.2, 0.3, 0.4],  # noqa: B006
    rewards: Annotated[list[list[float]], Field(min_length=2, max_length=2)] = _REWARDS,
    beta: Positive = 0.5,
    draws: Annotated[int, Field(ge=1)] = 300,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> StudyResult:
    """The vector problem, then ``draws`` random problems with as many responses and two rewards each."""
    if len({len(ref), *map(len, rewards)}) != 1:
        raise BadInput(f"study 'pessimistic_policy': {len(ref)} responses, rewards of {[len(r) for r in rewards]}")
    ref_p, rows = np.array(ref) / sum(ref), np.array(rewards)
    weights, policy = pessimistic_optimum(ref_p, rows, beta)
    members = [rlhf_optimum(ref_p, row, beta) for row in rows]
    distances = [beta * kl(ref_p, member) for member in members]
    scores = [pessimistic_value(member, ref_p, rows, beta) for member in members]
    hull = pessimistic_value(policy, ref_p, rows, beta)
    random = _random_problems(np.random.default_rng(seed), draws, len(ref_p), beta)
    values = {
        **{f"beta_kl_{k}": distance for k, distance in enumerate(distances)},
        **{f"member_value_{k}": score for k, score in enumerate(scores)},
        **{f"hull_weight_{k}": float(weight) for k, weight in enumerate(weights)},
        **{f"hull_policy_{n}": float(p) for n, p in enumerate(policy)},
        "hull_value": hull,
        "hull_duality_gap": mixture_value(weights, ref_p, rows, beta) - hull,
        "reference_value": pessimistic_value(ref_p, ref_p, rows, beta),
        "nearest_member_value": scores[int(np.argmin(distances))],
        "random_identity_gap": float(random["identity_gap"].max()),
        "random_duality_gap": float(random["duality_gap"].max()),
        "random_least_hull_value": float(random["hull"].min()),
        "random_least_gain_over_member": float((random["hull"] - random["member"]).min()),
        "random_share_member_below_reference": float((random["member"] < 0).mean()),
    }
    table = pd.DataFrame({"member": range(len(rows)), "beta_kl": distances, "pessimistic_value": scores})
    figure = _figure(ref_p, rows, beta, weights, random)
    return StudyResult(
        values, {"members": table, "random": random}, {"mixtures_of_rewards_against_single_members": figure}
    )


def _random_problems(rng: np.random.Generator, draws: int, responses: int, beta: float) -> pd.DataFrame:
    """Pessimistic values of the hull solution and of the member with the smallest KL(ref || pi), per problem."""
    found = []
    for _ in range(draws):
        ref, rows = rng.dirichlet(np.full(responses, 2.0)), rng.normal(size=(2, responses))
        weights, policy = pessimistic_optimum(ref, rows, beta)
        members = [rlhf_optimum(ref, row, beta) for row in rows]
        distances = [kl(ref, member) for member in members]
        gains = [rlhf_value(m, ref, row, beta) - ref @ row for m, row in zip(members, rows, strict=True)]
        hull = pessimistic_value(policy, ref, rows, beta)
        found.append(
            {
                "hull": hull,
                "member": pessimistic_value(members[int(np.argmin(distances))], ref, rows, beta),
                "duality_gap": abs(mixture_value(weights, ref, rows, beta) - hull),
                "identity_gap": max(abs(g - beta * d) for g, d in zip(gains, distances, strict=True)),
                "mixed": bool(weights.min() > 1e-6),
            }
        )
    return pd.DataFrame(found)


def _figure(ref: np.ndarray, rows: np.ndarray, beta: float, weights: np.ndarray, random: pd.DataFrame) -> str:
    from prefopt.figures import COLOURS, INK, drawing

    shares = np.linspace(0.0, 1.0, 101)
    mixtures = [np.array([share, 1 - share]) for share in shares]
    bound = [mixture_value(m, ref, rows, beta) for m in mixtures]
    worst = [pessimistic_value(rlhf_optimum(ref, m @ rows, beta), ref, rows, beta) for m in mixtures]
    with drawing(7.2, 3.1) as canvas:
        left, right = canvas.figure.subplots(1, 2)
        left.plot(shares, bound, color=COLOURS[0], linewidth=1.8, label="beta KL(ref ‖ policy)")
        left.plot(shares, worst, color=COLOURS[1], linewidth=1.8, linestyle="--", label="worst-case value")
        left.plot(weights[0], mixture_value(weights, ref, rows, beta), "o", color=COLOURS[2], label="pessimistic")
        left.axhline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        left.annotate("the reference", (0.0, 0.0), (2, 4), textcoords="offset points")
        left.set_xlabel("share of the first reward in the mixture")
        left.set_ylabel("value")
        left.set_title("the vector problem")
        left.legend(loc="upper center", fontsize=8)
        right.scatter(random["hull"], random["member"], s=10, color=COLOURS[0], alpha=0.5, linewidths=0)
        top = float(random["hull"].max())
        right.plot([0, top], [0, top], color=INK, linewidth=0.8)
        right.axhline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        right.set_xlabel("worst-case value of the hull solution")
        right.set_ylabel("of the member nearest to ref")
        right.set_title(f"{len(random)} random problems")
    return canvas.svg
