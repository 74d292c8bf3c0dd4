"""Rounds on a policy's own responses: with the same reward models throughout, or with ones that keep learning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.procedures.registry import procedure
from prefopt.specs import DiscriminatorRounds, OnlineRounds

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.planning.wiring import Wiring
    from prefopt.procedures.chain import Chain

_GOLD_ROUNDS = 500  # numbers of gold draws: other prompts than those of the round's other pairs


@procedure(OnlineRounds, paper="this project", equation="on-policy rounds of any pair loss")
def online(chain: Chain, declared: OnlineRounds) -> list[Node]:
    """Round t draws ``responses`` from the current policy, labels them and trains on with the arm's loss. With the loss
    ``apa`` it is advantage-induced alignment (2306.02231), whose old policy is the ``current`` reference; with ``count:
    1``, ``choose: pareto`` and the loss ``capo`` it is CaPO (2502.02588), with 16 responses in the paper; with ``dpo``
    it is iterated DPO.
    """
    policy, rounds = chain.home.model, []
    for number in range(1, declared.count + 1):
        over = chain.answered(declared.responses, policy, number)
        policy = chain.fitted(over, policy, _reference(chain, declared, policy))
        rounds.append(policy)
    return rounds


@procedure(DiscriminatorRounds, paper="2405.01511", equation="discriminator-guided DPO (D2PO)")
def discriminator(chain: Chain, declared: DiscriminatorRounds) -> list[Node]:
    """Round t draws responses from the current policy; ``gold`` labels a few pairs of them, the discriminator is
    trained anew on the arm's own pairs and all gold ones so far and labels many more (silver), on which the policy
    trains on with the arm's loss. 16 gold and 256 silver labels a round and beta .05 are the released code's; there the
    discriminator is updated on its gold labels (learning rate 1e-4, 4 epochs) after the policy, here it starts anew
    from the reference model and before it. Whether the code's reference stays the first one was not confirmed:
    ``reference: current`` is the other reading.
    """
    ensemble = chain.ensemble("discriminator", declared.discriminator)
    if ensemble.oracle:
        raise BadInput(f"{chain.why}.discriminator: '{declared.discriminator}' is the oracle, which does not learn")
    judges = chain.judges(chain.ensemble("gold", declared.gold))
    policy, known, rounds = chain.home.model, chain.home, []
    for number in range(1, declared.count + 1):
        samples = chain.drawn(policy, declared.per_prompt, number, declared.prompts)
        gold = {"choose": "random", "prompts": declared.gold_labels}
        known = chain.labelled(samples, judges, _GOLD_ROUNDS + number, onto=known, **gold)
        members = _trained_on(known, chain).ensembles.members(ensemble)
        over = chain.labelled(samples, members, number, choose="extremes", prompts=None)
        policy = chain.fitted(over, policy, _reference(chain, declared, policy))
        rounds.append(policy)
    return rounds


def _trained_on(known: Wiring, chain: Chain) -> Wiring:
    return replace(chain.home, tokens=known.tokens, trained_on=None)


def _reference(chain: Chain, declared: OnlineRounds | DiscriminatorRounds, policy: Node) -> Node:
    return chain.home.model if declared.reference == "initial" else policy
