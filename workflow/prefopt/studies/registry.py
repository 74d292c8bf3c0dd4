"""The table of exact studies: what each one is called, computes and may be told."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, create_model

from prefopt.errors import BadInput, FailedCheck, nearest
from prefopt.planning.config import parse

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass(frozen=True)
class StudyResult:
    """What a study returns: numbers by name, tables, and figures (the first one is the item's own)."""

    values: Mapping[str, float]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure | str] = field(default_factory=dict)

    def check(self, study: str) -> None:
        """Raise FailedCheck unless every value is a finite number and there is a figure with a usable name."""
        for name, value in self.values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise FailedCheck(f"study '{study}': the value '{name}' is {value!r}; expected a finite number")
        for name in (*self.tables, *self.figures):
            if not _NAME.fullmatch(name):
                raise FailedCheck(f"study '{study}': '{name}' is no file name of small letters, digits and _")
        if not self.figures:
            raise FailedCheck(f"study '{study}': it returned no figure; a paper item needs one")


@dataclass(frozen=True)
class Study:
    """A pure function of keyword-only parameters. ``version`` rises when the same parameters give other results."""

    name: str
    fn: Callable[..., StudyResult]
    about: str
    version: int

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of ``fn`` by name."""
        return inspect.signature(self.fn).parameters

    def check_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults filled in; BadInput for an unknown or missing name or a value of another type."""
        hints = typing.get_type_hints(self.fn, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], ... if item.default is item.empty else item.default)
            for name, item in self.parameters().items()
        }
        model = create_model(
            self.name, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields
        )
        return parse(model, dict(params), f"study '{self.name}'").model_dump()

    def run(self, params: Mapping[str, Any]) -> StudyResult:
        """The study's result, checked."""
        result = self.fn(**self.check_params(params))
        result.check(self.name)
        return result


_studies: dict[str, Study] = {}

STUDIES: Mapping[str, Study] = MappingProxyType(_studies)


def study(
    name: str, about: str, *, version: int = 1
) -> Callable[[Callable[..., StudyResult]], Callable[..., StudyResult]]:
    """Register ``fn(*, parameter: type = default, ...) -> StudyResult`` under a name.

    Types are those of a YAML file: int, float, bool, str, lists and dicts of them, or Annotated and Literal of them.

    Raises ValueError for a name that is taken or a parameter that is not keyword-only.
    """

    def register(fn: Callable[..., StudyResult]) -> Callable[..., StudyResult]:
        kinds = {item.kind for item in inspect.signature(fn).parameters.values()}
        if name in _studies or kinds - {inspect.Parameter.KEYWORD_ONLY}:
            why = "name taken" if name in _studies else "parameters must be keyword-only"
            raise ValueError(f"cannot register the study '{name}': {why}")
        _studies[name] = Study(name, fn, about, version)
        return fn

    return register


def get_study(name: str) -> Study:
    """The study of that name; raises BadInput with the nearest known name."""
    if name not in _studies:
        raise BadInput(f"unknown study '{name}'; {nearest(name, _studies)}")
    return _studies[name]
