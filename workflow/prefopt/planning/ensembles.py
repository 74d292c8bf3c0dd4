"""The nodes of reward ensembles: members or heads or one model, their scores, and the K columns side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prefopt.artifacts import Node
    from prefopt.plan import Plan
    from prefopt.specs import ArmSpec, EnsembleSpec


@dataclass(frozen=True)
class Ensembles:
    """What declared ensembles become: trained on ``learned``, scored on ``tokens``, from the weights of ``model``."""

    plan: Plan
    pairs: Node
    tokens: Node
    learned: Node
    model: Node
    declared: Mapping[str, EnsembleSpec]

    def named_by(self, arm_name: str, arm: ArmSpec) -> str:
        """Name of the ensemble that an arm uses; BadInput where that is not clear or not declared."""
        if arm.rewards is None and len(self.declared) == 1:
            return next(iter(self.declared))
        if arm.rewards is None:
            known = sorted(self.declared)
            raise BadInput(f"arms.{arm_name}: it needs reward models; set 'rewards' to one of {known}")
        if arm.rewards not in self.declared:
            raise BadInput(
                f"arms.{arm_name}.rewards: no ensemble '{arm.rewards}'; {nearest(arm.rewards, self.declared)}"
            )
        return arm.rewards

    def members(self, ensemble: EnsembleSpec) -> list[Node]:
        """The independent reward models of an ensemble; BadInput where it is heads on one body, or the oracle."""
        if ensemble.kind != "independent":
            raise BadInput(
                f"this needs reward models that can be used one by one, and '{ensemble.kind}' is one model with heads "
                "that belong together; declare an ensemble without 'kind'"
            )
        return [self._member(ensemble, k, seed) for k, seed in enumerate(ensemble.seeds or range(ensemble.members))]

    def _member(self, ensemble: EnsembleSpec, k: int, seed: int) -> Node:
        bias = ensemble.longer_wins[k] if ensemble.longer_wins else None
        spec = _trained(ensemble, {"init": seed, "order": seed, "subset": seed})
        spec |= {"subset": ensemble.subset, "longer_wins": bias}
        if ensemble.equal_size:
            spec["equal_to"] = ensemble.longer_wins
        name = f"{ensemble.split}-b{bias:g}-s{seed}" if bias is not None else f"{ensemble.split}-s{seed}"
        return self.plan.add("reward", name, spec, self._learning)

    @property
    def _learning(self) -> dict[str, Node]:
        return {"tokens": self.learned, "model": self.model}

    def columns(self, name: str) -> Node:
        """The K columns of a declared ensemble, or the one column of the oracle."""
        declared = self.declared[name]
        if declared.oracle:
            return self.plan.add("ensemble", "oracle", {"oracle": True}, {"tokens": self.tokens, "pairs": self.pairs})
        if declared.kind == "shared_backbone":
            return self._heads(declared)
        if declared.kind == "distributional":
            rated = self.ratings(declared)
            return self.plan.add("ensemble", "ratings", {}, {"tokens": self.tokens, "member0": rated})
        scores = {
            f"member{k}": self.plan.add("rewards", member.name, {}, {"tokens": self.tokens, "reward": member})
            for k, member in enumerate(self.members(declared))
        }
        kind = "biased" if declared.longer_wins else "seeds"  # not the declared name: one content has one name
        return self.plan.add("ensemble", f"{kind}-k{len(scores)}", {}, {"tokens": self.tokens, **scores})

    def ratings(self, declared: EnsembleSpec) -> Node:
        """Expected class and spread of every response, by a distributional reward model."""
        parents = {"tokens": self.tokens, "reward": self.one_model(declared)}
        return self.plan.add("rewards", "ratings", {"kind": declared.kind}, parents)

    def one_model(self, declared: EnsembleSpec) -> Node:
        """The one reward model of a kind whose outputs belong together."""
        (seed,) = declared.seeds or [0]
        spec = {"kind": declared.kind} | _trained(declared, {"init": seed, "order": seed, "subset": seed})
        parents = self._learning
        if declared.kind == "distributional":
            spec["prior_votes"] = declared.prior_votes
            parents["pairs"] = self.plan.node(self.learned.parents["pairs"])  # where there are votes, they count
        else:
            spec |= {"dimension": declared.dimension, "temperature": declared.temperature}
        return self.plan.add("reward", f"{declared.split}-{declared.kind}-s{seed}", spec, parents)

    def _heads(self, declared: EnsembleSpec) -> Node:
        """The K columns of heads on one body: one reward model, scored once."""
        seeds = declared.seeds or list(range(declared.members))
        kind = {"kind": declared.kind, "frozen": declared.frozen}
        spec = kind | _trained(declared, {"init": seeds, "order": seeds[0], "subset": seeds[0]})
        name = f"{'frozen' if declared.frozen else 'shared'}-k{len(seeds)}"
        body = self.plan.add("reward", f"{declared.split}-{name}", spec, self._learning)
        parents = {"tokens": self.tokens, "reward": body}
        scores = self.plan.add("rewards", body.name, {"members": len(seeds)}, parents)
        return self.plan.add("ensemble", name, kind, {"tokens": self.tokens, "heads": scores})


def _trained(declared: EnsembleSpec, seeds: dict[str, int | Sequence[int]]) -> dict[str, Any]:
    """How a reward model is trained, on all pairs of its split as they are; BadInput for the oracle, which is not."""
    if declared.train is None:
        raise BadInput("this needs reward models that are trained, and the oracle is none; declare 'train' instead")
    train = declared.train.model_dump()
    return {"train": train, "split": declared.split, "subset": 1.0, "longer_wins": None, "seeds": seeds}
