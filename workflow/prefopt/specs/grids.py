"""Declarations of grid items: many small runs over conditions, arms, settings and seeds, each one job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prefopt.specs.base import Closed, Count, Fraction, Name, Seed, unique_seeds
from prefopt.specs.data import NamedData, PromptsSpec
from prefopt.specs.items import ItemHead
from prefopt.specs.models import NamedModel, TokensSpec
from prefopt.specs.training import ArmSpec, DispersionSpec, EnsembleSpec, SamplingSpec, SftSpec, TrainSpec

Layout = Literal["bars", "frontier", "gains", "by_condition", "histogram", "ranking"]
Metric = Literal[
    "reward",
    "win_rate",
    "tokens",
    "kl",
    "score_positive",
    "chosen_log_ratio",
    "rejected_log_ratio",
    "margin",
]
Point = Literal["selected", "all"] | dict[Name, float]


class ReferenceSpec(Closed):
    """The one model that every run starts from: its data (also the tokenizer's), and its fine-tuning."""

    data: NamedData
    sft: SftSpec | None = Field(None, description="null: the starting model itself is the reference")


class RelabelSpec(Closed):
    """Labels of a reward model instead of the data's own: it is trained on the judge split, which no learner sees.

    Of the train pairs, ``size`` are kept, the longer response (10 % or more) chosen in a share ``rho``: D_rho of
    arXiv 2405.19316. Pairs of other splits are labelled again and all kept.
    """

    oracle: EnsembleSpec
    rho: Fraction | None = Field(None, description="share of train pairs whose longer response is the chosen one")
    size: Count | None = Field(None, description="train pairs; default as many as rho allows")
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_oracle(self) -> RelabelSpec:
        if self.oracle.oracle or self.oracle.members != 1 or self.oracle.split != "judge":
            raise ValueError("the oracle is one reward model trained on 'split: judge', which no learner sees")
        if self.size is not None and self.rho is None:
            raise ValueError("size is about the share rho; give 'rho' with it")
        return self


class ConditionSpec(Closed):
    """A training data set of the grid."""

    data: NamedData
    relabel: RelabelSpec | None = None
    value: float | None = Field(None, description="place on the axis of a figure over conditions, such as rho")
    label: str | None = None


class EvaluationSet(Closed):
    """Prompts that every trained policy answers."""

    data: NamedData | None = Field(None, description="prompts of a split of preference pairs")
    prompt_set: PromptsSpec | None = Field(None, description="or prompts from elsewhere")
    split: Literal["train", "validation", "test"] = "test"
    prompts: Count | None = Field(None, description="at most so many; default 300 of data, all of a prompt_set")
    kl: bool = Field(True, description="score the answers with policy and reference: the sequence KL")

    @model_validator(mode="after")
    def _one_source(self) -> EvaluationSet:
        if (self.data is None) == (self.prompt_set is None):
            raise ValueError("give either data or prompt_set, and only one of them")
        if self.prompt_set is not None and self.split != "test":
            raise ValueError(f"a prompt_set has no splits; remove 'split: {self.split}'")
        return self


class RewardJudgeSpec(Closed):
    """Reward models trained on the judge split of a data set, which no learner sees."""

    data: NamedData
    rewards: EnsembleSpec


class ClassifierJudgeSpec(Closed):
    """A classifier of positive (chosen) against negative (rejected) responses, trained on data of its own."""

    classifier: NamedData


class SelectSpec(Closed):
    """How one of an arm's settings is chosen: the highest mean of a metric over the seeds on a set."""

    set: Name = "validation"
    metric: Literal["reward", "score_positive"] = "reward"


class GridEvaluateSpec(Closed):
    """What is measured of every policy, and when."""

    sets: dict[Name, EvaluationSet] = Field({})
    sampling: SamplingSpec = SamplingSpec()
    draws: Count = Field(1, description="answers per prompt, each with a sampling seed of its own")
    at: list[Fraction] = Field([1.0], min_length=1, description="fractions of the run after which prompts are answered")
    judge: Literal["oracle"] | RewardJudgeSpec | ClassifierJudgeSpec = "oracle"
    select: SelectSpec | None = None
    against: Name = Field("reference", description="whom an arm's win rate is against, where the arm says nothing")

    @field_validator("judge", mode="before")
    @classmethod
    def _scores_alone(cls, judge: Any) -> Any:
        if (isinstance(judge, str) and judge != "oracle") or (isinstance(judge, dict) and "kind" in judge):
            raise ValueError(
                "a grid scores every answer alone, by the oracle, reward models or a classifier; a judge that sees two "
                "answers belongs into an item without conditions"
            )
        return judge

    @field_validator("at")
    @classmethod
    def _ends_with_one(cls, at: list[float]) -> list[float]:
        if sorted(set(at)) != at or at[-1] != 1.0:
            raise ValueError(f"{at}: fractions rise and end with 1.0")
        return at


class GridArmSpec(ArmSpec):
    """One method of a grid: a loss with its signals, and the settings that are tried."""

    vary: dict[Name, Annotated[list[float], Field(min_length=1)]] = Field(
        {}, description="loss parameters, or fields of the training section such as learning_rate, with their values"
    )
    conditions: list[Name] | None = Field(None, description="only these; default all")
    against: Name | None = Field(None, description="arm of the same settings that the win rate is against")
    control: bool = Field(False, description="breaks something on purpose, or bounds what is possible")
    label: str | None = None


class _Claim(Closed):
    claim: str
    source: str = Field(description="where the claim stands: table or figure of the paper")
    reported: str = Field("", description="the paper's own figure, shown as published, never compared at demo scale")


class CompareClaim(_Claim):
    """``arm`` against ``than`` in one metric, paired by seed and prompt; win_rate is head to head, minus 50."""

    kind: Literal["compare"]
    metric: Metric
    arm: Name
    than: Name | float
    set: Name = "test"
    conditions: list[Name] | None = Field(None, description="averaged; default: all that both sides have")
    arm_at: Point = "selected"
    than_at: Point = "selected"
    sign: Literal["above", "below", "equal"] = "above"
    margin: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="for sign equal: the interval has to lie within plus and minus this"
    )

    @model_validator(mode="after")
    def _margin_of_equal(self) -> CompareClaim:
        if (self.sign == "equal") != (self.margin is not None):
            raise ValueError("sign 'equal' needs a margin, and no other sign takes one")
        return self


