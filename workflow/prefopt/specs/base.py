"""What all declarations share: closed models and the kinds of numbers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]

_READ_BY_SHELLS = frozenset("\"'`$\\;&|<>*?[]{}")


def plain_folder(path: str) -> str:
    """The path as given; ValueError where a shell or Snakemake would read more than a name in it.

    Executors write such values into job scripts and command lines, some of them without quotes that hold.
    """
    wrong = next((c for c in path if c in _READ_BY_SHELLS or not c.isprintable()), None)
    if wrong is not None:
        raise ValueError(f"a folder whose name has no {wrong!r} is expected, since jobs run through a shell")
    if not path:
        raise ValueError("the path of a folder is expected, found nothing; '.' is where the command runs")
    if path.startswith("-"):
        raise ValueError(f"'{path}' would be read as an option; write './{path}'")
    return path


def item_pattern(pattern: str) -> str:
    """The pattern as given; ValueError where it is none, or leads out of the folder of the declarations."""
    plain = re.fullmatch(r"[\w.*?\[\]!/-]+", pattern, re.ASCII) and not pattern.startswith(("/", "-"))
    if not plain or ".." in pattern.split("/"):
        raise ValueError(f"a name or pattern such as mallowspo/fig2 or mallowspo/* is expected, found {pattern!r}")
    return pattern


Folder = Annotated[str, AfterValidator(plain_folder)]
ItemPattern = Annotated[str, AfterValidator(item_pattern)]


class Closed(BaseModel):
    """Base of every declaration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class Named(BaseModel):
    """Something registered, by name; every other key is a parameter, checked against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that stand beside the name."""
        return dict(self.model_extra or {})


def unique_seeds(seeds: list[int]) -> list[int]:
    """The seeds as given; ValueError where one stands twice."""
    repeated = sorted({s for s in seeds if seeds.count(s) > 1})
    if repeated:
        raise ValueError(f"seed {repeated[0]} stands {seeds.count(repeated[0])} times; every seed once")
    return seeds
