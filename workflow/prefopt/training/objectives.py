"""What a training step optimises: supervised fine-tuning, reward models, policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from prefopt.lazy import LazyModule
from prefopt.scoring import Ids, response_scores, reward_scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

Sums = dict[str, "Tensor"]


@dataclass(frozen=True)
class Moment:
    """Where in a run a micro-batch stands: 0-based step of steps, and rows of the run that came before it."""

    step: int
    steps: int
    rows_before: int


class Objective(Protocol):
    """Rows to optimise over. ``loss`` returns sums over rows; the trainer divides by the effective batch's weight."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens per row, for sorting."""

    divisible: bool  # False where splitting a batch changes the loss

    @property
    def size(self) -> int:
        """Number of rows."""

    def weight(self, rows: Sequence[int]) -> float:
        """What these rows count in the denominator of the mean loss."""

    def names(self, rows: Sequence[int]) -> list[str]:
        """What a message calls these rows."""

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """Loss summed over rows, and sums of further quantities."""


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def rows_of_stream(size: int, seed: int, start: int, count: int) -> list[int]:
    """Elements start .. start + count of the endless stream of epochs, each a permutation of ``size`` rows.

    Epoch e's permutation depends on (size, seed, e) alone, so any part of the stream can be had without what came
    before it.
    """
    return [int(_permutation(size, seed, at // size)[at % size]) for at in range(start, start + count)]


def take(values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """The values of these rows, in their order."""
    return [values[row] for row in rows]


def _pair_lengths(prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids) -> list[int]:
    triples = zip(prompt_ids, chosen_ids, rejected_ids, strict=True)
    return [len(p) + max(len(c), len(r)) for p, c, r in triples]


class SftObjective:
    """Mean negative log-likelihood per response token of the chosen responses: -sum log pi / sum tokens, nats."""

    divisible = True

    def __init__(self, prompt_ids: Ids, chosen_ids: Ids, pair_ids: Sequence[Any] | None = None) -> None:
        self.prompt_ids, self.chosen_ids = prompt_ids, chosen_ids
        self.pair_ids = pair_ids if pair_ids is not None else range(len(prompt_ids))
        self.lengths = [len(p) + len(c) for p, c in zip(prompt_ids, chosen_ids, strict=True)]

    @property
    def size(self) -> int:
        """Number of responses."""
        return len(self.lengths)

    def weight(self, rows: Sequence[int]) -> float:
        """Response tokens."""
        return float(sum(len(self.chosen_ids[row]) for row in rows))

    def names(self, rows: Sequence[int]) -> list[str]:
        """Pair ids."""
        return [str(self.pair_ids[row]) for row in rows]

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """-log pi summed over responses."""
        scores = response_scores(model, take(self.prompt_ids, rows), take(self.chosen_ids, rows))
        return -scores.logp.sum(), {}


class PairObjective:
    """Rows that are preference pairs and count one each."""

    divisible = True

    def __init__(self, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids, pair_ids: Sequence[Any] | None) -> None:
        self.prompt_ids, self.chosen_ids, self.rejected_ids = prompt_ids, chosen_ids, rejected_ids
        self.pair_ids = pair_ids if pair_ids is not None else range(len(prompt_ids))
        self.lengths = _pair_lengths(prompt_ids, chosen_ids, rejected_ids)

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.lengths)

    def weight(self, rows: Sequence[int]) -> float:
        """Pairs."""
        return float(len(rows))

    def names(self, rows: Sequence[int]) -> list[str]:
        """Pair ids."""
        return [str(self.pair_ids[row]) for row in rows]

    def _both(self, rows: Sequence[int]) -> tuple[list, list]:
        """Prompts, and all chosen before all rejected responses, for one forward pass."""
        return take(self.prompt_ids, rows), take(self.chosen_ids, rows) + take(self.rejected_ids, rows)


class RewardObjective(PairObjective):
    """Bradley-Terry: -log sigmoid(reward(chosen) - reward(rejected))."""

    def __init__(
        self, prompt_ids: Ids, chosen_ids: Ids, rejected_ids: Ids, pair_ids: Sequence[Any] | None = None
    ) -> None:
        super().__init__(prompt_ids, chosen_ids, rejected_ids, pair_ids)

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """Sum over pairs; also how many are ranked right, and their margins."""
        chosen, rejected = reward_scores(model, *self._both(rows)).chunk(2)
        margin = chosen - rejected
        return F.softplus(-margin).sum(), {"accuracy": (margin.detach() > 0).sum(), "margin": margin.detach().sum()}


class SharedRewardObjective(RewardObjective):
    """The Bradley-Terry loss of K heads on one body, added up, so that each head's gradient is that of its own loss."""

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """Sum over pairs and heads; what is reported is the mean over heads."""
        chosen, rejected = reward_scores(model, *self._both(rows)).chunk(2)
        margin = chosen - rejected
        loss = F.softplus(-margin).sum()
        seen = margin.detach()
        return loss, {
            "loss": loss.detach() / margin.shape[1],
            "accuracy": (seen > 0).float().mean(dim=1).sum(),
            "margin": seen.mean(dim=1).sum(),
        }
