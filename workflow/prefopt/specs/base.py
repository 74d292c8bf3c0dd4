"""What all declarations share: closed models and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Closed(BaseModel):
    """Base of every declaration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Named(BaseModel):
    """Something registered, by name; every other key is a parameter, checked against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, defer_build=True)
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
