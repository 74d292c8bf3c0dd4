"""Declarations of preference pairs: sources and splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from prefopt.specs.base import Closed, Count, Fraction, Seed

VoteReaderName = Literal[
    "auto",
    "votes",
    "rankings",
    "ukp_convarg1",
    "pandalm",
    "tulu_human_eval",
    "squality_human_eval",
    "mt_bench_human",
    "hanna",
    "llmbar",
    "qlora",
]
ReaderName = Literal["auto", "hh", "trl", "ultrafeedback", "shp", "stack_exchange", "tldr", "imdb_prefix"]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="full commit hash")]
Paths = Annotated[list[str], Field(min_length=1, description="relative to data_root of config.yaml, or absolute")]
Pins = Annotated[list[str] | None, Field(description="pinned digests; without them the files are hashed when planning")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RatersSpec(Closed):
    """Named annotators of the demo world: types of people who like different lengths, unseen by every learner."""

    length_preferences: list[float] = Field(
        min_length=1, description="one type each: the true reward with this preference for length (the oracle's: 1.15)"
    )
    annotators: Count = 40
    votes: Count = Field(3, description="of every pair; more of them choose, a coin where they are level")
    noise: Annotated[float, Field(gt=0.0)] = Field(0.5, description="temperature of a vote")


class WorldSource(Closed):
    """Pairs of the embedded demo world; fields are those of ``prefopt.world.WorldParams``."""

    kind: Literal["world"]
    seed: Seed = 0
    prompts: Count = 1500
    pairs: Count = 2000
    domain: Literal["home", "away"] = "home"
    labels: Literal["mallows", "oracle", "polarity"] = Field(
        "mallows",
        description="who chooses: a rater, the true reward, or the more positive response (open prompts only)",
    )
    candidates: Annotated[int, Field(ge=2, le=12)] = Field(6, description="responses that are ranked per prompt")
    closed_fraction: Fraction = Field(0.5, description="share of prompts with one right answer")
    phi_closed: Fraction = Field(0.2, description="dispersion of the raters on closed prompts")
    phi_open: Fraction = Field(0.8, description="dispersion of the raters on open prompts")
    rho: Fraction | None = Field(None, description="fraction of pairs whose longer response is the chosen one")
    raters: RatersSpec | None = Field(
        None,
        description="named annotators who vote on the pairs anew; their majority chooses",
        exclude_if=lambda raters: raters is None,
    )


class FilesSource(Closed):
    """Pairs in local files: .jsonl(.gz), .csv, .parquet, or a folder saved by the datasets library."""

    kind: Literal["files"]
    reader: ReaderName = "auto"
    paths: Paths
    sha256: Pins = None


class VotesSource(Closed):
    """Pairs with the votes of several annotators on each, annotators named; or their rankings of several responses."""

    kind: Literal["votes"]
    reader: VoteReaderName = "auto"
    paths: Paths
    sha256: Pins = None
    per_prompt: Count | None = Field(None, description="use at most so many pairs of a prompt, drawn by their texts")
    ties: Literal["keep", "refuse"] = Field(
        "keep", description="pairs with as many votes for either side: keep them, a coin chooses; or refuse them"
    )
    hold_out: Count | None = Field(
        None,
        description="votes of every pair that neither label nor weight sees, for evaluation",
        exclude_if=lambda count: count is None,
    )


class HubSource(Closed):
    """Pairs in a dataset repository on the Hugging Face hub, at a pinned revision."""

    kind: Literal["hub"]
    reader: ReaderName = "auto"
    repo: str
    revision: Revision
    split: str = "train"
    subset: str | None = None


class _Texts(Closed):
    """What of a row is the prompt: the text in a column, or what a reader of preference pairs takes for it."""

    column: str | None = Field(None, description="text of a user's message; default instruction")
    reader: ReaderName | None = Field(None, description="instead of a column, for sets of preference pairs")

    @model_validator(mode="after")
    def _one_way(self) -> _Texts:
        if self.column is not None and self.reader is not None:
            raise ValueError("give either column or reader, and only one of them")
        return self


class FilePrompts(_Texts):
    """Prompts in a local file: .json (a list, as AlpacaEval's), .jsonl, .csv or .parquet, the first three also gzipped.

    Rows may have ``output``, a baseline's answer, and ``dataset``, where the prompt is from.
    """

    kind: Literal["file"]
    path: str = Field(description="relative to data_root of config.yaml, or absolute")
    sha256: Sha256 | None = Field(None, description="pinned digest; without it the file is hashed when planning")


class HubPrompts(_Texts):
    """Prompts in a dataset repository on the Hugging Face hub, at a pinned revision."""

    kind: Literal["hub"]
    repo: str
    revision: Revision
    split: str = "train"
    subset: str | None = None
    files: str | None = Field(None, description="only the files of the repository that this pattern names")


class AlpacaEvalPrompts(Closed):
    """AlpacaEval's 805 prompts with a baseline's outputs: from the hub, or a local folder or file.

    The data are CC BY-NC 4.0 and not part of this project.
    """

    kind: Literal["alpaca_eval"]
    baseline: Literal["gpt4_1106_preview", "text_davinci_003"] = Field(
        "gpt4_1106_preview", description="whose outputs: of AlpacaEval 2, or of AlpacaEval 1"
    )
    path: str | None = Field(None, description="relative to data_root of config.yaml, or absolute; default: the hub")
    revision: Revision = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"


PromptsSpec = Annotated[FilePrompts | HubPrompts | AlpacaEvalPrompts, Field(discriminator="kind")]


class FileRef(Closed):
    """A local file that a result depends on."""

    path: str = Field(description="relative to data_root of config.yaml, or absolute")
    sha256: Sha256 | None = Field(None, description="pinned digest; without it the file is hashed when planning")


class SplitSpec(Closed):
    """Shares of prompts: learners see train, a held-out judge judge; validation selects settings, test evaluates."""

    train: Fraction = 0.8
    judge: Fraction = 0.0
    validation: Fraction = Field(0.0, description="taken from what test would be: train and judge stay as they are")
    test: Fraction = 0.2

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitSpec:
        total = self.train + self.judge + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"shares sum to {total:g}, they must sum to 1")
        if self.train == 0 or self.test == 0:
            raise ValueError("train and test must both have a share")
        return self


class DataSpec(Closed):
    """A set of preference pairs: where it comes from and how its prompts are split."""

    source: Annotated[WorldSource | FilesSource | VotesSource | HubSource, Field(discriminator="kind")]
    splits: SplitSpec = SplitSpec()
    split_seed: Seed = 0
    limit: Count | None = Field(None, description="use the first so many accepted pairs of every source file")


# Names are replaced by what they stand for (``config.load_item``) before anything else sees a declaration.
if TYPE_CHECKING:
    NamedData = DataSpec
else:
    NamedData = str | DataSpec
