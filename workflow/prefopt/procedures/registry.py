"""The table of procedures: what each one is called, declares and plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from prefopt.procedures.chain import Chain

if TYPE_CHECKING:
    from prefopt.artifacts import Node
    from prefopt.planning.wiring import Wiring
    from prefopt.specs import ArmSpec, Closed, TrainSpec

Plans = Callable[[Chain, Any], "list[Node]"]


@dataclass(frozen=True)
class Procedure:
    """``plan(chain, declared) -> list[Node]``: what answers prompts after every round, the last one at the end."""

    kind: str
    spec: type[Closed]
    plan: Plans
    paper: str
    equation: str

    @property
    def about(self) -> str:
        """The function's docstring, in one line."""
        return " ".join((self.plan.__doc__ or "").split())

    def parameters(self) -> dict[str, Any]:
        """Name -> default of what may be declared beside ``kind``; those without a default are ``...``."""
        fields = {name: one for name, one in self.spec.model_fields.items() if name != "kind"}
        return {name: ... if one.is_required() else one.default for name, one in fields.items()}


_procedures: dict[str, Procedure] = {}
PROCEDURES: Mapping[str, Procedure] = MappingProxyType(_procedures)


def procedure(spec: type[Closed], *, paper: str, equation: str) -> Callable[[Plans], Plans]:
    """Register the function that plans what ``spec`` declares, under the spec's ``kind``.

    Raises ValueError for a kind that is taken.
    """
    (kind,) = get_args(spec.model_fields["kind"].annotation)

    def register(plan: Plans) -> Plans:
        if kind in _procedures:
            raise ValueError(f"cannot register '{kind}': name taken")
        _procedures[kind] = Procedure(kind, spec, plan, paper, equation)
        return plan

    return register


def plan_rounds(wiring: Wiring, arm_name: str, arm: ArmSpec, train: TrainSpec, seed: int) -> list[Node]:
    """What answers prompts after each of an arm's rounds.

    Raises BadInput for what its procedure cannot do, ValueError for an arm without rounds.
    """
    if arm.rounds is None:
        raise ValueError(f"arms.{arm_name} declares no rounds")
    chain = Chain.of(wiring, arm_name, arm, train, seed)
    return PROCEDURES[arm.rounds.kind].plan(chain, arm.rounds)