class FrontierClaim(_Claim):
    """``arm`` above ``than`` at equal sequence KL, along the training curves."""

    kind: Literal["frontier"]
    metric: Literal["reward", "score_positive"]
    arm: Name
    than: Name
    set: Name = "test"
    conditions: list[Name] | None = None
    arm_at: Point = "selected"
    than_at: Point = "selected"
    part: Literal["low", "high", "all"] = "all"


class TrendClaim(_Claim):
    """A quantity that rises or falls with the conditions' value."""

    kind: Literal["trend"]
    quantity: str = Field(pattern=r"^(selected\.[a-z0-9_]+|member_bias|gap)$")
    arm: Name
    than: Name | None = Field(None, description="for gap: reward of arm minus reward of than")
    set: Name = "test"
    sign: Literal["falls", "rises"]


class WeightsClaim(_Claim):
    """A property of the dispersion weights c(x) of a condition."""

    kind: Literal["weights"]
    quantity: Literal["sd", "skewness", "closed_minus_open", "auroc_closed"]
    condition: Name
    than: Name | float = Field(description="another condition, or a number")
    sign: Literal["above", "below"] = "above"


GridClaim = Annotated[CompareClaim | FrontierClaim | TrendClaim | WeightsClaim, Field(discriminator="kind")]


class QuickSpec(Closed):
    """The part of a grid that runs unless the full one is asked for: subsets, never other values."""

    conditions: list[Name] | None = None
    arms: list[Name] | None = None
    seeds: list[Seed] | None = None
    only: dict[Name, list[float]] = Field({}, description="of every arm that varies the setting, these values")


class GridItemSpec(Closed):
    """One paper item over a grid: one file, one target, one verdict."""

    item: ItemHead
    layout: Layout
    model: NamedModel
    tokens: TokensSpec
    reference: ReferenceSpec
    conditions: dict[Name, ConditionSpec] = Field(min_length=1)
    rewards: dict[Name, EnsembleSpec] = Field({})
    references: dict[Name, SftSpec] = Field({}, description="further reference models, fine-tuned from the same base")
    samples: SamplingSpec | None = Field(None, description="reference samples; needed by forward_kl")
    dispersion: DispersionSpec = Field(DispersionSpec(), description="of the layout histogram")
    policy: TrainSpec | None = None
    arms: dict[Name, GridArmSpec] = Field({})
    seeds: list[Seed] = Field([0], min_length=1)
    evaluate: GridEvaluateSpec = GridEvaluateSpec()
    quick: QuickSpec = QuickSpec()
    expect: list[GridClaim] = Field([])

    @field_validator("seeds")
    @classmethod
    def _unique(cls, seeds: list[int]) -> list[int]:
        return unique_seeds(seeds)

    @model_validator(mode="after")
    def _whole(self) -> GridItemSpec:
        if self.layout == "histogram":
            if self.arms:
                raise ValueError("the layout 'histogram' shows dispersion weights and takes no arms")
            return self
        if not self.arms or self.policy is None or not self.evaluate.sets:
            raise ValueError(f"the layout '{self.layout}' needs arms, policy and evaluate.sets")
        return self
