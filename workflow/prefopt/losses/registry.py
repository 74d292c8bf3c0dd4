"""The table of pair losses and regularisers: what each one is called, computes and needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.errors import BadInput, nearest
from prefopt.losses.steps import DEFAULTS, KINDS, NEEDS, STEPS, Combination, combination

if TYPE_CHECKING:
    from torch import Tensor


class _Domain(NamedTuple):
    """Numbers from ``low`` to ``high``, each of them allowed itself where ``closed`` says so."""

    low: float = -math.inf
    high: float = math.inf
    closed: tuple[bool, bool] = (False, False)

    def holds(self, value: float) -> bool:
        """Whether the number is one of them."""
        above = value > self.low or (self.closed[0] and value == self.low)
        return above and (value < self.high or (self.closed[1] and value == self.high))

    def __str__(self) -> str:
        low = f"{'at least' if self.closed[0] else 'above'} {self.low:g}"
        return low + (f" and {'at most' if self.closed[1] else 'below'} {self.high:g}" if self.high < math.inf else "")


_POSITIVE, _NOT_NEGATIVE = _Domain(0.0), _Domain(0.0, closed=(True, False))
_SHARE = _Domain(0.0, 1.0, (True, True))
# Parameters with a domain narrower than the finite numbers.
_DOMAINS: dict[str, _Domain] = {
    "beta": _POSITIVE,
    "smoothing": _POSITIVE,
    "label_smoothing": _Domain(0.0, 0.5, (True, False)),
    "target_smoothing": _Domain(0.0, 0.5),
    "reference_kl": _NOT_NEGATIVE,
    "tail_weight": _NOT_NEGATIVE,
    "decay": _Domain(0.0, 1.0, (False, True)),
    "diff_cap": _NOT_NEGATIVE,
    "second_weight": _SHARE,
    "clip": _Domain(0.0, 1.0, (True, False)),
    "gamma": _NOT_NEGATIVE,
    "focus": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "penalty": _NOT_NEGATIVE,
    "advantage_weight": _NOT_NEGATIVE,
    "advantage_temperature": _POSITIVE,
    "expectile": _Domain(0.0, 1.0),
    "risk_temperature": _POSITIVE,
    "reject_below": _NOT_NEGATIVE,
    "filter_share": _Domain(0.0, 1.0, (True, False)),
    "likelihood_power": _NOT_NEGATIVE,
}


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
            _check_value(f"loss '{self.name}': parameter '{name}'", name, value, optional=known[name].default is None)
        missing = [name for name, item in known.items() if item.default is item.empty and name not in params]
        if missing:
            raise BadInput(f"loss '{self.name}': missing parameter '{missing[0]}'; give it a number beside 'name'")


@dataclass(frozen=True)
class _Free(Loss):
    """The loss whose parameters also name its steps."""

    def form(self, params: Mapping[str, Any]) -> Loss:
        """The combination that the parameters name. Raises BadInput for steps that do not exist or go together."""
        steps = {kind: params[kind] for kind in KINDS if kind in params}
        made = combination(f"loss '{self.name}'", steps)
        signature = _signature({**made.parameters(), **_step_parameters(steps)})

        def fn(batch: Any, **settings: Any) -> Tensor:
            given = signature.bind(batch, **settings).kwargs
            return made(batch, **{name: value for name, value in given.items() if name not in KINDS})

        fn.__signature__ = signature
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


def _step_parameters(steps: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    return {
        kind: inspect.Parameter(kind, inspect.Parameter.KEYWORD_ONLY, default=steps.get(kind, default))
        for kind, default in DEFAULTS.items()
    }


def _signature(keywords: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    batch = inspect.Parameter("batch", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([batch, *keywords.values()])


@dataclass(frozen=True)
class Regulariser(_Entry):
    """A penalty on sampled responses: ``fn(policy_logp [S], ref_logp [S]) -> Tensor [S]``."""


class Composition(NamedTuple):
    """A published method that is a pair loss plus regularisers with their default settings."""

    loss: str
    regulariser: Mapping[str, Mapping[str, list[float]]]


def _check_value(place: str, name: str, value: Any, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{place} is {value!r} ({type(value).__name__}); expected a number")
    if not math.isfinite(value):
        raise BadInput(f"{place} is {value}; expected a finite number")
    domain = _DOMAINS.get(name, _Domain())
    if not domain.holds(value):
        raise BadInput(f"{place} is {value}; expected a number {domain}")


_losses: dict[str, Loss] = {}
_regularisers: dict[str, Regulariser] = {}

LOSSES: Mapping[str, Loss] = MappingProxyType(_losses)
REGULARISERS: Mapping[str, Regulariser] = MappingProxyType(_regularisers)

_FORWARD_KL = {"forward_kl": {"gamma": [1e-4, 1e-2]}}
COMPOSITIONS: Mapping[str, Composition] = MappingProxyType(
    {
        "p_dpo": Composition("dpo", _FORWARD_KL),
        "d_dpo": Composition("distill", {}),
        "dp_dpo": Composition("distill", _FORWARD_KL),
        "e_dpo": Composition("distill_ensemble", _FORWARD_KL),
        "spo_kl": Composition("spo", {"reverse_kl": {"gamma": [1e-2, 1e-2]}}),
    }
)


def _checked(name: str, needs: frozenset[str], table: Mapping[str, Any]) -> None:
    unknown = needs - NEEDS
    if unknown or name in table:
        raise ValueError(f"cannot register '{name}': {f'unknown needs {sorted(unknown)}' if unknown else 'name taken'}")


def loss(
    name: str,
    *,
    needs: set[str] | frozenset[str] = frozenset(),
    paper: str,
    equation: str,
    couples_pairs: bool = False,
    member: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register ``fn(batch, *, beta, ...) -> Tensor [B]`` under a name; ``paper`` is an arXiv id.

    ``member`` takes the same arguments and returns the ensemble member that each pair is matched to [B].

    Raises ValueError for a name that is taken or a need outside NEEDS.
    """

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _checked(name, frozenset(needs), _losses)
        _losses[name] = Loss(name, fn, frozenset(needs), paper, equation, couples_pairs, member)
        return fn

    return register


