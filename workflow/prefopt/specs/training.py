"""Declarations of training runs and their signals: SFT, reward ensembles, dispersion, losses, arms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefopt.specs.base import Closed, Count, Fraction, Name, Named, Positive, Seed, unique_seeds
from prefopt.specs.rounds import RoundsSpec


class AdapterSpec(Closed):
    """LoRA: beside the linear layers of the frozen body stand (alpha / rank) B A, and only A and B are trained."""

    kind: Literal["lora"] = "lora"
    rank: Count = 16
    alpha: Positive = Field(32.0, description="scale of the adapter is alpha / rank")
    targets: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="names of linear layers such as q_proj; auto: all of the body"
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="of policies: the frozen body in 4 bits (QLoRA); needs bitsandbytes",
        exclude_if=lambda given: given is None,
    )


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
    adapter: AdapterSpec | None = Field(
        None,
        description="train and keep an adapter beside the model's weights instead of the weights themselves",
        exclude_if=lambda given: given is None,
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and only one of them")
        return self

    @property
    def quantize(self) -> str | None:
        """How the adapter's frozen body is quantised."""
        return None if self.adapter is None else self.adapter.quantize


def _not_quantized(train: TrainSpec | None) -> None:
    if train is not None and train.quantize is not None:
        raise ValueError("quantize is for policies: others are built on what is trained here; remove 'quantize'")


class SftSpec(Closed):
    """Supervised fine-tuning on the chosen responses of the train split."""

    train: TrainSpec
    seed: Seed = 0

    @model_validator(mode="after")
    def _whole_weights(self) -> SftSpec:
        _not_quantized(self.train)
        return self


_OF_KIND = {
    "frozen": "shared_backbone",
    "prior_votes": "distributional",
    "dimension": "general_preference",
    "temperature": "general_preference",
}


class EnsembleSpec(Closed):
    """K reward models; each member has its own initialisation, data order and subset. Or the world's true reward.

    ``kind: shared_backbone`` is a cheaper thing of another name: K heads on one body, which agree more than members do.
    """

    kind: Literal["independent", "shared_backbone", "distributional", "general_preference"] = Field(
        "independent",
        description="shared_backbone: K heads on one body, trained in one job on the same pairs in the same order; "
        "they differ in the heads' initialisation only and are no independent members. distributional: one model that "
        "predicts how annotators' votes on a response are distributed. general_preference: one model of vectors whose "
        "skew-symmetric product is the preference of one response over another",
        exclude_if=lambda kind: kind == "independent",
    )
    frozen: bool = Field(
        False,
        description="of shared_backbone: the body stays as it is, only the heads are trained",
        exclude_if=lambda frozen: not frozen,
    )
    prior_votes: Positive = Field(1.0, description="of distributional: votes of the uniform prior that data update")
    dimension: Annotated[int, Field(ge=2, multiple_of=2)] = Field(4, description="of general_preference: of a vector")
    temperature: Positive = Field(0.1, description="of general_preference: P = sigmoid(score / temperature)")
    members: int = Field(1, ge=1, description="K; longer_wins and seeds have one entry for each")
    seeds: list[Seed] | None = Field(None, description="one per member; default 0..K-1")
    subset: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="share of train pairs a member sees")
    longer_wins: list[Fraction] | None = Field(None, description="one bias b per member: D_rho,b of arXiv 2405.19316")
    equal_size: bool = Field(False, description="all subsamples D_rho,b get the size of the smallest")
    oracle: bool = Field(False, description="no member is trained: one column, the demo world's true reward (a bound)")
    train: TrainSpec | None = Field(None, description="of every member; none with oracle")
    split: Literal["train", "judge"] = "train"

    @model_validator(mode="after")
    def _consistent(self) -> EnsembleSpec:
        if self.seeds is not None:
            unique_seeds(self.seeds)
            if len(self.seeds) != self.members:
                raise ValueError(f"{len(self.seeds)} seeds for {self.members} members")
        if self.longer_wins is not None and len(self.longer_wins) != self.members:
            raise ValueError(f"{len(self.longer_wins)} values in longer_wins for {self.members} members")
        if self.equal_size and self.longer_wins is None:
            raise ValueError("equal_size is about the subsamples of longer_wins; give a bias for every member")
        if not self.oracle and self.train is None:
            raise ValueError("give 'train', how the members are trained")
        _not_quantized(self.train)
        return self

    @model_validator(mode="after")
    def _one_body(self) -> EnsembleSpec:
        for name, kind in _OF_KIND.items():
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is about another kind of reward model; set 'kind: {kind}'")
        if self.kind in ("distributional", "general_preference") and self.members != 1:
            raise ValueError(f"'{self.kind}' is one model; remove 'members'")
        if self.kind == "independent":
            return self
        if self.frozen and self.train is not None and self.train.adapter is not None:
            raise ValueError("an adapter trains the body, and frozen leaves it as it is; remove one of them")
        if self.members < 2 and self.kind == "shared_backbone":
            raise ValueError("a shared backbone has at least two heads; raise 'members', or leave 'kind' out")
        given = [name for name in ("longer_wins", "equal_size") if getattr(self, name)]
        given += ["subset"] if self.subset != 1.0 else []
        if given:
            raise ValueError(f"one body sees one set of pairs; remove '{given[0]}', or leave 'kind' out")
        return self

    @model_validator(mode="after")
    def _oracle_alone(self) -> EnsembleSpec:
        beside = {
            "kind": "independent",
            "members": 1,
            "seeds": None,
            "subset": 1.0,
            "longer_wins": None,
            "train": None,
            "split": "train",
        }
        given = [name for name, default in beside.items() if getattr(self, name) != default]
        if self.oracle and given:
            raise ValueError(f"the oracle is one member that is not trained; remove '{given[0]}'")
        return self


