"""What a step of a policy optimises: a loss of ``LOSSES`` on pairs, and a regulariser on reference samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.batch import PairBatch
from prefopt.errors import FailedCheck
from prefopt.lazy import LazyModule
from prefopt.losses import get_loss, get_regulariser, linear_gamma
from prefopt.scoring import Ids, ResponseScores, length_batches, response_scores
from prefopt.training.heads import follow_gap, head_margin, prompt_value
from prefopt.training.objectives import Moment, PairObjective, Sums, rows_of_stream, take
from prefopt.training.token_sets import diff_masks, shared_subset

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
else:
    torch = LazyModule("torch")

_NEEDED_SIGNALS = {
    "reference": ("ref_chosen_logp", "ref_rejected_logp"),
    "dispersion": ("dispersion_weight", "neg_log_dispersion"),
    "rewards": ("chosen_reward", "rejected_reward"),
    "vote_share": ("vote_share",),
    "second_reference": ("other_ref_chosen_logp", "other_ref_rejected_logp"),
    "win_rates": ("chosen_win_rate", "rejected_win_rate"),
    "auxiliary": ("auxiliary_reward",),
    "responsibilities": ("agreeing", "opposing"),
    "advantages": ("chosen_advantage", "rejected_advantage"),
}
_TOKEN_SIGNALS = ("ref_chosen_token_logp", "ref_rejected_token_logp")
_SIDES = ("chosen", "rejected")
_BY_TOKEN = ("_token_logp", "_diff", "_subset")


@dataclass(frozen=True)
class ReferenceSamples:
    """gamma(t) times a penalty on responses drawn from the reference; gamma is linear from gamma[0] to gamma[1].

    ref_logp are the reference's own log-probabilities of the responses, nats.
    """

    gamma: tuple[float, float]
    prompt_ids: Ids
    response_ids: Ids
    ref_logp: Sequence[float]
    seed: int = 0
    name: str = "forward_kl"


class PolicyObjective(PairObjective):
    """A loss of ``LOSSES`` on pairs, plus at choice a regulariser on reference samples.

    ``signals`` holds one value per pair under the names of PairBatch's fields: numbers, rows of K rewards, or, for
    token fields, one array per response. Raises BadInput for an unknown loss or parameter, ValueError where a signal
    that the loss needs is missing or has another number of rows.
    """

    def __init__(
        self,
        prompt_ids: Ids,
        chosen_ids: Ids,
        rejected_ids: Ids,
        pair_ids: Sequence[int],
        *,
        loss: str,
        loss_params: Mapping[str, Any],
        signals: Mapping[str, Sequence[Any]],
        regulariser: ReferenceSamples | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(prompt_ids, chosen_ids, rejected_ids, pair_ids)
        self.pair_loss = get_loss(loss).form(loss_params)
        self.pair_loss.check_params(loss_params)
        self.loss_params, self.signals, self.regulariser = dict(loss_params), dict(signals), regulariser
        self.divisible, self.seed = not self.pair_loss.couples_pairs, seed
        needs = self.pair_loss.needs
        for need in sorted(needs):
            wanted = _TOKEN_SIGNALS if need == "tokens" and "reference" in needs else _NEEDED_SIGNALS.get(need, ())
            missing = [name for name in wanted if name not in self.signals]
            if missing:
                raise ValueError(f"loss '{loss}' needs '{need}', but there is no signal {missing[0]}")
        if "diff" in needs:
            masks = [diff_masks(chosen, rejected) for chosen, rejected in zip(chosen_ids, rejected_ids, strict=True)]
            self.signals |= {f"{side}_diff": [mask[at] for mask in masks] for at, side in enumerate(_SIDES)}
        by_token = "tokens" in needs
        self._used = [name for name in self.signals if by_token or not name.endswith("_token_logp")]
        for name, values in self.signals.items():
            if len(values) != self.size:
                raise ValueError(f"signal {name}: {len(values)} rows for {self.size} pairs")
        self._penalty: Callable[..., Tensor] | None = get_regulariser(regulariser.name).fn if regulariser else None

    def batch(self, model: PreTrainedModel, rows: Sequence[int], step: int = 0) -> PairBatch:
        """The pairs as a loss sees them at a step, chosen and rejected scored in one forward pass.

        A loss that needs a head takes it from ``model``, which is inside ``heads.heads_on``.
        """
        return replace(self._scored(model, rows, step), **self._head_fields(model, rows))

    def _scored(self, model: PreTrainedModel, rows: Sequence[int], step: int = 0) -> PairBatch:
        by_token = "tokens" in self.pair_loss.needs
        scores = response_scores(model, *self._both(rows), token_level=by_token)
        chosen_logp, rejected_logp = scores.logp.chunk(2)
        chosen_tokens, rejected_tokens = scores.tokens.chunk(2)
        return PairBatch(
            pair_id=torch.tensor(take(self.pair_ids, rows), device=model.device),
            chosen_logp=chosen_logp,
            rejected_logp=rejected_logp,
            chosen_tokens=chosen_tokens.to(chosen_logp.dtype),
            rejected_tokens=rejected_tokens.to(chosen_logp.dtype),
            **(_token_fields(scores) if by_token else {}),
            **{name: self._signal(name, take(self.signals[name], rows), scores) for name in self._used},
            **self._drawn(rows, step, scores),
        )

    def _drawn(self, rows: Sequence[int], step: int, scores: ResponseScores) -> dict[str, Tensor]:
        """The token places of this step, the same for policy and reference."""
        if "subset" not in self.pair_loss.needs:
            return {}
        masks = [
            shared_subset(self.pair_ids[row], step, self.seed, len(self.chosen_ids[row]), len(self.rejected_ids[row]))
            for row in rows
        ]
        names = (f"{side}_subset" for side in _SIDES)
        return {name: self._signal(name, [m[at] for m in masks], scores) for at, name in enumerate(names)}

    def _head_fields(self, model: PreTrainedModel, rows: Sequence[int]) -> dict[str, Tensor]:
        fields = {}
        if "reward_head" in self.pair_loss.needs:
            fields["head_margin"] = head_margin(model, *self._both(rows))
        if "auxiliary" in self.pair_loss.needs:
            fields["value"] = prompt_value(model, take(self.prompt_ids, rows))
        return fields

    def loss(self, model: PreTrainedModel, rows: Sequence[int], moment: Moment) -> tuple[Tensor, Sums]:
        """Sum over pairs of the loss and, with a regulariser, of gamma times the penalty on as many samples."""
        batch = self._followed(model, self.batch(model, rows, moment.step), moment.step)
        total = self.pair_loss.fn(batch, **self.loss_params).sum()
        margin = (batch.policy_margin if batch.ref_chosen_logp is None else batch.margin).detach()
        sums = {
            "accuracy": (margin > 0).sum(),
            "margin": margin.sum(),
            "chosen_logp": batch.chosen_logp.detach().sum(),
            "rejected_logp": batch.rejected_logp.detach().sum(),
            **self._reference_sums(batch),
            **self._member_counts(batch),
        }
        if self.regulariser is not None:
            term = self._penalty_sum(model, len(rows), moment)
            total = total + term
            sums["kl_term"] = term.detach()
        return total, sums

    def _followed(self, model: PreTrainedModel, batch: PairBatch, step: int) -> PairBatch:
        """With the margins' running statistics, which this batch then enters, and the step's draws."""
        if "gap_state" not in self.pair_loss.needs:
            return batch
        draw = np.random.default_rng([self.seed, step, 19]).random(len(batch.pair_id))
        mean, sd = (value.expand_as(batch.chosen_logp) for value in follow_gap(model, batch.margin))
        return replace(batch, gap_mean=mean, gap_sd=sd, keep_draw=torch.as_tensor(draw).to(mean))

    def check_start(self, model: PreTrainedModel, rows: Sequence[int], band: float, micro_batch: int = 32) -> float:
        """Largest |policy margin - reference margin| over rows, nats; 0 where policy and reference are one model.

        Raises FailedCheck naming the pair where it is above ``band``: the reference scores are then of another model
        than the one that training starts from.
        """
        worst, where = 0.0, rows[0]
        with torch.no_grad():
            for part in length_batches([self.lengths[row] for row in rows], micro_batch):
                chosen = [rows[at] for at in part]
                gaps = self._scored(model, chosen).margin.abs().nan_to_num(nan=float("inf")).tolist()
                at = max(range(len(gaps)), key=gaps.__getitem__)
                if gaps[at] > worst:
                    worst, where = gaps[at], chosen[at]
        if worst > band:
            raise FailedCheck(
                f"pair_id {self.pair_ids[where]}: policy and reference margins differ by {worst:.4g} nats before the "
                f"first step (band {band:g}); the reference scores are not those of the model that training starts from"
            )
        return worst

    @staticmethod
    def _signal(name: str, values: Sequence[Any], scores: ResponseScores) -> Tensor:
        dtype, device = scores.logp.dtype, scores.logp.device
        if not name.endswith(_BY_TOKEN):
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=device)
        out = np.zeros((len(values), scores.mask.shape[1]))
        for at, response in enumerate(values):
            out[at, : len(response)] = response
        return torch.as_tensor(out, dtype=dtype, device=device)

    @staticmethod
    def _reference_sums(batch: PairBatch) -> Sums:
        """log policy - log reference of either response, summed over pairs; nothing where no reference is known."""
        if batch.ref_chosen_logp is None:
            return {}
        return {
            "chosen_log_ratio": (batch.chosen_logp.detach() - batch.ref_chosen_logp).sum(),
            "rejected_log_ratio": (batch.rejected_logp.detach() - batch.ref_rejected_logp).sum(),
        }

    def _member_counts(self, batch: PairBatch) -> Sums:
        """Pairs matched to each ensemble member; nothing for losses that match none."""
        if self.pair_loss.member is None:
            return {}
        with torch.no_grad():
            members = self.pair_loss.member(batch, **self.loss_params)
        counts = torch.bincount(members, minlength=batch.reward_margin.shape[1])
        return {f"member_{k}": count for k, count in enumerate(counts)}

    def _penalty_sum(self, model: PreTrainedModel, count: int, moment: Moment) -> Tensor:
        samples = self.regulariser
        rows = rows_of_stream(len(samples.ref_logp), samples.seed, moment.rows_before, count)
        scores = response_scores(model, take(samples.prompt_ids, rows), take(samples.response_ids, rows))
        ref_logp = torch.as_tensor(take(samples.ref_logp, rows), dtype=scores.logp.dtype, device=scores.logp.device)
        return linear_gamma(moment.step, moment.steps, *samples.gamma) * self._penalty(scores.logp, ref_logp).sum()


def _token_fields(scores: ResponseScores) -> dict[str, Tensor]:
    chosen, rejected = scores.token_logp.chunk(2)
    chosen_mask, rejected_mask = scores.mask.to(chosen.dtype).chunk(2)
    return {
        "chosen_token_logp": chosen,
        "rejected_token_logp": rejected,
        "chosen_mask": chosen_mask,
        "rejected_mask": rejected_mask,
    }
