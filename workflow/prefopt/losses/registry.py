"""The table of pair losses and regularisers, and how a function or a combination of steps gets into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput, nearest
from prefopt.losses.entries import Composition, FreeCombination, Loss, Regulariser, step_parameters
from prefopt.losses.parameters import signature_of
from prefopt.losses.steps import NEEDS, combination

if TYPE_CHECKING:
    from torch import Tensor

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
    signature = signature_of(outer)

    def fn(batch: Any, **settings: Any) -> Tensor:
        bound = signature.bind(batch, **settings)
        bound.apply_defaults()
        return made(batch, **fixed, **{inner: bound.kwargs[item.name] for inner, item in outer.items()})

    fn.__name__, fn.__doc__ = name, about
    vars(fn)["__signature__"] = signature
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
    vars(fn)["__signature__"] = signature_of({**plain.parameters(), **step_parameters({})})
    entry = FreeCombination(name, fn, plain.needs, paper, equation, combination=plain)
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


def _checked(name: str, needs: frozenset[str], table: Mapping[str, Any]) -> None:
    unknown = needs - NEEDS
    if unknown or name in table:
        raise ValueError(f"cannot register '{name}': {f'unknown needs {sorted(unknown)}' if unknown else 'name taken'}")


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
