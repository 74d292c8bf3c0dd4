"""The nodes of an item whose policies, answers and judgements are artifacts of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest
from prefopt.inputs.sources import data_identity, file_identity, model_identity
from prefopt.judges.identity import judge_identity
from prefopt.planning.wiring import Wiring, check_lengths, plan_prompts, plan_sft, resolve_arm
from prefopt.procedures import plan_rounds
from prefopt.specs import (
    EnsembleSpec,
    FilePrompts,
    ItemSpec,
    LmJudgeSpec,
    SamplingSpec,
    ScratchModel,
    ServerJudgeSpec,
)

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.plan import Plan


_OUTPUTS = "outputs"  # the opponent whose answers are in a file
_DRAW_SEEDS = 100_000  # between the seeds of two draws: more than there are training seeds
_TEST_PROMPTS = 200


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
        self.base = base = plan.add("base", name, model_spec, scratch, model_execution)
        self.tokens = plan.add("tokens", self.pairs.name, item.tokens.model_dump(), {"pairs": self.pairs, "base": base})
        self.model = plan_sft(plan, item.sft, self.tokens, base)
        self.wiring = Wiring(
            plan,
            pairs=self.pairs,
            tokens=self.tokens,
            model=self.model,
            sampled=self.tokens,
            precision=item.policy.precision,
            quantize=item.policy.quantize,
            rewards=item.rewards,
            samples=item.samples,
            base=self.base,
            references=item.references,
        )
        self.reference = self.wiring.reference
        prompts = item.evaluate.prompt_set
        self.asked = None if prompts is None else plan_prompts(plan, prompts, item.tokens, base, data_root)

    def _policy(self, arm_name: str, seed: int) -> Node:
        arm = self.item.arms[arm_name]
        try:
            loss, params, regulariser, needs = resolve_arm(arm)
        except BadInput as error:
            raise BadInput(f"arms.{arm_name}.loss: {error}") from None
        train = arm.train or self.item.policy
        if arm.rounds is not None:
            return plan_rounds(self.wiring, arm_name, arm, train, seed)[-1]
        spec = {
            "loss": {"name": loss, "params": params},
            "regulariser": regulariser,
            "train": train.model_dump(),
            "seed": seed,
        }
        name = f"{arm.loss.name}-s{seed}"
        return self.plan.add("policy", name, spec, self.wiring.signals(arm_name, arm, needs))

    def _generations(self, model: Node, sampling: SamplingSpec) -> Node:
        count = self.item.evaluate.prompts
        if self.asked is None:
            sources = {"pairs": self.pairs, "tokens": self.tokens}
            count = count or _TEST_PROMPTS
        else:
            sources = {"pairs": self.asked, "tokens": self.asked}
        spec = {"prompts": count, "sampling": sampling.model_dump()}
        return self.plan.add("generations", model.name, spec, sources | {"model": model})

    def _sampling(self, seed: int, draw: int) -> SamplingSpec:
        """Decoding of one draw of the run with a seed."""
        sampling = self.item.evaluate.sampling
        return sampling.model_copy(update={"seed": sampling.seed + seed + _DRAW_SEEDS * draw})

    def _baseline(self, policies: dict[str, Node], seed: int, draw: int) -> Node:
        """What one draw of a seed is judged against; the reference answers once per draw, for all seeds."""
        evaluate = self.item.evaluate
        if evaluate.against == _OUTPUTS:
            source = evaluate.prompt_set
            if evaluate.outputs is not None:
                source = FilePrompts(kind="file", path=evaluate.outputs.path, sha256=evaluate.outputs.sha256)
            return plan_prompts(self.plan, source, self.item.tokens, self.base, self.data_root, outputs=True)
        if evaluate.against == "reference":
            return self._generations(self.model, self._sampling(0, draw))
        return self._generations(policies[evaluate.against], self._sampling(seed, draw))

    def _metrics(self, policy: Node, judgements: Node) -> Node:
        declared = self.item.evaluate.length_control
        if declared is None:
            return self.plan.add("metrics", policy.name, {}, {"judgements": judgements})
        files: dict[str, Any] = dict.fromkeys(("difficulty", "gamed"))
        execution = {}
        for role in files:
            if (file := getattr(declared, role)) is not None:
                files[role], execution[role] = file_identity(file, self.data_root)
        return self.plan.add(
            "metrics", policy.name, {"length_control": files}, {"judgements": judgements}, execution=execution
        )

    def _judge(self) -> tuple[dict[str, Any], dict[str, Node], dict[str, Any]]:
        """Spec, parents and execution settings of a judgement, but for what is judged."""
        judge = self.item.evaluate.judge
        if isinstance(judge, LmJudgeSpec | ServerJudgeSpec):
            if self.asked is not None and judge.labelled_pairs:
                raise BadInput("evaluate.judge: a prompt_set holds no labelled pairs; declare 'labelled_pairs: 0'")
            spec, execution = judge_identity(judge)
            parents = {"judge": self._judge_model(judge)} if isinstance(judge, LmJudgeSpec) else {}
            return {"judge": spec}, parents, {"judge": execution} if execution else {}
        if isinstance(judge, EnsembleSpec):
            if judge.split != "judge":
                raise BadInput("evaluate.judge: a held-out judge trains on 'split: judge', which no learner sees")
            if self.item.data.splits.judge == 0:
                raise BadInput("evaluate.judge: the data's 'splits' give the judge no share")
            return (
                {"judge": "reward_model"},
                {f"judge{k}": m for k, m in enumerate(self.wiring.ensembles.members(judge))},
                {},
            )
        if not self.world or self.asked is not None:
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
        self._check_opponent()
        self._check_claims()
        judge_spec, judge_parents, judge_execution = self._judge()
        judge_parents["pairs"] = self.asked or self.pairs
        against, draws = item.evaluate.against, item.evaluate.draws
        parents: dict[str, Node] = {"pairs": self.pairs, "tokens": self.tokens, "reference": self.reference}
        for seed in item.seeds:
            policies = {arm: self._policy(arm, seed) for arm in item.arms}
            parents |= {f"policy.{arm}.{seed}": policy for arm, policy in policies.items()}
            for draw in range(draws):
                of_draw = f"{seed}.{draw}" if draw else f"{seed}"
                baseline = self._baseline(policies, seed, draw)
                parents[f"baseline.{of_draw}"] = baseline
                for arm, policy in policies.items():
                    generations = baseline if arm == against else self._generations(policy, self._sampling(seed, draw))
                    parents[f"generations.{arm}.{of_draw}"] = generations
                    if arm == against:
                        continue
                    sides = {"generations": generations, "baseline": baseline}
                    judged = self.plan.add(
                        "judgements", policy.name, judge_spec, judge_parents | sides, judge_execution
                    )
                    parents[f"metrics.{arm}.{of_draw}"] = self._metrics(policy, judged)
        spec: dict[str, Any] = {
            "item": item.item.model_dump(),
            "arms": {name: arm.loss.model_dump() for name, arm in item.arms.items()},
            "seeds": item.seeds,
            "against": against,
            "expect": [row.model_dump() for row in item.expect],
        }
        if draws > 1:
            spec["draws"] = draws
        return self.plan.add(f"papers/{item.item.paper}", item.item.name, spec, parents)

    def _check_opponent(self) -> None:
        against, arms = self.item.evaluate.against, self.item.arms
        if _OUTPUTS in arms:
            raise BadInput(f"arms.{_OUTPUTS}: this name stands for answers in a file; call the arm something else")
        if against not in (*arms, "reference", _OUTPUTS):
            raise BadInput(f"evaluate.against: no arm '{against}'; {nearest(against, [*arms, 'reference', _OUTPUTS])}")
        if self.item.evaluate.draws > 1 and self.item.evaluate.sampling.temperature == 0:
            raise BadInput("evaluate.draws: at temperature 0 all draws are the same answer; sample, or draw once")

    def _check_claims(self) -> None:
        known = [*self.item.arms, "reference", *([_OUTPUTS] if self.item.evaluate.against == _OUTPUTS else [])]
        pairwise = isinstance(self.item.evaluate.judge, LmJudgeSpec | ServerJudgeSpec)
        for row in self.item.expect:
            if row.metric == "length_controlled_win_rate" and self.item.evaluate.length_control is None:
                raise BadInput("expect: no length-controlled win rate is measured; declare evaluate.length_control")
            if pairwise and row.metric == "reward_advantage":
                raise BadInput("expect: a judge that sees two answers gives no reward; claim the metric 'win_rate'")
            for name in (row.arm, row.than):
                if isinstance(name, str) and name not in known:
                    raise BadInput(f"expect: no arm '{name}'; {nearest(name, known)}")
