"""The nodes of an item whose policies, answers and judgements are artifacts of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest
from prefopt.judges.identity import judge_identity
from prefopt.sources import data_identity, model_identity
from prefopt.specs import EnsembleSpec, ItemSpec, LmJudgeSpec, SamplingSpec, ScratchModel, ServerJudgeSpec
from prefopt.wiring import Wiring, check_lengths, plan_sft, resolve_arm

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.plan import Plan


class ItemPlanner:
    """Builds the nodes of one item, from its data up."""

    def __init__(self, plan: Plan, item: ItemSpec, data_root: Path) -> None:
        self.plan, self.item, self.data_root = plan, item, data_root
        samplings = [item.evaluate.sampling, *([item.samples] if item.samples else [])]
        check_lengths(item.model, item.tokens, samplings)
        data_spec, data_execution, name = data_identity(item.data, data_root)
        self.world = data_spec["source"]["kind"] == "world"
        self.pairs = plan.add("pairs", name, data_spec, execution=data_execution)
        model_spec, model_execution, name = model_identity(item.model, data_root)
        scratch = {"pairs": self.pairs} if model_spec["kind"] == "scratch" else {}
        base = plan.add("base", name, model_spec, scratch, model_execution)
        self.tokens = plan.add("tokens", self.pairs.name, item.tokens.model_dump(), {"pairs": self.pairs, "base": base})
        self.model = plan_sft(plan, item.sft, self.tokens, base)
        self.wiring = Wiring(
            plan,
            pairs=self.pairs,
            tokens=self.tokens,
            model=self.model,
            sampled=self.tokens,
            precision=item.policy.precision,
            rewards=item.rewards,
            samples=item.samples,
        )
        self.reference = self.wiring.reference

    def _policy(self, arm_name: str, seed: int) -> Node:
        arm = self.item.arms[arm_name]
        try:
            loss, params, regulariser, needs = resolve_arm(arm)
        except BadInput as error:
            raise BadInput(f"arms.{arm_name}.loss: {error}") from None
        spec = {
            "loss": {"name": loss, "params": params},
            "regulariser": regulariser,
            "train": (arm.train or self.item.policy).model_dump(),
            "seed": seed,
        }
        name = f"{arm.loss.name}-s{seed}"
        return self.plan.add("policy", name, spec, self.wiring.signals(arm_name, arm, needs))

    def _generations(self, model: Node, sampling: SamplingSpec) -> Node:
        spec = {"prompts": self.item.evaluate.prompts, "sampling": sampling.model_dump()}
        parents = {"pairs": self.pairs, "tokens": self.tokens, "model": model}
        return self.plan.add("generations", model.name, spec, parents)

    def _judge(self) -> tuple[dict[str, Any], dict[str, Node], dict[str, Any]]:
        """Spec, parents and execution settings of a judgement, but for what is judged."""
        judge = self.item.evaluate.judge
        if isinstance(judge, LmJudgeSpec | ServerJudgeSpec):
            spec, execution = judge_identity(judge)
            parents = {"judge": self._judge_model(judge)} if isinstance(judge, LmJudgeSpec) else {}
            return {"judge": spec}, parents, {"judge": execution} if execution else {}
        if isinstance(judge, EnsembleSpec):
            if judge.split != "judge":
                raise BadInput("evaluate.judge: a held-out judge trains on 'split: judge', which no learner sees")
            if self.item.data.splits.judge == 0:
                raise BadInput("evaluate.judge: the data's 'splits' give the judge no share")
            return {"judge": "reward_model"}, {f"judge{k}": m for k, m in enumerate(self.wiring.members(judge))}, {}
        if not self.world:
            raise BadInput("evaluate.judge: the oracle exists for the demo world only; declare another judge")
        return {"judge": "oracle"}, {}, {}

    def _judge_model(self, judge: LmJudgeSpec) -> Node:
        if isinstance(judge.model, ScratchModel):
            raise BadInput("evaluate.judge: a model from scratch judges at random; name a local or hub model")
        spec, execution, name = model_identity(judge.model, self.data_root)
        return self.plan.add("base", name, spec, execution=execution)

    def item_node(self) -> Node:
        """Policies, evaluations and the item over all arms and seeds."""
        item = self.item
        against = item.evaluate.against
        if against != "reference" and against not in item.arms:
            raise BadInput(f"evaluate.against: no arm '{against}'; {nearest(against, [*item.arms, 'reference'])}")
        self._check_claims()
        judge_spec, judge_parents, judge_execution = self._judge()
        sampling = item.evaluate.sampling
        parents: dict[str, Node] = {"pairs": self.pairs, "tokens": self.tokens, "reference": self.reference}
        for seed in item.seeds:
            seeded = sampling.model_copy(update={"seed": sampling.seed + seed})
            policies = {arm: self._policy(arm, seed) for arm in item.arms}
            baseline_model = self.model if against == "reference" else policies[against]
            baseline = self._generations(baseline_model, sampling if against == "reference" else seeded)
            for arm, policy in policies.items():
                parents[f"policy.{arm}.{seed}"] = policy
                if arm == against:
                    parents[f"generations.{arm}.{seed}"] = baseline
                    continue
                generations = self._generations(policy, seeded)
                parents[f"generations.{arm}.{seed}"] = generations
                judgements = self.plan.add(
                    "judgements",
                    policy.name,
                    judge_spec,
                    {"pairs": self.pairs, "generations": generations, "baseline": baseline, **judge_parents},
                    judge_execution,
                )
                parents[f"metrics.{arm}.{seed}"] = self.plan.add("metrics", policy.name, {}, {"judgements": judgements})
            parents[f"baseline.{seed}"] = baseline
        spec = {
            "item": item.item.model_dump(),
            "arms": {name: arm.loss.model_dump() for name, arm in item.arms.items()},
            "seeds": item.seeds,
            "against": against,
            "expect": [row.model_dump() for row in item.expect],
        }
        return self.plan.add(f"papers/{item.item.paper}", item.item.name, spec, parents)

    def _check_claims(self) -> None:
        known = [*self.item.arms, "reference"]
        pairwise = isinstance(self.item.evaluate.judge, LmJudgeSpec | ServerJudgeSpec)
        for row in self.item.expect:
            if pairwise and row.metric == "reward_advantage":
                raise BadInput("expect: a judge that sees two answers gives no reward; claim the metric 'win_rate'")
            for name in (row.arm, row.than):
                if isinstance(name, str) and name not in known:
                    raise BadInput(f"expect: no arm '{name}'; {nearest(name, known)}")
