"""Accelerated preference optimization: plain rounds, and what momentum makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.procedures.registry import procedure
from prefopt.specs import AcceleratedRounds

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.procedures.chain import Chain


@procedure(AcceleratedRounds, paper="2410.06293", equation="accelerated preference optimization")
def accelerated(chain: Chain, declared: AcceleratedRounds) -> list[Node]:
    """Round t fits F_t from the current policy, which is also its reference, with the arm's loss; the next policy is
    in proportion to F_t (F_t / F_{t-1})^momentum, F_0 the reference: weights F_t + momentum (F_t - F_{t-1}), as is
    done in practice; log-probabilities follow to first order. The formula and the default .3 are recalled, not
    confirmed: ``against: start`` is the other reading, which extrapolates away from the policy that the round started
    at. The paper has 3 rounds with fresh responses that a preference model labels (``responses``); without
    ``responses`` every round has the arm's own pairs.
    """
    policy = before = chain.home.model
    rounds = []
    for number in range(1, declared.count + 1):
        over = chain.home if declared.responses is None else chain.answered(declared.responses, policy, number)
        fit = chain.fitted(over, policy)
        away = before if declared.against == "previous_fit" else policy
        before = fit
        policy = fit
        if declared.momentum > 0:
            parents = {"model": fit, "before": away}
            spec = {"momentum": declared.momentum}
            policy = chain.home.plan.add("extrapolated", fit.name, spec, parents)
        rounds.append(policy)
    return rounds
