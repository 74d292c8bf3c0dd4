"""Declarations of items about several annotators: does dispersion follow them, and are they the better weight."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from prefopt.specs.base import Closed, Count, Name, Positive, Seed, unique_seeds
from prefopt.specs.data import NamedData
from prefopt.specs.exact import OrderClaim
from prefopt.specs.items import ItemHead
from prefopt.specs.models import NamedModel, TokensSpec
from prefopt.specs.training import ArmSpec, EnsembleSpec, SamplingSpec, SftSpec, TrainSpec


class AnnotatedSpec(Closed):
    """A data set with several votes per pair, and how the figure calls it."""

    data: NamedData = Field(description="with a source of kind votes")
    label: str | None = None


class DisagreementItemSpec(Closed):
    """Estimates of dispersion beside the annotators' disagreement, on the test prompts of every data set.

    Each data set has a reference of its own, fine-tuned on its train split, and a reward ensemble trained there.
    """

    item: ItemHead
    annotated: dict[Name, AnnotatedSpec] = Field(min_length=1)
    model: NamedModel
    tokens: TokensSpec
    sft: SftSpec | None = Field(None, description="null: the model itself is the reference")
    rewards: EnsembleSpec | None = Field(None, description="for the votes and the variance of reward models")
    samples: SamplingSpec | None = Field(None, description="for the Monte-Carlo sequence entropy")
    samples_per_prompt: Count = 4
    resamples: Count = Field(2000, description="of the bootstrap over prompts")
    expect: list[OrderClaim] = Field([])


VoteMetric = Literal["log_loss", "scaled_log_loss", "calibration_error", "accuracy"]


class VoteClaim(Closed):
    """``arm`` fits held-out votes better than ``than`` in a metric."""

    claim: str
    metric: VoteMetric = "log_loss"
    pairs: Literal["seen", "new"] = Field("seen", description="held-out votes on the trained pairs, or on new prompts")
    arm: Name
    than: Name
    source: str = Field(description="where the claim stands")


class VoteWeightItemSpec(Closed):
    """Policies trained with weights or labels from votes, evaluated by sigma(beta x margin) on held-out votes."""

    item: ItemHead
    data: NamedData = Field(description="with a source of kind votes, and shares for validation and test")
    model: NamedModel
    tokens: TokensSpec
    sft: SftSpec | None = None
    policy: TrainSpec
    arms: dict[Name, ArmSpec] = Field(min_length=2)
    betas: list[Positive] = Field(
        min_length=1, description="every arm is trained with each; the one with the lowest validation log-loss stands"
    )
    seeds: list[Seed] = Field([0], min_length=1)
    held_out_votes: VoteMetric = Field("log_loss", description="the metric that the figure shows first")
    expect: list[VoteClaim] = Field([])

    @field_validator("seeds")
    @classmethod
    def _unique(cls, seeds: list[int]) -> list[int]:
        return unique_seeds(seeds)

    @model_validator(mode="after")
    def _whole(self) -> VoteWeightItemSpec:
        for name, arm in self.arms.items():
            if "beta" in arm.loss.params:
                raise ValueError(f"arms.{name}: 'beta' is tried over 'betas', for all arms alike; remove it here")
        return self
