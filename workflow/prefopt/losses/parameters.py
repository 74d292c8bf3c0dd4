"""Parameters of losses: the numbers that each one may be, and signatures made from parts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from prefopt.errors import BadInput


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


def check_value(place: str, name: str, value: Any, *, optional: bool) -> None:
    """Raise BadInput unless ``value`` is a finite number of the parameter's domain; None too where ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{place} is {value!r} ({type(value).__name__}); expected a number")
    if not math.isfinite(value):
        raise BadInput(f"{place} is {value}; expected a finite number")
    domain = _DOMAINS.get(name, _Domain())
    if not domain.holds(value):
        raise BadInput(f"{place} is {value}; expected a number {domain}")


def signature_of(keywords: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """``(batch, *, ...)`` with these keyword-only parameters."""
    batch = inspect.Parameter("batch", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([batch, *keywords.values()])