def method(
    name: str,
    about: str,
    *,
    paper: str,
    equation: str,
    defaults: Mapping[str, float] = MappingProxyType({}),
    renamed: Mapping[str, str] = MappingProxyType({}),
    fixed: Mapping[str, float] = MappingProxyType({}),
    **choices: Any,
) -> Loss:
    """Register the combination of steps that ``choices`` name as a loss; a step that is not named is DPO's.

    ``about`` becomes the docstring. ``defaults`` replaces the steps' own default parameters; ``renamed``: step's
    parameter -> the loss's; ``fixed``: steps' parameters that the loss does not have. Raises ValueError for a name
    that is taken, BadInput for steps that do not fit.
    """
    made = combination(f"method '{name}'", choices)
    outer = {}
    for inner, item in made.parameters().items():
        if inner in fixed:
            continue
        called = renamed.get(inner, inner)
        outer[inner] = item.replace(name=called, default=defaults.get(called, item.default))
    signature = _signature(outer)

    def fn(batch: Any, **settings: Any) -> Tensor:
        bound = signature.bind(batch, **settings)
        bound.apply_defaults()
        return made(batch, **fixed, **{inner: bound.kwargs[item.name] for inner, item in outer.items()})

    fn.__name__, fn.__doc__, fn.__signature__ = name, about, signature
    _checked(name, made.needs, _losses)
    _losses[name] = Loss(name, fn, made.needs, paper, equation, made.couples_pairs, combination=made)
    return _losses[name]


def free_combination(name: str, about: str, *, paper: str, equation: str) -> Loss:
    """Register the loss whose parameters name its steps; without any it is DPO."""
    _checked(name, frozenset(), _losses)

    def fn(batch: Any, **settings: Any) -> Tensor:
        return entry.form(settings).fn(batch, **settings)

    plain = combination(f"loss '{name}'", {})
    fn.__name__, fn.__doc__ = name, about
    fn.__signature__ = _signature({**plain.parameters(), **_step_parameters({})})
    entry = _Free(name, fn, plain.needs, paper, equation, combination=plain)
    _losses[name] = entry
    return entry


def regulariser(
    name: str, *, needs: set[str] | frozenset[str], paper: str, equation: str
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register ``fn(policy_logp [S], ref_logp [S]) -> Tensor [S]`` under a name.

    Raises ValueError for a name that is taken or a need outside NEEDS.
    """

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _checked(name, frozenset(needs), _regularisers)
        _regularisers[name] = Regulariser(name, fn, frozenset(needs), paper, equation)
        return fn

    return register


def get_loss(name: str) -> Loss:
    """The loss of that name; raises BadInput with the nearest known name."""
    if name in _losses:
        return _losses[name]
    if name in COMPOSITIONS:
        raise BadInput(f"'{name}' is a composition, not a loss; its loss is '{COMPOSITIONS[name].loss}'")
    raise BadInput(f"unknown loss '{name}'; {nearest(name, [*_losses, *COMPOSITIONS])}")


def get_regulariser(name: str) -> Regulariser:
    """The regulariser of that name; raises BadInput with the nearest known name."""
    if name in _regularisers:
        return _regularisers[name]
    raise BadInput(f"unknown regulariser '{name}'; {nearest(name, _regularisers)}")