class DispersionSpec(Closed):
    """The prompt-dispersion estimate of MallowsPO, and the controls that break it on purpose."""

    estimator: Literal["token_entropy", "vote_entropy", "human_votes", "rating_spread", "truth"] = Field(
        "token_entropy",
        description="of the reference; of the votes of a reward ensemble, or of the pairs' annotators; the spread that "
        "a distributional reward model predicts; or the demo world's own phi",
    )
    ratings: Name | None = Field(
        None,
        description="of rating_spread: one of the item's reward ensembles, of kind distributional",
        exclude_if=lambda given: given is None,
    )
    norm: Literal["per_response_mean", "sum_over_max_len", "mc_sequence"] = "per_response_mean"
    samples: Count | None = Field(None, description="reference samples per prompt, for mc_sequence and only there")
    phi_mapping: Literal["identity", "half"] = "identity"
    control: Literal["shuffled", "constant", "inverse"] | None = None
    seed: Seed | None = Field(0, description="of the shuffled control; null where nothing is shuffled")

    @model_validator(mode="after")
    def _samples_where_drawn(self) -> DispersionSpec:
        if (self.norm == "mc_sequence") != (self.samples is not None):
            raise ValueError("norm mc_sequence needs 'samples' per prompt, and no other norm takes them")
        if self.estimator != "token_entropy" and self.norm != "per_response_mean":
            raise ValueError(f"norm '{self.norm}' is about token_entropy; the estimator {self.estimator} has no norm")
        return self


class SamplingSpec(Closed):
    """Decoding. Batch and engine are part of the identity: sampled text depends on them."""

    max_new_tokens: Count = 32
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = 64
    seed: Seed = 0
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="vllm needs an environment of its own; the default stands in no spec, so ids are as without it",
        exclude_if=lambda engine: engine == "transformers",
    )


class ForwardKlSpec(Closed):
    """gamma(t) of a divergence, linear over the run from the first to the second value."""

    gamma: list[float] = Field(min_length=2, max_length=2)


class RegulariserSpec(Closed):
    """A term added to the pair loss: gamma(t) times a divergence estimated on reference samples."""

    forward_kl: ForwardKlSpec | None = Field(
        None, description="gamma KL(ref || policy)", exclude_if=lambda given: given is None
    )
    reverse_kl: ForwardKlSpec | None = Field(
        None, description="gamma KL(policy || ref)", exclude_if=lambda given: given is None
    )

    @model_validator(mode="after")
    def _one_term(self) -> RegulariserSpec:
        if (self.forward_kl is None) == (self.reverse_kl is None):
            raise ValueError("give either forward_kl or reverse_kl")
        return self


class LossSpec(Named):
    """A loss of ``LOSSES`` by name; every other key is a parameter, checked against the loss's signature.

    ``composed`` also takes the names of its steps: aggregation, reference, margin, link, addon, weight.
    """


class ArmSpec(Closed):
    """One policy of an item: a loss with its signals. What is not said is taken from the item's ``policy``."""

    loss: LossSpec
    rewards: Name | None = Field(None, description="which of the item's reward ensembles")
    dispersion: DispersionSpec = DispersionSpec()
    second_reference: Name | None = Field(
        None, description="of losses with two: base, the model before fine-tuning, or one of the item's references"
    )
    auxiliary: Name | None = Field(None, description="the ensemble whose mean reward of chosen is the auxiliary reward")
    win_rate_samples: Count = Field(16, description="reference samples per prompt for calibrated win rates")
    regulariser: RegulariserSpec | None = None
    train: TrainSpec | None = None
    rounds: RoundsSpec | None = Field(
        None,
        description="train in several rounds, by one of the procedures",
        exclude_if=lambda given: given is None,
    )
