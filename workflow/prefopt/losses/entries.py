"""What is registered under a name: pair losses, combinations of steps, regularisers, published compositions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.errors import BadInput, nearest
from prefopt.losses.parameters import check_value, signature_of
from prefopt.losses.steps import DEFAULTS, KINDS, STEPS, Combination, combination

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Entry:
    """A registered function with the signals it reads and where it comes from."""

    name: str
    fn: Callable[..., Tensor]
    needs: frozenset[str]
    paper: str
    equation: str


@dataclass(frozen=True)
class Loss(_Entry):
    """A pair loss: ``fn(batch, *, beta, ...) -> Tensor [B]``, per pair and unreduced.

    ``couples_pairs`` marks the losses whose value for one pair depends on the other pairs of the batch, so that
    splitting a batch changes them. ``member(batch, **params) -> LongTensor [B]`` is there for the losses that match
    one ensemble member per pair and says which, 0..K-1.
    """

    couples_pairs: bool = False
    member: Callable[..., Tensor] | None = None
    combination: Combination | None = None  # of the six steps, where the loss is declared as one

    def form(self, params: Mapping[str, Any]) -> Loss:
        """The loss that the parameters select: itself, unless they name steps."""
        return self

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only parameters of ``fn`` by name."""
        parameters = inspect.signature(self.fn).parameters.values()
        return {item.name: item for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY}

    def check_params(self, params: Mapping[str, Any]) -> None:
        """Raise BadInput unless ``fn(batch, **params)`` is a valid call: names, numbers, finite, in their domain."""
        known = self.parameters()
        for name, value in params.items():
            if name not in known:
                raise BadInput(f"loss '{self.name}': unknown parameter '{name}'; {nearest(name, known)}")
            check_value(f"loss '{self.name}': parameter '{name}'", name, value, optional=known[name].default is None)
        missing = [name for name, item in known.items() if item.default is item.empty and name not in params]
        if missing:
            raise BadInput(f"loss '{self.name}': missing parameter '{missing[0]}'; give it a number beside 'name'")


@dataclass(frozen=True)
class FreeCombination(Loss):
    """The loss whose parameters also name its steps."""

    def form(self, params: Mapping[str, Any]) -> Loss:
        """The combination that the parameters name. Raises BadInput for steps that do not exist or go together."""
        steps = {kind: params[kind] for kind in KINDS if kind in params}
        made = combination(f"loss '{self.name}'", steps)
        signature = signature_of({**made.parameters(), **step_parameters(steps)})

        def fn(batch: Any, **settings: Any) -> Tensor:
            given = signature.bind(batch, **settings).kwargs
            return made(batch, **{name: value for name, value in given.items() if name not in KINDS})

        vars(fn)["__signature__"] = signature
        fn.__doc__ = self.fn.__doc__
        return _Formed(self.name, fn, made.needs, self.paper, self.equation, made.couples_pairs, combination=made)

    def check_params(self, params: Mapping[str, Any]) -> None:
        """As of any loss, for the combination that the parameters name."""
        self.form(params).check_params(params)


@dataclass(frozen=True)
class _Formed(Loss):
    """A combination made by name; its steps were checked when it was formed."""

    def check_params(self, params: Mapping[str, Any]) -> None:
        """As of any loss, the steps' names left out; a parameter of a step that is not chosen is named as such."""
        known = self.parameters()
        for name in params:
            owners = [one for steps in STEPS.values() for one in steps.values() if name in one.parameters]
            if name not in known and owners:
                where = " or ".join(f"{one.kind} '{one.name}'" for one in owners)
                raise BadInput(f"loss '{self.name}': parameter '{name}' belongs to {where}, which is not chosen")
        super().check_params({name: value for name, value in params.items() if name not in KINDS})


def step_parameters(steps: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """One keyword-only parameter per kind of step, its default the chosen step or else DPO's."""
    return {
        kind: inspect.Parameter(kind, inspect.Parameter.KEYWORD_ONLY, default=steps.get(kind, default))
        for kind, default in DEFAULTS.items()
    }


@dataclass(frozen=True)
class Regulariser(_Entry):
    """A penalty on sampled responses: ``fn(policy_logp [S], ref_logp [S]) -> Tensor [S]``."""


class Composition(NamedTuple):
    """A published method that is a pair loss plus regularisers with their default settings."""

    loss: str
    regulariser: Mapping[str, Mapping[str, list[float]]]
