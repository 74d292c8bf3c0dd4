"""Declarations of language-model paper items: evaluation, claims, the item itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from prefopt.specs.base import Closed, Count, Name, Seed, unique_seeds
from prefopt.specs.data import FileRef, NamedData, PromptsSpec
from prefopt.specs.judges import LmJudgeSpec, ServerJudgeSpec
from prefopt.specs.models import NamedModel, TokensSpec
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


class LengthControlSpec(Closed):
    """Length-controlled win rates beside the plain ones; what is not given leaves a simpler fit.

    Difficulties belong to numbered prompts, as AlpacaEval's are: the number is the row in the prompt set.
    """

    difficulty: FileRef | None = Field(None, description="table with index and instruction_difficulty")
    gamed: FileRef | None = Field(None, description="the baseline's verbose and concise selves; needs difficulty")

    @model_validator(mode="after")
    def _gamed_with_difficulty(self) -> LengthControlSpec:
        if self.gamed is not None and self.difficulty is None:
            raise ValueError("gamed rows are about difficulties too; give 'difficulty' with them")
        return self


class EvaluateSpec(Closed):
    """Generate for held-out prompts, judge in both orders against a baseline, summarise."""

    prompts: Count | None = Field(None, description="at most so many; default 200 of the item's test split, or all")
    prompt_set: PromptsSpec | None = Field(None, description="prompts from elsewhere; default the item's test split")
    sampling: SamplingSpec = SamplingSpec()
    draws: Count = Field(1, description="answers per prompt and policy, each with a sampling seed of its own")
    judge: Judge = Field(
        "oracle",
        description="oracle (the world's), the name of a judge in judges.yaml, a held-out reward model, or a language "
        "model that sees both answers",
    )
    against: Name = Field("reference", description="reference, the name of an arm, or outputs: answers in a file")
    outputs: FileRef | None = Field(None, description="model outputs to judge against; default those of prompt_set")
    length_control: LengthControlSpec | None = None

    @model_validator(mode="after")
    def _outputs_are_there(self) -> EvaluateSpec:
        if self.against == "outputs" and self.outputs is None and self.prompt_set is None:
            raise ValueError("against: outputs needs answers; give 'outputs', or a prompt_set whose rows have them")
        if self.against != "outputs" and self.outputs is not None:
            raise ValueError(f"outputs are judged against only with 'against: outputs', found '{self.against}'")
        numbered = self.length_control is not None and self.length_control.difficulty is not None
        if numbered and self.prompt_set is None:
            raise ValueError("length_control.difficulty is about numbered prompts; give their prompt_set")
        return self


class ExpectSpec(Closed):
    """A claim to check: ``arm``'s metric is above ``than``'s (an arm, or a number)."""

    claim: str
    arm: Name
    metric: Literal["win_rate", "length_controlled_win_rate", "reward_advantage"]
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
    data: NamedData
    model: NamedModel
    tokens: TokensSpec
    sft: SftSpec | None = Field(None, description="null: the model itself is the reference")
    rewards: dict[Name, EnsembleSpec] = Field({})
    references: dict[Name, SftSpec] = Field({}, description="further reference models, fine-tuned from the same base")
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
