"""The nodes of a grid item: one trial per condition, arm, point and seed, over data and signals that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from prefopt.errors import BadInput, nearest
from prefopt.grids.check import check_claims
from prefopt.losses import COMPOSITIONS, get_loss
from prefopt.procedures import plan_rounds
from prefopt.sources import data_identity, model_identity
from prefopt.specs import (
    ClassifierJudgeSpec,
    ConditionSpec,
    DataSpec,
    EvaluationSet,
    GridArmSpec,
    GridItemSpec,
    LossSpec,
    RewardJudgeSpec,
    RoundsSpec,
    TrainSpec,
)
from prefopt.wiring import Wiring, check_lengths, plan_prompts, plan_sft, resolve_arm

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.plan import Plan

Settings = dict[str, float]

_SET_PROMPTS = 300


def quick_part(item: GridItemSpec) -> GridItemSpec:
    """The item with the conditions, arms and seeds of its ``quick`` section; BadInput for a name it does not have."""
    quick = item.quick
    seeds = _chosen("quick.seeds", quick.seeds, item.seeds)
    conditions = {
        name: item.conditions[name] for name in _chosen("quick.conditions", quick.conditions, item.conditions)
    }
    arms = {name: item.arms[name] for name in _chosen("quick.arms", quick.arms, item.arms)}
    for name, arm in arms.items():
        declared = arm.conditions or list(item.conditions)
        arms[name] = arm.model_copy(
            update={
                "vary": {key: _chosen_values(name, key, values, quick.only) for key, values in arm.vary.items()},
                "conditions": [c for c in declared if c in conditions],
            }
        )
    arms = {name: arm for name, arm in arms.items() if arm.conditions}
    return item.model_copy(update={"conditions": conditions, "arms": arms, "seeds": list(seeds)})


def _chosen(where: str, names: list[Any] | None, known: Iterable[Any]) -> list[Any]:
    known = list(known)
    for name in names or []:
        if name not in known:
            raise BadInput(f"{where}: the item has no '{name}'; {nearest(str(name), map(str, known))}")
    return [name for name in known if names is None or name in names]


def _chosen_values(arm: str, key: str, values: list[float], only: Mapping[str, list[float]]) -> list[float]:
    kept = [value for value in values if key not in only or value in only[key]]
    if not kept:
        raise BadInput(f"quick.only.{key}: none of {only[key]} is a value that arms.{arm} varies ({values})")
    return kept


def points_of(name: str, arm: GridArmSpec, policy: TrainSpec) -> Iterator[tuple[Settings, GridArmSpec]]:
    """Every combination of an arm's settings, with the arm that it stands for.

    The settings name all of the loss's parameters and the learning rate, so that points of several arms can be matched.
    Raises BadInput where a varied name is neither a parameter of the loss nor a field of ``train`` or ``rounds``.
    """
    train = arm.train or policy
    loss = COMPOSITIONS[arm.loss.name].loss if arm.loss.name in COMPOSITIONS else arm.loss.name
    parameters = get_loss(loss).form(arm.loss.params).parameters()
    of_rounds = type(arm.rounds).model_fields if arm.rounds else {}
    for key in arm.vary:
        if key not in parameters and key not in TrainSpec.model_fields and key not in of_rounds:
            known = [*parameters, *TrainSpec.model_fields, *of_rounds]
            raise BadInput(f"arms.{name}.vary: no setting '{key}'; {nearest(key, known)}")
    for values in product(*arm.vary.values()):
        chosen = dict(zip(arm.vary, values, strict=True))
        params = arm.loss.params | {key: value for key, value in chosen.items() if key in parameters}
        training = {key: value for key, value in chosen.items() if key in {*TrainSpec.model_fields} - {*parameters}}
        rounds = {key: value for key, value in chosen.items() if key not in params | training}
        changed = TrainSpec.model_validate(train.model_dump() | training) if training else train
        point = arm.model_copy(update={"loss": LossSpec(name=arm.loss.name, **params), "train": changed})
        if rounds:
            point = point.model_copy(update={"rounds": _varied_rounds(name, arm.rounds, rounds)})
        numbers = {key: value for key, value in params.items() if not isinstance(value, str | list)}
        yield numbers | {"learning_rate": changed.learning_rate} | training | rounds, point


def _varied_rounds(name: str, rounds: RoundsSpec, settings: Settings) -> RoundsSpec:
    whole = {key: int(value) if value == int(value) else value for key, value in settings.items()}
    try:
        return type(rounds).model_validate(rounds.model_dump() | whole)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"arms.{name}.vary: {first['loc'][0]} {first['input']!r}: {first['msg']}") from None


class GridPoint(NamedTuple):
    """One combination of condition, arm and settings; ``arm`` holds the settings."""

    condition: str
    arm_name: str
    settings: Settings
    arm: GridArmSpec


def grid_points(item: GridItemSpec) -> list[GridPoint]:
    """Every point of the grid: conditions, in them arms, in them settings."""
    return [
        GridPoint(condition, name, settings, point)
        for condition in item.conditions
        for name, arm in item.arms.items()
        if arm.conditions is None or condition in arm.conditions
        for settings, point in points_of(name, arm, item.policy)
    ]


class GridPlanner:
    """Builds the nodes of one grid item, from its data up."""

    def __init__(self, plan: Plan, item: GridItemSpec, data_root: Path) -> None:
        self.plan, self.data_root = plan, data_root
        _check_names(item)
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
        (oracle,) = wiring.members(relabel.oracle)
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
            members = self._wiring(judge.data).members(judge.rewards)
            return "reward_model", {f"judge{k}": member for k, member in enumerate(members)}
        for name, declared in self.item.evaluate.sets.items():
            if declared.data is None or declared.data.source.kind != "world":
                raise BadInput(
                    f"evaluate.sets.{name}: the oracle exists for the demo world only; declare another judge"
                )
        return "oracle", {}

    def _set(self, declared: EvaluationSet) -> tuple[Node, Node]:
        """Token ids and texts of an evaluation set's prompts; of a prompt set both are one artifact."""
        if declared.prompt_set is None:
            return self._tokens(declared.data), self._pairs(declared.data)
        prompts = plan_prompts(self.plan, declared.prompt_set, self.item.tokens, self.base, self.data_root)
        return prompts, prompts

    def _count(self, declared: EvaluationSet) -> int | None:
        """At most so many prompts of a set; None: all."""
        return declared.prompts or (_SET_PROMPTS if declared.prompt_set is None else None)

    def _evaluation(self) -> tuple[dict[str, Any], dict[str, Node]]:
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

    def _trial(self, arm_name: str, arm: GridArmSpec, seed: int, wiring: Wiring) -> Node:
        if arm.rounds is not None:
            return self._rounds_trial(arm_name, arm, seed, wiring)
        loss, params, regulariser, needs = resolve_arm(arm)
        spec, parents = self._evaluation()
        trial = {
            "loss": {"name": loss, "params": params},
            "regulariser": regulariser,
            "train": arm.train.model_dump(),
            "seed": seed,
            "evaluate": spec,
        }
        return self.plan.add("trials", f"{loss}-s{seed}", trial, wiring.signals(arm_name, arm, needs) | parents)

    def _answers(self, name: str, seed: int, at: list[float], models: dict[str, Node]) -> Node:
        """Answers of finished models after these fractions of their rounds."""
        spec, parents = self._evaluation()
        trial = {"loss": None, "regulariser": None, "train": None, "seed": seed, "evaluate": spec | {"at": at}}
        return self.plan.add("trials", f"{name}-s{seed}", trial, models | parents)

    def _reference_trial(self, seed: int) -> Node:
        return self._answers("reference", seed, [1.0], {"model": self.model})

    def _rounds_trial(self, arm_name: str, arm: GridArmSpec, seed: int, wiring: Wiring) -> Node:
        """Answers of the reference and after every round; after the last alone where no curve is asked for."""
        rounds = plan_rounds(wiring, arm_name, arm, arm.train, seed)
        at = [number / len(rounds) for number in range(len(rounds) + 1)]
        made = {f"round{number}": node for number, node in enumerate(rounds, start=1)}
        if len(self.item.evaluate.at) == 1:
            at, made = [1.0], {f"round{len(rounds)}": rounds[-1]}
        return self._answers(arm.rounds.kind, seed, at, {"model": self.model} | made)

    def _runs(self, points: list[GridPoint]) -> dict[str, Node]:
        """The reference's answers, and a trial for every point and seed."""
        parents = {f"reference.{seed}": self._reference_trial(seed) for seed in self.item.seeds}
        wirings = {name: self._condition(one) for name, one in self.item.conditions.items()}
        for number, point in enumerate(points):
            for seed in self.item.seeds:
                trial = self._trial(point.arm_name, point.arm, seed, wirings[point.condition])
                parents[f"run.{number}.{seed}"] = trial
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
            rewards = item.rewards[wiring.rewards_of(name, arm)]
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


def _check_names(item: GridItemSpec) -> None:
    """Raise BadInput where an arm names a condition, an opponent or a loss that is not there, or a set is missing."""
    opponents = [*item.arms, "reference"]
    for name, arm in item.arms.items():
        against = arm.against or item.evaluate.against
        if against not in opponents:
            raise BadInput(f"arms.{name}.against: no arm '{against}'; {nearest(against, opponents)}")
        _chosen(f"arms.{name}.conditions", arm.conditions, item.conditions)
        try:
            for _, point in points_of(name, arm, item.policy):
                resolve_arm(point)
        except BadInput as error:
            where = "" if str(error).startswith("arms.") else f"arms.{name}.loss: "
            raise BadInput(f"{where}{error}") from None
    select = item.evaluate.select
    if select is not None and select.set not in item.evaluate.sets:
        raise BadInput(f"evaluate.select: no set '{select.set}'; {nearest(select.set, item.evaluate.sets)}")
    if select is not None and (one := item.evaluate.sets[select.set]).data is not None and one.split == "test":
        raise BadInput(
            f"evaluate.select: the set '{select.set}' is of test prompts, and settings that are chosen on these look "
            "better than they are; select on a set with 'split: validation'"
        )
