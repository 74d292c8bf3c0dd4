"""The closed, typed declarations: what a paper item may say, and nothing else.

Unknown keys and wrong types are errors. These models generate ``workflow/schemas/*.json`` for editors. Nothing here
imports torch: the Snakefile parses through this module.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
ReaderName = Literal["auto", "hh", "trl", "ultrafeedback", "shp", "tldr", "imdb_prefix"]


class Closed(BaseModel):
    """Base of every declaration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# --- data -----------------------------------------------------------------------------------------------------------


class WorldSource(Closed):
    """Pairs of the embedded demo world; fields are those of ``prefopt.world.WorldParams``."""

    kind: Literal["world"]
    seed: Seed = 0
    prompts: Count = 1500
    pairs: Count = 2000
    domain: Literal["home", "away"] = "home"
    labels: Literal["mallows", "oracle"] = "mallows"
    candidates: Annotated[int, Field(ge=2, le=12)] = Field(6, description="responses that are ranked per prompt")
    closed_fraction: Fraction = Field(0.5, description="share of prompts with one right answer")
    phi_closed: Fraction = Field(0.2, description="dispersion of the raters on closed prompts")
    phi_open: Fraction = Field(0.8, description="dispersion of the raters on open prompts")
    rho: Fraction | None = Field(None, description="fraction of pairs whose longer response is the chosen one")


class FilesSource(Closed):
    """Pairs in local files: .jsonl(.gz), .csv, .parquet, or a folder saved by the datasets library."""

    kind: Literal["files"]
    reader: ReaderName = "auto"
    paths: list[str] = Field(min_length=1, description="relative to data_root of config.yaml, or absolute")
    sha256: list[str] | None = Field(
        None, description="pinned digests; without them the files are hashed when planning"
    )


class HubSource(Closed):
    """Pairs in a dataset repository on the Hugging Face hub, at a pinned revision."""

    kind: Literal["hub"]
    reader: ReaderName = "auto"
    repo: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$", description="full commit hash")
    split: str = "train"
    subset: str | None = None


class SplitSpec(Closed):
    """Shares of prompts: learners see train, a held-out reward judge sees judge, evaluation sees test."""

    train: Fraction = 0.8
    judge: Fraction = 0.0
    test: Fraction = 0.2

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitSpec:
        if abs(self.train + self.judge + self.test - 1.0) > 1e-9:
            raise ValueError(f"shares sum to {self.train + self.judge + self.test:g}, they must sum to 1")
        if self.train == 0 or self.test == 0:
            raise ValueError("train and test must both have a share")
        return self


class DataSpec(Closed):
    """A set of preference pairs: where it comes from and how its prompts are split."""

    source: Annotated[WorldSource | FilesSource | HubSource, Field(discriminator="kind")]
    splits: SplitSpec = SplitSpec()
    split_seed: Seed = 0
    limit: Count | None = Field(None, description="use the first so many accepted pairs of every source file")


# --- models ---------------------------------------------------------------------------------------------------------


class TokenizerSpec(Closed):
    """A tokenizer trained on the chosen responses and prompts of the train split."""

    kind: Literal["words", "bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=64)] = 2048


class ScratchModel(Closed):
    """A small Llama with random weights, its tokenizer trained on the pairs."""

    kind: Literal["scratch"]
    layers: Count = 2
    hidden: Count = 64
    heads: Count = 4
    intermediate: Count = 192
    max_positions: Count = 96
    tokenizer: TokenizerSpec = TokenizerSpec()
    seed: Seed = 0


class LocalModel(Closed):
    """A Hugging Face model folder with a tokenizer on this machine."""

    kind: Literal["local"]
    path: str = Field(description="relative to data_root of config.yaml, or absolute")
    trust_remote_code: bool = False


class HubModel(Closed):
    """A model on the Hugging Face hub, at a pinned revision."""

    kind: Literal["hub"]
    repo: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$", description="full commit hash")
    trust_remote_code: bool = False


ModelSpec = Annotated[ScratchModel | LocalModel | HubModel, Field(discriminator="kind")]


class TokensSpec(Closed):
    """How texts become token ids."""

    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="auto: the tokenizer's chat template if it has one"
    )
    max_prompt_tokens: Count = 48
    max_length: Count = 64
    overlong: Literal["error", "refuse", "truncate_left"] = Field(
        "error",
        description="prompts over max_prompt_tokens: stop, refuse the pair and count it, or keep the prompt's end",
    )

    @model_validator(mode="after")
    def _room_for_a_response(self) -> TokensSpec:
        if self.max_prompt_tokens >= self.max_length:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) leaves no room in max_length ({self.max_length})"
            )
        return self


# --- training -------------------------------------------------------------------------------------------------------


