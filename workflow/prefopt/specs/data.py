"""Declarations of preference pairs: sources and splits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefopt.specs.base import Closed, Count, Fraction, Seed

ReaderName = Literal["auto", "hh", "trl", "ultrafeedback", "shp", "tldr", "imdb_prefix"]


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

    source: Annotated[WorldSource | FilesSource | HubSource, Field(discriminator="kind")]
    splits: SplitSpec = SplitSpec()
    split_seed: Seed = 0
    limit: Count | None = Field(None, description="use the first so many accepted pairs of every source file")
