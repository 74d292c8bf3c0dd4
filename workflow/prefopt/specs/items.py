"""Declarations of language-model paper items: evaluation, claims, the item itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from prefopt.specs.base import Closed, Count, Name, Seed, unique_seeds
from prefopt.specs.data import DataSpec
from prefopt.specs.judges import LmJudgeSpec, ServerJudgeSpec
from prefopt.specs.models import ModelSpec, TokensSpec
from prefopt.specs.training import ArmSpec, EnsembleSpec, SamplingSpec, SftSpec, TrainSpec


def _kind_of_judge(judge: Any) -> str:
    """The tag of a judge's declaration: a name, a pairwise judge by its kind, else reward models."""
    if isinstance(judge, str):
        return "name"
    kind = judge.get("kind") if isinstance(judge, dict) else getattr(judge, "kind", None)
    return kind if kind in ("lm", "server") else "EnsembleSpec"


Judge = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[EnsembleSpec, Tag("EnsembleSpec")]
    | Annotated[LmJudgeSpec, Tag("lm")]
    | Annotated[ServerJudgeSpec, Tag("server")],
    Discriminator(_kind_of_judge),
]


class EvaluateSpec(Closed):
    """Generate for held-out prompts, judge in both orders against a baseline, summarise."""

    prompts: Count = Field(200, description="at most so many test prompts")
    sampling: SamplingSpec = SamplingSpec()
    judge: Judge = Field(
        "oracle",
        description="oracle (the world's), the name of a judge in judges.yaml, a held-out reward model, or a language "
        "model that sees both answers",
    )
    against: Name = Field("reference", description="reference, or the name of an arm")


class ExpectSpec(Closed):
    """A claim to check: ``arm``'s metric is above ``than``'s (an arm, or a number)."""

    claim: str
    arm: Name
    metric: Literal["win_rate", "reward_advantage"]
    than: Name | float
    source: str = Field(description="where the claim stands: table or figure of the paper")
    reported: str = Field(
        "", description="the paper's own figure, shown beside ours as published, never compared at demo scale"
    )


class ItemHead(Closed):
    """Which table or figure this is."""

    paper: Name
    name: Name
    title: str
    arxiv: str | None = None
    scale: Literal["demo", "local", "paper"] = "demo"
    note: str = ""


class ItemSpec(Closed):
    """One paper item: one file, one target, one verdict."""

    item: ItemHead
    data: str | DataSpec
    model: str | ModelSpec
    tokens: TokensSpec
    sft: SftSpec | None = Field(None, description="null: the model itself is the reference")
    rewards: dict[Name, EnsembleSpec] = Field({})
    samples: SamplingSpec | None = Field(None, description="reference samples; needed by forward_kl")
    policy: TrainSpec
    arms: dict[Name, ArmSpec] = Field(min_length=1)
    seeds: list[Seed] = Field([0], min_length=1)
    evaluate: EvaluateSpec
    expect: list[ExpectSpec] = Field([])

    @field_validator("seeds")
    @classmethod
    def _unique(cls, seeds: list[int]) -> list[int]:
        return unique_seeds(seeds)