class TrainSpec(Closed):
    """What a training run's result depends on. Micro-batch, device and logging do not belong here."""

    steps: Count | None = Field(None, description="optimiser steps; or give epochs")
    epochs: Positive | None = None
    batch_size: Count = Field(32, description="effective batch: micro-batch x accumulation x processes")
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and only one of them")
        return self


class SftSpec(Closed):
    """Supervised fine-tuning on the chosen responses of the train split."""

    train: TrainSpec
    seed: Seed = 0


class EnsembleSpec(Closed):
    """K reward models; each member has its own initialisation, data order and subset."""

    members: int = Field(1, ge=1, description="K; ignored keys do not exist: with longer_wins, K must equal its length")
    seeds: list[Seed] | None = Field(None, description="one per member; default 0..K-1")
    subset: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="share of train pairs a member sees")
    longer_wins: list[Fraction] | None = Field(None, description="one bias b per member: D_rho,b of arXiv 2405.19316")
    train: TrainSpec
    split: Literal["train", "judge"] = "train"

    @model_validator(mode="after")
    def _consistent(self) -> EnsembleSpec:
        if self.seeds is not None:
            unique_seeds(self.seeds)
            if len(self.seeds) != self.members:
                raise ValueError(f"{len(self.seeds)} seeds for {self.members} members")
        if self.longer_wins is not None and len(self.longer_wins) != self.members:
            raise ValueError(f"{len(self.longer_wins)} values in longer_wins for {self.members} members")
        return self


class DispersionSpec(Closed):
    """The prompt-dispersion estimate of MallowsPO, and the controls that break it on purpose."""

    estimator: Literal["token_entropy"] = "token_entropy"
    norm: Literal["per_response_mean", "sum_over_max_len"] = "per_response_mean"
    phi_mapping: Literal["identity", "half"] = "identity"
    control: Literal["shuffled", "constant", "inverse"] | None = None
    seed: Seed | None = Field(0, description="of the shuffled control; null where nothing is shuffled")


class SamplingSpec(Closed):
    """Decoding. The batch is part of the identity: sampled text depends on it."""

    max_new_tokens: Count = 32
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = 64
    seed: Seed = 0


class ForwardKlSpec(Closed):
    """gamma(t) KL(ref || policy), gamma linear over the run from the first to the second value."""

    gamma: list[float] = Field(min_length=2, max_length=2)


class RegulariserSpec(Closed):
    """Terms added to the pair loss."""

    forward_kl: ForwardKlSpec


class LossSpec(BaseModel):
    """A loss of ``LOSSES`` by name; every other key is a parameter, checked against the loss's signature."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The loss's own parameters."""
        return dict(self.model_extra or {})


class ArmSpec(Closed):
    """One policy of an item: a loss with its signals. What is not said is taken from the item's ``policy``."""

    loss: LossSpec
    rewards: Name | None = Field(None, description="which of the item's reward ensembles")
    dispersion: DispersionSpec = DispersionSpec()
    regulariser: RegulariserSpec | None = None
    train: TrainSpec | None = None


# --- evaluation and verdict -----------------------------------------------------------------------------------------


class EvaluateSpec(Closed):
    """Generate for held-out prompts, judge in both orders against a baseline, summarise."""

    prompts: Count = Field(200, description="at most so many test prompts")
    sampling: SamplingSpec = SamplingSpec()
    judge: Literal["oracle"] | EnsembleSpec = Field(
        "oracle", description="the world's oracle, or a held-out reward model"
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
    rewards: dict[Name, EnsembleSpec] = {}
    samples: SamplingSpec | None = Field(None, description="reference samples; needed by forward_kl")
    policy: TrainSpec
    arms: dict[Name, ArmSpec] = Field(min_length=1)
    seeds: list[Seed] = Field([0], min_length=1)
    evaluate: EvaluateSpec
    expect: list[ExpectSpec] = []

    @field_validator("seeds")
    @classmethod
    def _unique(cls, seeds: list[int]) -> list[int]:
        return unique_seeds(seeds)


class ExecutionSpec(Closed):
    """How jobs run on this machine; changes no result."""

    micro_batch: Count = 32
    threads: Count = 1
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs per model job")
    checkpoint_steps: Count = 100


class Config(Closed):
    """config/config.yaml."""

    items: list[str] = Field(min_length=1, description="paper/item names or patterns below config/experiments")
    results: str = "results"
    data_root: str = "."
    execution: ExecutionSpec = ExecutionSpec()


def unique_seeds(seeds: list[int]) -> list[int]:
    """The seeds as given; ValueError where one stands twice."""
    repeated = sorted({s for s in seeds if seeds.count(s) > 1})
    if repeated:
        raise ValueError(f"seed {repeated[0]} stands {seeds.count(repeated[0])} times; every seed once")
    return seeds
