"""From an arm's needs to its parents: the nodes over one data set that is tokenised for one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest
from prefopt.inputs.sources import prompts_identity
from prefopt.losses import COMPOSITIONS, get_loss
from prefopt.planning.ensembles import Ensembles
from prefopt.specs import ArmSpec, DispersionSpec, EnsembleSpec, SamplingSpec, ScratchModel, SftSpec, TokensSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from prefopt.artifacts import Node
    from prefopt.plan import Plan

FROM_ROUNDS = frozenset({"responsibilities", "advantages"})
"""Needs that nothing but a procedure can meet."""

ResolvedArm = tuple[str, dict[str, Any], dict[str, Any] | None, frozenset[str]]


def resolve_arm(arm: ArmSpec) -> ResolvedArm:
    """Loss name, parameters, regulariser and needs of an arm; a composition such as ``e_dpo`` is spelled out here.

    Raises BadInput for an unknown loss, an unknown or missing parameter, or a need that nothing can meet.
    """
    name, regulariser = arm.loss.name, arm.regulariser.model_dump() if arm.regulariser else None
    if name in COMPOSITIONS:
        name, default = COMPOSITIONS[name]
        regulariser = regulariser or dict(default) or None
    loss = get_loss(name).form(arm.loss.params)
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


def plan_prompts(
    plan: Plan, prompts: Any, tokens: TokensSpec, base: Node, data_root: Path, *, outputs: bool = False
) -> Node:
    """A prompt set as token ids of a model; ``outputs``: with a baseline's answers, which every row must then have."""
    source, execution, name = prompts_identity(prompts, data_root)
    how = tokens.model_dump()
    return plan.add("prompts", name, {"source": source, "tokens": how, "outputs": outputs}, {"base": base}, execution)


