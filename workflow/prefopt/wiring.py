"""From an arm's needs to its parents: the nodes over one data set that is tokenised for one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest
from prefopt.losses import COMPOSITIONS, get_loss
from prefopt.specs import ArmSpec, DispersionSpec, EnsembleSpec, SamplingSpec, ScratchModel, SftSpec, TokensSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefopt.artifacts import Node
    from prefopt.plan import Plan

ResolvedArm = tuple[str, dict[str, Any], dict[str, Any] | None, frozenset[str]]


def resolve_arm(arm: ArmSpec) -> ResolvedArm:
    """Loss name, parameters, regulariser and needs of an arm; a composition such as ``e_dpo`` is spelled out here.

    Raises BadInput for an unknown loss, an unknown or missing parameter, or a need that nothing can meet.
    """
    name, regulariser = arm.loss.name, arm.regulariser.model_dump() if arm.regulariser else None
    if name in COMPOSITIONS:
        name, default = COMPOSITIONS[name]
        regulariser = regulariser or dict(default) or None
    loss = get_loss(name)
    loss.check_params(arm.loss.params)
    needs = loss.needs | ({"reference_samples"} if regulariser else set())
    return name, arm.loss.params, regulariser, frozenset(needs)


def check_lengths(model: Any, tokens: TokensSpec, samplings: list[SamplingSpec]) -> None:
    """Refuse, before anything runs, texts longer than the positions of a model from scratch."""
    if not isinstance(model, ScratchModel):
        return
    longest = max([tokens.max_length, *(tokens.max_prompt_tokens + s.max_new_tokens for s in samplings)])
    if longest > model.max_positions:
        raise BadInput(
            f"texts of up to {longest} tokens (tokens.max_length, or a prompt with max_new_tokens), but the model has "
            f"max_positions {model.max_positions}; lower the former or raise the latter"
        )


def plan_sft(plan: Plan, sft: SftSpec | None, tokens: Node, base: Node) -> Node:
    """The reference model: the fine-tuned base, or the base itself."""
    if sft is None:
        return base
    spec = sft.model_dump()
    return plan.add("sft", f"sft-s{spec['seed']}", spec, {"tokens": tokens, "base": base})


@dataclass(frozen=True)
class Wiring:
    """What arms can be made from: pairs, their tokens, the reference model, declared ensembles and samples.

    ``sampled`` is the tokens artifact whose prompts reference samples answer.
    """

    plan: Plan
    pairs: Node
    tokens: Node
    model: Node
    sampled: Node
    precision: str
    rewards: Mapping[str, EnsembleSpec] = field(default_factory=dict)
    samples: SamplingSpec | None = None

    @property
    def reference(self) -> Node:
        """Scores of every pair under the reference."""
        parents = {"tokens": self.tokens, "model": self.model}
        return self.plan.add("reference", self.model.name, {"precision": self.precision}, parents)

    def members(self, ensemble: EnsembleSpec) -> list[Node]:
        """The reward models of an ensemble."""
        nodes = []
        for k, seed in enumerate(ensemble.seeds or range(ensemble.members)):
            bias = ensemble.longer_wins[k] if ensemble.longer_wins else None
            spec = {
                "train": ensemble.train.model_dump(),
                "split": ensemble.split,
                "subset": ensemble.subset,
                "longer_wins": bias,
                "seeds": {"init": seed, "order": seed, "subset": seed},
            }
            if ensemble.equal_size:
                spec["equal_to"] = ensemble.longer_wins
            name = f"{ensemble.split}-b{bias:g}-s{seed}" if bias is not None else f"{ensemble.split}-s{seed}"
            nodes.append(self.plan.add("reward", name, spec, {"tokens": self.tokens, "model": self.model}))
        return nodes

    def ensemble(self, name: str) -> Node:
        """The K columns of a declared ensemble, or the one column of the oracle."""
        declared = self.rewards[name]
        if declared.oracle:
            return self.plan.add("ensemble", "oracle", {"oracle": True}, {"tokens": self.tokens, "pairs": self.pairs})
        scores = {
            f"member{k}": self.plan.add("rewards", member.name, {}, {"tokens": self.tokens, "reward": member})
            for k, member in enumerate(self.members(declared))
        }
        kind = "biased" if declared.longer_wins else "seeds"  # not the declared name: one content has one name
        return self.plan.add("ensemble", f"{kind}-k{len(scores)}", {}, {"tokens": self.tokens, **scores})

    def rewards_of(self, arm_name: str, arm: ArmSpec) -> str:
        """Name of the ensemble that an arm uses; BadInput where that is not clear or not declared."""
        if arm.rewards is None and len(self.rewards) == 1:
            return next(iter(self.rewards))
        if arm.rewards is None:
            known = sorted(self.rewards)
            raise BadInput(f"arms.{arm_name}: it needs reward models; set 'rewards' to one of {known}")
        if arm.rewards not in self.rewards:
            raise BadInput(
                f"arms.{arm_name}.rewards: no ensemble '{arm.rewards}'; {nearest(arm.rewards, self.rewards)}"
            )
        return arm.rewards

    def draw(self, why: str, split: str, per_prompt: int) -> Node:
        """Reference samples for the prompts of a split."""
        if self.samples is None:
            raise BadInput(f"{why}: needs reference samples; declare 'samples' in the item")
        if (self.samples.temperature, self.samples.top_p) != (1.0, 1.0):
            raise BadInput(
                "samples: KL and entropy are estimated from the reference itself; set temperature and top_p to 1"
            )
        spec = {"sampling": self.samples.model_dump(), "split": split, "per_prompt": per_prompt}
        parents = {"tokens": self.sampled, "model": self.model}
        return self.plan.add("samples", f"{self.model.name}-{split}", spec, parents)

    def dispersion(self, why: str, declared: DispersionSpec, rewards: Node | None = None) -> Node:
        """The dispersion estimate that is declared, over these pairs; ``rewards`` is for votes of an ensemble."""
        spec = declared.model_dump()
        if declared.control != "shuffled":
            spec["seed"] = None  # only the shuffled control draws
        name = declared.control or declared.estimator
        sources = {"tokens": self.tokens, "reference": self.reference}
        if declared.estimator == "truth":
            sources["pairs"] = self.pairs
        if declared.estimator == "vote_entropy":
            sources["rewards"] = rewards
        if declared.samples is not None:
            sources["samples"] = self.draw(why, "all", declared.samples)
        return self.plan.add("dispersion", name, spec, sources)

    def signals(self, arm_name: str, arm: ArmSpec, needs: frozenset[str]) -> dict[str, Node]:
        """The parents of a policy: tokens, model, and what its loss needs."""
        why = f"arms.{arm_name}"
        parents = {"tokens": self.tokens, "model": self.model}
        if "reference" in needs:
            parents["reference"] = self.reference
        if "dispersion" in needs:
            voting = arm.dispersion.estimator == "vote_entropy"
            votes = self.ensemble(self.rewards_of(arm_name, arm)) if voting else None
            parents["dispersion"] = self.dispersion(why, arm.dispersion, votes)
        if "rewards" in needs:
            parents["rewards"] = self.ensemble(self.rewards_of(arm_name, arm))
        if "reference_samples" in needs:
            parents["samples"] = self.draw(why, "train", 1)
        return parents
