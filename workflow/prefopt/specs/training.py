"""Declarations of training runs and their signals: SFT, reward ensembles, dispersion, losses, arms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefopt.specs.base import Closed, Count, Fraction, Name, Named, Positive, Seed, unique_seeds


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

    members: int = Field(1, ge=1, description="K; longer_wins and seeds have one entry for each")
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
    norm: Literal["per_response_mean", "sum_over_max_len", "mc_sequence"] = "per_response_mean"
    samples: Count | None = Field(None, description="reference samples per prompt, for mc_sequence and only there")
    phi_mapping: Literal["identity", "half"] = "identity"
    control: Literal["shuffled", "constant", "inverse"] | None = None
    seed: Seed | None = Field(0, description="of the shuffled control; null where nothing is shuffled")

    @model_validator(mode="after")
    def _samples_where_drawn(self) -> DispersionSpec:
        if (self.norm == "mc_sequence") != (self.samples is not None):
            raise ValueError("norm mc_sequence needs 'samples' per prompt, and no other norm takes them")
        return self


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


class LossSpec(Named):
    """A loss of ``LOSSES`` by name; every other key is a parameter, checked against the loss's signature."""


class ArmSpec(Closed):
    """One policy of an item: a loss with its signals. What is not said is taken from the item's ``policy``."""

    loss: LossSpec
    rewards: Name | None = Field(None, description="which of the item's reward ensembles")
    dispersion: DispersionSpec = DispersionSpec()
    regulariser: RegulariserSpec | None = None
    train: TrainSpec | None = None