@dataclass(frozen=True)
class Wiring:
    """What arms can be made from: pairs, their tokens, the reference model, declared ensembles and samples.

    ``sampled`` is the tokens artifact whose prompts reference samples answer; ``base`` is what the references are
    fine-tuned from, on the tokens ``sampled``.
    """

    plan: Plan
    pairs: Node
    tokens: Node
    model: Node
    sampled: Node
    precision: str
    rewards: Mapping[str, EnsembleSpec] = field(default_factory=dict)
    samples: SamplingSpec | None = None
    base: Node | None = None
    references: Mapping[str, SftSpec] = field(default_factory=dict)
    quantize: str | None = None  # of the policies' body, and so of the reference that is the policy at step 0
    start: Node | None = None  # what policies start from, where it is not the model
    compared: Node | None = None  # the reference of their loss, where it is not what they start from
    given: Mapping[str, Node] = field(default_factory=dict)  # parents that rounds bring along, by need
    trained_on: Node | None = None  # tokens that reward models learn from, where they are not the policies'

    @property
    def ensembles(self) -> Ensembles:
        """What the declared ensembles become over these tokens."""
        return Ensembles(self.plan, self.pairs, self.tokens, self.trained_on or self.tokens, self.model, self.rewards)

    @property
    def reference(self) -> Node:
        """Scores of every pair under the reference."""
        return self.scores(self.model)

    def scores(self, model: Node, **more: bool) -> Node:
        """Scores of every pair under a model."""
        parents = {"tokens": self.tokens, "model": model}
        spec: dict[str, Any] = {"precision": self.precision, **more}
        if self.quantize is not None and model is self.model:
            spec["quantize"] = self.quantize
        return self.plan.add("reference", model.name, spec, parents)

    def second_reference(self, arm_name: str, arm: ArmSpec) -> Node:
        """Scores of every pair under the second reference that an arm names; BadInput where it names none we know."""
        known = ["base", *self.references]
        if arm.second_reference not in known or self.base is None:
            given = f"no reference '{arm.second_reference}'" if arm.second_reference else "its loss has two references"
            raise BadInput(f"arms.{arm_name}.second_reference: {given}; {nearest(arm.second_reference or '', known)}")
        sft = self.references.get(arm.second_reference)
        model = plan_sft(self.plan, sft, self.sampled, self.base)
        if model is self.model:
            raise BadInput(
                f"arms.{arm_name}.second_reference: '{arm.second_reference}' is the first reference itself; "
                "declare another one"
            )
        return self.scores(model)

    def win_rates(self, arm_name: str, arm: ArmSpec) -> Node:
        """Calibrated win rates of every train pair's responses among reference samples, by an arm's ensemble."""
        name = self.ensembles.named_by(arm_name, arm)
        if self.rewards[name].oracle:
            raise BadInput(f"arms.{arm_name}.rewards: samples are scored by trained reward models; '{name}' is none")
        members = {f"reward{k}": node for k, node in enumerate(self.ensembles.members(self.rewards[name]))}
        samples = self.draw(f"arms.{arm_name}", "train", arm.win_rate_samples, self.tokens)
        parents = {"tokens": self.tokens, "ensemble": self.ensembles.columns(name), "samples": samples, **members}
        return self.plan.add("win_rates", f"n{arm.win_rate_samples}-k{len(members)}", {}, parents)

    def _spread(self, why: str, declared: DispersionSpec) -> Node:
        named = self.rewards.get(declared.ratings or "")
        if named is None or named.kind != "distributional":
            known = [name for name, one in self.rewards.items() if one.kind == "distributional"]
            raise BadInput(
                f"{why}.dispersion: rating_spread is of a reward model of kind distributional, and 'ratings' names "
                f"{declared.ratings!r}; {nearest(declared.ratings or '', known)}"
            )
        return self.ensembles.ratings(named)

    def draw(self, why: str, split: str, per_prompt: int, tokens: Node | None = None) -> Node:
        """Reference samples for the prompts of a split of ``tokens``, those of ``sampled`` where none are given."""
        if self.samples is None:
            raise BadInput(f"{why}: needs reference samples; declare 'samples' in the item")
        if self.quantize is not None:
            raise BadInput(f"{why}: samples are of the reference as it is, not quantised; remove 'adapter.quantize'")
        if (self.samples.temperature, self.samples.top_p) != (1.0, 1.0):
            raise BadInput(
                "samples: KL and entropy are estimated from the reference itself; set temperature and top_p to 1"
            )
        spec = {"sampling": self.samples.model_dump(), "split": split, "per_prompt": per_prompt}
        parents = {"tokens": tokens or self.sampled, "model": self.model}
        return self.plan.add("samples", f"{self.model.name}-{split}", spec, parents)

    def dispersion(self, why: str, declared: DispersionSpec, rewards: Node | None = None) -> Node:
        """The dispersion estimate that is declared, over these pairs; ``rewards`` is for votes of an ensemble."""
        spec = declared.model_dump(exclude={"ratings"})
        if declared.control != "shuffled":
            spec["seed"] = None  # only the shuffled control draws
        name = declared.control or declared.estimator
        sources = {"tokens": self.tokens, "reference": self.reference}
        if declared.estimator in ("truth", "human_votes"):
            sources["pairs"] = self.pairs
        if declared.estimator == "vote_entropy":
            if rewards is None:
                raise BadInput(f"{why}: vote_entropy is of an arm's reward models, and no arm asks here")
            sources["rewards"] = rewards
        if declared.estimator == "rating_spread":
            sources["ratings"] = self._spread(why, declared)
        elif declared.ratings is not None:
            raise BadInput(f"{why}.dispersion: 'ratings' is about the estimator rating_spread; remove it")
        if declared.samples is not None:
            sources["samples"] = self.draw(why, "all", declared.samples)
        return self.plan.add("dispersion", name, spec, sources)

    def signals(self, arm_name: str, arm: ArmSpec, needs: frozenset[str]) -> dict[str, Node]:
        """The parents of a policy: tokens, model, and what its loss needs."""
        why = f"arms.{arm_name}"
        if arm.train is not None and arm.train.quantize != self.quantize:
            raise BadInput(f"{why}.train: all arms share the reference; declare 'adapter.quantize' in 'policy' as well")
        start = self.start or self.model
        parents = {"tokens": self.tokens, "model": start}
        for need in sorted(needs & FROM_ROUNDS):
            if need not in self.given:
                raise BadInput(f"{why}: its loss needs {need}, which rounds make; declare 'rounds' of a kind that does")
            parents[need] = self.given[need]
        if "reference" in needs:
            parents["reference"] = self.scores(
                self.compared or start, **({"tokens": True} if "tokens" in needs else {})
            )
        if "second_reference" in needs:
            parents["second_reference"] = self.second_reference(arm_name, arm)
        if "dispersion" in needs:
            voting = arm.dispersion.estimator == "vote_entropy"
            votes = self.ensembles.columns(self.ensembles.named_by(arm_name, arm)) if voting else None
            parents["dispersion"] = self.dispersion(why, arm.dispersion, votes)
        if "rewards" in needs:
            parents["rewards"] = self.ensembles.columns(self.ensembles.named_by(arm_name, arm))
        if "vote_share" in needs:
            parents["pairs"] = self.pairs
        if "win_rates" in needs:
            parents["win_rates"] = self.win_rates(arm_name, arm)
        if "auxiliary" in needs:
            named = arm.model_copy(update={"rewards": arm.auxiliary or arm.rewards})
            parents["auxiliary"] = self.ensembles.columns(self.ensembles.named_by(arm_name, named))
        if "reference_samples" in needs:
            parents["samples"] = self.draw(why, "train", 1)
        return parents
