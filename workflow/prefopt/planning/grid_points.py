"""The points of a grid: conditions, arms and settings, the part that runs quickly, and what names have to exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from pydantic import ValidationError

from prefopt.errors import BadInput, nearest
from prefopt.losses import COMPOSITIONS, get_loss
from prefopt.planning.wiring import resolve_arm
from prefopt.specs import GridArmSpec, GridItemSpec, LossSpec, RoundsSpec, TrainSpec

Settings = dict[str, float]


class GridPoint(NamedTuple):
    """One combination of condition, arm and settings; ``arm`` holds the settings, ``train`` how it is trained."""

    condition: str
    arm_name: str
    settings: Settings
    arm: GridArmSpec
    train: TrainSpec


def grid_points(item: GridItemSpec) -> list[GridPoint]:
    """Every point of the grid: conditions, in them arms, in them settings."""
    return [
        GridPoint(condition, name, settings, point, train)
        for condition in item.conditions
        for name, arm in item.arms.items()
        if arm.conditions is None or condition in arm.conditions
        for settings, point, train in points_of(name, arm, item.policy)
    ]


def points_of(
    name: str, arm: GridArmSpec, policy: TrainSpec | None
) -> Iterator[tuple[Settings, GridArmSpec, TrainSpec]]:
    """Every combination of an arm's settings, with the arm and the training that it stands for.

    The settings name all of the loss's parameters and the learning rate, so that points of several arms can be matched.
    Raises BadInput where a varied name is neither a parameter of the loss nor a field of ``train`` or ``rounds``, and
    where neither the arm nor ``policy`` says how to train.
    """
    train = arm.train or policy
    if train is None:
        raise BadInput(f"arms.{name}: nothing says how it is trained; declare 'policy', or 'train' of the arm")
    loss = COMPOSITIONS[arm.loss.name].loss if arm.loss.name in COMPOSITIONS else arm.loss.name
    parameters = get_loss(loss).form(arm.loss.params).parameters()
    of_training = TrainSpec.model_fields.keys() - parameters
    of_rounds = type(arm.rounds).model_fields if arm.rounds else {}
    for key in arm.vary:
        if key not in parameters and key not in of_training and key not in of_rounds:
            known = [*parameters, *TrainSpec.model_fields, *of_rounds]
            raise BadInput(f"arms.{name}.vary: no setting '{key}'; {nearest(key, known)}")
    for values in product(*arm.vary.values()):
        chosen = dict(zip(arm.vary, values, strict=True))
        params = arm.loss.params | {key: value for key, value in chosen.items() if key in parameters}
        training = {key: value for key, value in chosen.items() if key in of_training}
        rounds = {key: value for key, value in chosen.items() if key not in params | training}
        changed = TrainSpec.model_validate(train.model_dump() | training) if training else train
        point = arm.model_copy(update={"loss": LossSpec(name=arm.loss.name, **params), "train": changed})
        if arm.rounds is not None and rounds:
            point = point.model_copy(update={"rounds": _varied_rounds(name, arm.rounds, rounds)})
        numbers = {key: value for key, value in params.items() if not isinstance(value, str | list)}
        yield numbers | {"learning_rate": changed.learning_rate} | training | rounds, point, changed


def _varied_rounds(name: str, rounds: RoundsSpec, settings: Settings) -> RoundsSpec:
    whole = {key: int(value) if value == int(value) else value for key, value in settings.items()}
    try:
        return type(rounds).model_validate(rounds.model_dump() | whole)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"arms.{name}.vary: {first['loc'][0]} {first['input']!r}: {first['msg']}") from None


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


def check_names(item: GridItemSpec) -> None:
    """Raise BadInput where an arm names a condition, an opponent or a loss that is not there, or a set is missing."""
    opponents = [*item.arms, "reference"]
    for name, arm in item.arms.items():
        against = arm.against or item.evaluate.against
        if against not in opponents:
            raise BadInput(f"arms.{name}.against: no arm '{against}'; {nearest(against, opponents)}")
        _chosen(f"arms.{name}.conditions", arm.conditions, item.conditions)
        try:
            for _, point, _ in points_of(name, arm, item.policy):
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
