"""EM-DPO: annotators of unseen types, one policy for each type, one mixture of the policies for everybody."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.planning.wiring import resolve_arm
from prefopt.procedures.registry import procedure
from prefopt.specs import EmRounds

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.procedures.chain import Chain


@procedure(EmRounds, paper="2405.15065", equation="EM-DPO; min-max regret as in its extension 2510.15716")
def em(chain: Chain, declared: EmRounds) -> list[Node]:
    """Needs pairs with named annotators and the loss ``em_dpo``. E-step: responsibility of type k for annotator a in
    proportion to prior_k prod sigmoid(beta margin_k) over a's votes; at the first round they are drawn at random, one
    distribution per annotator. M-step: every type's policy goes on from its last round with responsibilities as
    weights, against the first reference. Mixture: weights that minimise max_k regret_k, the worth of policy j to type k
    being beta times the mean log-ratio of policy k on j's own responses. K is not known beforehand, and the extension
    proves that binary pairs cannot identify the types in general. The reading that policies go on instead of starting
    anew is ours.
    """
    home = chain.home
    if "responsibilities" not in resolve_arm(chain.arm)[3]:
        raise BadInput(f"{chain.why}: kind 'em' weights pairs by responsibilities; give the arm the loss 'em_dpo'")
    source = home.pairs.spec.get("source", {})
    if source.get("kind") != "votes" and "raters" not in source:
        raise BadInput(
            f"{chain.why}: kind 'em' needs to know who voted; use data of kind votes, or 'raters' in the demo world"
        )
    policies = [home.model] * declared.types
    assigned, rounds = None, []
    for number in range(1, declared.count + 1):
        assigned = _responsibilities(chain, policies, assigned)
        over = replace(home, given={"responsibilities": assigned})
        policies = [chain.fitted(over, policy, home.model, type=k) for k, policy in enumerate(policies)]
        rounds.append(_mixture(chain, declared, policies, assigned, number))
    return rounds


def _responsibilities(chain: Chain, policies: list[Node], before: Node | None) -> Node:
    home, spec = chain.home, {"types": len(policies)}
    parents = {"pairs": home.pairs, "tokens": home.tokens}
    if before is None:
        return home.plan.add("responsibilities", f"k{len(policies)}-random", spec | {"seed": chain.seed}, parents)
    scores = {f"scores{k}": home.scores(policy) for k, policy in enumerate(policies)}
    parents |= {"reference": home.reference, "before": before, **scores}
    spec |= {"beta": chain.arm.loss.params["beta"]}
    return home.plan.add("responsibilities", f"k{len(policies)}", spec, parents)


def _mixture(chain: Chain, declared: EmRounds, policies: list[Node], assigned: Node, number: int) -> Node:
    parents = {"model": chain.home.model, "responsibilities": assigned}
    parents |= {f"policy{k}": policy for k, policy in enumerate(policies)}
    parents |= {f"samples{k}": chain.drawn(policy, 1, number, declared.prompts) for k, policy in enumerate(policies)}
    spec = {"beta": chain.arm.loss.params["beta"], "rule": declared.mixture}
    return chain.home.plan.add("mixtures", f"k{len(policies)}-s{chain.seed}", spec, parents)
