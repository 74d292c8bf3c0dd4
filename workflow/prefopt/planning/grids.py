"""The nodes of a grid item: one trial per condition, arm, point and seed, over data and signals that they share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.grids.check import check_claims
from prefopt.inputs.sources import data_identity, model_identity
from prefopt.losses import get_loss
from prefopt.planning.grid_points import GridPoint, check_names, grid_points, quick_part
from prefopt.planning.wiring import Wiring, check_lengths, plan_prompts, plan_sft, resolve_arm
from prefopt.procedures import plan_rounds
from prefopt.specs import (
    ClassifierJudgeSpec,
    ConditionSpec,
    DataSpec,
    EvaluationSet,
    GridArmSpec,
    GridItemSpec,
    RewardJudgeSpec,
)

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.plan import Plan

_SET_PROMPTS = 300


class GridPlanner:
    """Builds the nodes of one grid item, from its data up."""

    def __init__(self, plan: Plan, item: GridItemSpec, data_root: Path) -> None:
        self.plan, self.data_root = plan, data_root
        check_names(item)
        self.whole = item
        self.item = item if plan.config.full else quick_part(item)
        samplings = [item.evaluate.sampling, *([item.samples] if item.samples else [])]
        check_lengths(item.model, item.tokens, samplings)
        pairs = self._pairs(item.reference.data)
        model_spec, execution, name = model_identity(item.model, data_root)
        scratch = {"pairs": pairs} if model_spec["kind"] == "scratch" else {}
        self.base = plan.add("base", name, model_spec, scratch, execution)
        self.home = self._tokens(item.reference.data)
        self.model = plan_sft(plan, item.reference.sft, self.home, self.base)

    def _pairs(self, data: DataSpec) -> Node:
        spec, execution, name = data_identity(data, self.data_root)
        return self.plan.add("pairs", name, spec, execution=execution)

    def _tokens(self, data: DataSpec) -> Node:
        pairs = self._pairs(data)
        return self.plan.add("tokens", pairs.name, self.item.tokens.model_dump(), {"pairs": pairs, "base": self.base})

    def _wiring(self, data: DataSpec) -> Wiring:
        return self._wired(self._pairs(data), self._tokens(data))

    def _condition(self, declared: ConditionSpec) -> Wiring:
        """The wiring over a condition's training data, labelled again where it says so."""
        relabel, wiring = declared.relabel, self._wiring(declared.data)
        if relabel is None:
            return wiring
        if declared.data.splits.judge == 0:
            raise BadInput("conditions: relabel trains its reward model on the judge split; the data give it no share")
        (oracle,) = wiring.ensembles.members(relabel.oracle)
        scores = self.plan.add("rewards", oracle.name, {}, {"tokens": wiring.tokens, "reward": oracle})
        sources = {"pairs": wiring.pairs, "tokens": wiring.tokens, "rewards": scores}
        name = wiring.pairs.name if relabel.rho is None else f"{wiring.pairs.name}-rho{relabel.rho:g}"
        pairs = self.plan.add("relabelled", name, relabel.model_dump(include={"rho", "size", "seed"}), sources)
        tokens = self.plan.add("tokens", name, self.item.tokens.model_dump(), {"pairs": pairs, "base": self.base})
        return self._wired(pairs, tokens)

    def _wired(self, pairs: Node, tokens: Node) -> Wiring:
        return Wiring(
            self.plan,
            pairs=pairs,
            tokens=tokens,
            model=self.model,
            sampled=self.home,
            precision=self.item.policy.precision if self.item.policy else "fp32",
            quantize=self.item.policy.quantize if self.item.policy else None,
            rewards=self.item.rewards,
            samples=self.item.samples,
            base=self.base,
            references=self.item.references,
        )

    def _judge(self) -> tuple[str, dict[str, Node]]:
        judge = self.item.evaluate.judge
        if isinstance(judge, ClassifierJudgeSpec):
            pairs = self._pairs(judge.classifier)
            return "classifier", {
                "classifier": self.plan.add("classifier", pairs.name, {"split": "train"}, {"pairs": pairs})
            }
        if isinstance(judge, RewardJudgeSpec):
            if judge.rewards.split != "judge" or judge.data.splits.judge == 0:
                raise BadInput(
                    "evaluate.judge: a held-out judge trains on 'split: judge', and its data need a share for it"
                )
            members = self._wiring(judge.data).ensembles.members(judge.rewards)
            return "reward_model", {f"judge{k}": member for k, member in enumerate(members)}
        for name, declared in self.item.evaluate.sets.items():
            if declared.data is None or declared.data.source.kind != "world":
                raise BadInput(
                    f"evaluate.sets.{name}: the oracle exists for the demo world only; declare another judge"
                )
        return "oracle", {}

    def _set(self, declared: EvaluationSet) -> tuple[Node, Node]:
        """Token ids and texts of an evaluation set's prompts; of a prompt set both are one artifact."""
        if declared.data is not None:
            return self._tokens(declared.data), self._pairs(declared.data)
        prompts = plan_prompts(self.plan, declared.prompt_set, self.item.tokens, self.base, self.data_root)
        return prompts, prompts

    def _count(self, declared: EvaluationSet) -> int | None:
        """At most so many prompts of a set; None: all."""
        return declared.prompts or (_SET_PROMPTS if declared.prompt_set is None else None)

    @cached_property
    def _evaluation(self) -> tuple[dict[str, Any], dict[str, Node]]:
        """How every run of the item is evaluated, and on what."""
        evaluate = self.item.evaluate
        judge, parents = self._judge()
        for name, declared in evaluate.sets.items():
            tokens, pairs = self._set(declared)
            parents |= {f"set.{name}.tokens": tokens, f"set.{name}.pairs": pairs}
        spec = {
            "sets": {
                name: {"split": one.split, "prompts": self._count(one), "kl": one.kl}
                for name, one in evaluate.sets.items()
            },
            "sampling": evaluate.sampling.model_dump(),
            "draws": evaluate.draws,
            "at": evaluate.at,
            "judge": judge,
        }
        return spec, parents

    def _trial(self, point: GridPoint, seed: int, wiring: Wiring) -> Node:
        if point.arm.rounds is not None:
            return self._rounds_trial(point, point.arm.rounds.kind, seed, wiring)
        loss, params, regulariser, needs = resolve_arm(point.arm)
        spec, parents = self._evaluation
        trial = {
            "loss": {"name": loss, "params": params},
            "regulariser": regulariser,
            "train": point.train.model_dump(),
            "seed": seed,
            "evaluate": spec,
        }
        signals = wiring.signals(point.arm_name, point.arm, needs)
        return self.plan.add("trials", f"{loss}-s{seed}", trial, signals | parents)

    def _answers(self, name: str, seed: int, at: list[float], models: dict[str, Node]) -> Node:
        """Answers of finished models after these fractions of their rounds."""
        spec, parents = self._evaluation
        trial = {"loss": None, "regulariser": None, "train": None, "seed": seed, "evaluate": spec | {"at": at}}
        return self.plan.add("trials", f"{name}-s{seed}", trial, models | parents)

    def _reference_trial(self, seed: int) -> Node:
        return self._answers("reference", seed, [1.0], {"model": self.model})

    def _rounds_trial(self, point: GridPoint, kind: str, seed: int, wiring: Wiring) -> Node:
        """Answers of the reference and after every round; after the last alone where no curve is asked for."""
        rounds = plan_rounds(wiring, point.arm_name, point.arm, point.train, seed)
        at = [number / len(rounds) for number in range(len(rounds) + 1)]
        made = {f"round{number}": node for number, node in enumerate(rounds, start=1)}
        if len(self.item.evaluate.at) == 1:
            at, made = [1.0], {f"round{len(rounds)}": rounds[-1]}
        return self._answers(kind, seed, at, {"model": self.model} | made)

    def _runs(self, points: list[GridPoint]) -> dict[str, Node]:
        """The reference's answers, and a trial for every point and seed."""
        parents = {f"reference.{seed}": self._reference_trial(seed) for seed in self.item.seeds}
        wirings = {name: self._condition(one) for name, one in self.item.conditions.items()}
        for number, point in enumerate(points):
            for seed in self.item.seeds:
                parents[f"run.{number}.{seed}"] = self._trial(point, seed, wirings[point.condition])
        return parents

    def _weights(self) -> dict[str, Node]:
        """Dispersion weights of every condition, and the pairs for their prompts."""
        parents = {}
        for name, declared in self.item.conditions.items():
            wiring = self._condition(declared)
            parents[f"dispersion.{name}"] = wiring.dispersion("dispersion", self.item.dispersion)
            parents[f"pairs.{name}"] = wiring.pairs
        return parents

    def _arm(self, item: GridItemSpec, name: str, arm: GridArmSpec) -> dict[str, Any]:
        """What the item says of an arm; ``member_bias`` where its loss matches members of different length bias."""
        loss, _, _, _ = resolve_arm(arm)
        rewards = None
        if get_loss(loss).member is not None:
            wiring = self._condition(next(iter(item.conditions.values())))
            rewards = item.rewards[wiring.ensembles.named_by(name, arm)]
        return {
            "loss": arm.loss.model_dump(),
            "label": arm.label or name,
            "against": arm.against or item.evaluate.against,
            "control": arm.control,
            "member_bias": rewards.longer_wins if rewards else None,
        }

    def _grid(self, item: GridItemSpec, points: list[GridPoint], judge: str | None) -> dict[str, Any]:
        """The grid as the item's spec states it."""
        grid: dict[str, Any] = {
            "tier": "full" if item is self.whole else "quick",
            "layout": item.layout,
            "conditions": {
                name: {"value": one.value, "label": one.label or name} for name, one in item.conditions.items()
            },
        }
        if item.layout == "histogram":
            return grid
        evaluate = item.evaluate
        return grid | {
            "arms": {name: self._arm(item, name, arm) for name, arm in item.arms.items()},
            "sets": list(evaluate.sets),
            "seeds": item.seeds,
            "draws": evaluate.draws,
            "at": evaluate.at,
            "judge": judge,
            "select": evaluate.select.model_dump() if evaluate.select else None,
            "points": [{"condition": p.condition, "arm": p.arm_name, "settings": p.settings} for p in points],
        }

    def item_node(self) -> Node:
        """The item over its runs, or over its dispersion weights. Claims are checked against the whole grid."""
        item = self.item
        head = {"item": item.item.model_dump()}
        expect = [row.model_dump() for row in item.expect]
        if item.layout == "histogram":
            points, judge, parents = [], None, self._weights()
        else:
            points, judge = grid_points(item), self._judge()[0]
            parents = self._runs(points)
            parents |= {f"set.{name}.pairs": self._set(one)[1] for name, one in item.evaluate.sets.items()}
        whole = points if item is self.whole or not points else grid_points(self.whole)
        check_claims(head | {"grid": self._grid(self.whole, whole, judge), "expect": expect})
        spec = head | {"grid": self._grid(item, points, judge), "expect": expect}
        return self.plan.add(f"papers/{item.item.paper}", item.item.name, spec, parents)
