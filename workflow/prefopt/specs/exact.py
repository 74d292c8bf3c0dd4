"""Declarations of exact paper items: a study with its parameters, and claims about its numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from prefopt.specs.base import Closed, Named
from prefopt.specs.items import ItemHead


class StudySpec(Named):
    """A study of ``STUDIES`` by name; every other key is a parameter, checked against the study's signature."""


class NumberClaim(Closed):
    """A number of the study and what was reported for it."""

    claim: str
    value: str = Field(description="name of the number in the study's values")
    reported: float
    tolerance: Annotated[float, Field(ge=0.0)] = Field(description="largest difference that counts as the same number")
    source: str = Field(description="where the number stands: table, figure or derivation")


class OrderClaim(Closed):
    """A number of the study that lies above another one, or above a given number."""

    claim: str
    value: str = Field(description="name of the number in the study's values")
    above: str | float = Field(description="a number, or the name of one in the study's values")
    interval: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None, description="names of the limits (low, high) of a value that was sampled; low must lie above"
    )
    source: str = Field(description="where the claim stands")


def _kind_of_claim(row: Any) -> str:
    ordered = "above" in row if isinstance(row, dict) else isinstance(row, OrderClaim)
    return "OrderClaim" if ordered else "NumberClaim"


ExactClaim = Annotated[
    Annotated[NumberClaim, Tag("NumberClaim")] | Annotated[OrderClaim, Tag("OrderClaim")],
    Discriminator(_kind_of_claim),
]


class ExactHead(ItemHead):
    """Which table, figure or theorem this is; computed exactly, so its numbers are compared."""

    scale: Literal["exact"] = "exact"


class ExactItemSpec(Closed):
    """A paper item without a language model: one study, its numbers beside the reported ones."""

    item: ExactHead
    study: StudySpec
    expect: list[ExactClaim] = Field([])
