"""Methods of several rounds on a table of responses: cyclic preferences, advantage alignment, momentum.

Sources: 2410.02197 (GPM and GPO), 2306.02231 (APA), 2410.06293 (accelerated preference optimization); the closed forms
that they are compared with are derived here.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prefopt.lazy import LazyModule
from prefopt.studies.registry import StudyResult, study

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

_CYCLE = ((0, 1), (1, 2), (2, 0))  # who beats whom


@study("tabular_rounds", "cyclic preferences with GPM and GPO, APA and momentum, against closed forms")
def tabular_rounds(
    *,
    start: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [0.5, 0.3, 0.2],  # noqa: B006
    reward: Annotated[list[float], Field(min_length=3, max_length=3)] = [1.0, 0.2, -0.5],  # noqa: B006
    beta: Positive = 20.0,
    rounds: Count = 2000,
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3,
    accelerated: Count = 3,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> StudyResult:
    """A cycle of three responses, and three responses with a reward; ``beta`` is also APA's lambda."""
    policy = np.array(start) / sum(start)
    cyclic, path = _cycle(policy, beta, rounds, seed)
    exponents = _exponents(momentum, accelerated)
    values = (
        cyclic | _advantages(policy, np.array(reward), beta) | _momentum(policy, np.array(reward), momentum, exponents)
    )
    values |= {"plain_exponent": float(accelerated), "accelerated_exponent": exponents[-1]}
    table = pd.DataFrame(path, columns=["response_0", "response_1", "response_2"])
    table.insert(0, "round", range(len(path)))
    thinned = table.iloc[:: max(1, len(table) // 200)]
    return StudyResult(values, {"cycle": thinned}, {"policy_on_a_cycle": _figure(path)})


def _cycle(policy: np.ndarray, beta: float, rounds: int, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """What vectors learn of a cycle and what no reward can, and the policies [rounds + 1, 3] of GPO on it."""
    from prefopt.outer.general_preference import fit, gpo_step, preferred, scores

    winner, loser = np.array(_CYCLE).T
    vectors = fit(winner, loser, 3, 2, tau=0.1, seed=seed)
    learned = scores(vectors)
    best = max(sum(order.index(i) < order.index(j) for i, j in _CYCLE) for order in permutations(range(3))) / 3
    score = np.zeros((3, 3))
    score[winner, loser], score[loser, winner] = 1.0, -1.0
    path = [policy]
    for _ in range(rounds):
        path.append(gpo_step(path[-1], score, beta))
    uniform = np.full(3, 1 / 3)
    dominated = scores(np.array([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0]]))  # a reward, as vectors
    winning = policy
    for _ in range(rounds):
        winning = gpo_step(winning, dominated, beta)
    return {
        "vectors_right": float((learned[winner, loser] > 0).mean()),
        "best_reward_right": best,
        "least_probability": float(preferred(vectors, 0.1)[winner, loser].min()),
        "uniform_stays": float(np.abs(gpo_step(uniform, score, beta) - uniform).max()),
        "average_from_uniform": float(np.abs(np.mean(path, axis=0) - uniform).max()),
        "last_from_uniform": float(np.abs(path[-1] - uniform).max()),
        "winner_without_a_cycle": float(winning[0]),
    }, np.stack(path)


def _advantages(policy: np.ndarray, reward: np.ndarray, lam: float) -> dict[str, float]:
    """t rounds of APA are pi_0 exp(t r / lambda): the policy's mean reward drops out of every round."""
    from scipy.special import softmax

    from prefopt.outer.rounds import advantage_policy

    now = policy
    for _ in range(10):
        now = advantage_policy(now, reward - now @ reward, lam)
    return {"advantage_gap": float(np.abs(now - softmax(np.log(policy) + 10 * reward / lam)).max())}


def _exponents(momentum: float, rounds: int) -> list[float]:
    """e_t of policies ref exp(e_t r / beta): fits f_t = e_{t-1} + 1, then e_t = f_t + momentum (f_t - f_{t-1})."""
    end = before = 0.0
    found = []
    for _ in range(rounds):
        now = end + 1.0
        end, before = now + momentum * (now - before), now
        found.append(end)
    return found


def _momentum(policy: np.ndarray, reward: np.ndarray, momentum: float, exponents: list[float]) -> dict[str, float]:
    """Extrapolated exact rounds, beta 1, against their exponents."""
    from scipy.special import softmax

    from prefopt.outer.rounds import extrapolated

    now, before, gap = policy, policy, 0.0
    for exponent in exponents:
        fit = softmax(np.log(now) + reward)
        now, before = extrapolated(fit, before, momentum), fit
        gap = max(gap, float(np.abs(now - softmax(np.log(policy) + exponent * reward)).max()))
    return {"momentum_gap": gap}


def _figure(path: np.ndarray) -> str:
    from prefopt.figures import COLOURS, INK, drawing

    with drawing(4.6, 3.1) as canvas:
        panel = canvas.figure.subplots()
        for response in range(3):
            panel.plot(path[:, response], color=COLOURS[response], linewidth=1.2, label=f"response {response}")
        panel.axhline(1 / 3, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_xlabel("round of GPO")
        panel.set_ylabel("probability")
        panel.set_title("0 beats 1 beats 2 beats 0")
        panel.legend(fontsize=8)
    return canvas.svg
