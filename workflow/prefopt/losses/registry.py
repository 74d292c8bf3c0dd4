"""The table of pair losses and regularisers: what each one is called, computes and needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

NEEDS = frozenset({"reference", "dispersion", "rewards", "tokens", "reference_samples"})

# Parameters with a domain narrower than the finite numbers: lowest value, whether it is itself allowed, supremum.
_DOMAINS: dict[str, tuple[float, bool, float]] = {
    "beta": (0.0, False, math.inf),
    "smoothing": (0.0, False, math.inf),
    "label_smoothing": (0.0, True, 0.5),
    "target_smoothing": (0.0, False, 0.5),
    "reference_kl": (0.0, True, math.inf),
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
    low, closed, high = _DOMAINS.get(name, (-math.inf, False, math.inf))
    if value < low or (value == low and not closed) or value >= high:
        bounds = f"{'at least' if closed else 'above'} {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        raise BadInput(f"{place} is {value}; expected a number {bounds}")


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
