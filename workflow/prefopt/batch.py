"""The one container that every pair loss reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    Signal = Any  # Tensor | None: there when the loss declares the need, so that losses read what they declare unasked

_PER_PAIR = frozenset(
    {
        "pair_id",
        "chosen_logp",
        "rejected_logp",
        "chosen_tokens",
        "rejected_tokens",
        "ref_chosen_logp",
        "ref_rejected_logp",
        "dispersion_weight",
        "neg_log_dispersion",
        "vote_share",
        "agreeing",
        "opposing",
        "chosen_advantage",
        "rejected_advantage",
        "other_ref_chosen_logp",
        "other_ref_rejected_logp",
        "chosen_win_rate",
        "rejected_win_rate",
        "auxiliary_reward",
        "value",
        "head_margin",
        "gap_mean",
        "gap_sd",
        "keep_draw",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """B preference pairs as a loss sees them; optional fields are there when the loss declares the need.

    Shapes: [B] pairs, [K] reward models, [T] response tokens. Log-probabilities in nats, summed over response
    tokens unless the name says ``token``. Only policy log-probabilities and what a head on the policy says (``value``,
    ``head_margin``) carry gradient.

    Raises ValueError where a field's shape does not fit ``pair_id``.
    """

    pair_id: Tensor  # [B] integer key into every table
    chosen_logp: Tensor  # [B] policy
    rejected_logp: Tensor  # [B]
    chosen_tokens: Tensor  # [B] response lengths
    rejected_tokens: Tensor  # [B]
    ref_chosen_logp: Signal = None  # [B] need "reference"
    ref_rejected_logp: Signal = None
    dispersion_weight: Signal = None  # [B] c(x) of MallowsPO, mean 1 on train; need "dispersion"
    neg_log_dispersion: Signal = None  # [B] lambda(x) = -log phi(x); need "dispersion"
    vote_share: Signal = None  # [B] share of votes for chosen, ties half; need "vote_share"
    agreeing: Signal = None  # [B] responsibilities of a type, of who chose so; need "responsibilities"
    opposing: Signal = None  # [B] of who chose the rejected response
    chosen_advantage: Signal = None  # [B] score minus the policy's mean on the prompt; need "advantages"
    rejected_advantage: Signal = None
    chosen_reward: Signal = None  # [B, K] need "rewards"
    rejected_reward: Signal = None
    chosen_token_logp: Signal = None  # [B, T] need "tokens"
    rejected_token_logp: Signal = None
    chosen_mask: Signal = None  # [B, T] 1 on response tokens
    rejected_mask: Signal = None
    ref_chosen_token_logp: Signal = None
    ref_rejected_token_logp: Signal = None
    chosen_subset: Signal = None  # [B, T] 1 on as many tokens as the shorter response has; need "subset"
    rejected_subset: Signal = None
    chosen_diff: Signal = None  # [B, T] 1 on tokens in which a response differs from the other; need "diff"
    rejected_diff: Signal = None
    other_ref_chosen_logp: Signal = None  # [B] need "second_reference"
    other_ref_rejected_logp: Signal = None
    chosen_win_rate: Signal = None  # [B] against a set of responses to the prompt; need "win_rates"
    rejected_win_rate: Signal = None
    auxiliary_reward: Signal = None  # [B] of the chosen response; need "auxiliary"
    value: Signal = None  # [B] of the prompt, the policy's value head; need "auxiliary"
    gap_mean: Signal = None  # [B] running mean of margins, the same for all; need "gap_state"
    gap_sd: Signal = None  # [B] and their running standard deviation
    keep_draw: Signal = None  # [B] uniform numbers of this step
    head_margin: Signal = None  # [B] chosen - rejected, the policy's reward head; need "reward_head"

    def __post_init__(self) -> None:
        size = self.pair_id.shape[0]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            rank = 1 if field.name in _PER_PAIR else 2
            if value.ndim != rank or value.shape[0] != size:
                raise ValueError(
                    f"{field.name}: shape {tuple(value.shape)}, expected {rank} axes with {size} pairs first"
                )

    @property
    def policy_margin(self) -> Tensor:
        """log pi(chosen) - log pi(rejected) [B], nats."""
        return self.chosen_logp - self.rejected_logp

    @property
    def ref_margin(self) -> Tensor:
        """log ref(chosen) - log ref(rejected) [B], nats."""
        return self.ref_chosen_logp - self.ref_rejected_logp

    @property
    def margin(self) -> Tensor:
        """policy_margin - ref_margin [B]: the implicit reward difference over beta (not scaled by beta)."""
        return self.policy_margin - self.ref_margin

    @property
    def reward_margin(self) -> Tensor:
        """Explicit reward of chosen - rejected, one column per reward model [B, K]."""
        return self.chosen_reward - self.rejected_reward
