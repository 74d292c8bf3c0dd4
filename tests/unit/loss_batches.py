"""The three pairs of the methods' published vectors, as a batch."""

from __future__ import annotations

import math

import torch

from prefopt.batch import PairBatch


def t(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, t(expected), rtol=tolerance, atol=1e-14)


# Three pairs with hand-picked token log-probabilities; sums chosen [-4, -6, -2.6], rejected [-6.4, -1.7, -5.9].
TOKENS = {
    "chosen": [[-0.5, -1.2, -0.3, -2.0], [-1.1, -0.9, -2.4, -0.2, -1.4], [-0.3, -0.8, -0.5, -1.0]],
    "rejected": [[-0.8, -0.6, -1.5, -0.4, -2.2, -0.9], [-0.4, -0.7, -0.6], [-1.6, -0.9, -2.1, -1.3]],
    "ref_chosen": [[-0.7, -1.1, -0.6, -2.1], [-0.9, -0.8, -2.0, -0.3, -1.2], [-0.25, -0.75, -0.45, -0.9]],
    "ref_rejected": [[-0.6, -0.7, -1.2, -0.5, -1.9, -0.8], [-0.6, -0.9, -0.8], [-1.2, -0.8, -1.7, -1.1]],
}
CHOSEN_REWARD = [[1.2, 0.8, 1.5], [0.3, -0.2, 0.6], [0.9, 1.1, 0.7]]
REJECTED_REWARD = [[0.1, 0.4, -0.3], [0.5, 0.2, 0.1], [0.2, 0.9, 0.8]]
# c = -0.29 log((H_chosen + H_rejected) / 2) for normalised entropies (.35, .62), (.81, .74), (.12, .20).
WEIGHT = [-0.29 * math.log(h / 2) for h in (0.35 + 0.62, 0.81 + 0.74, 0.12 + 0.20)]


def padded(rows):
    width = max(map(len, rows))
    return t([row + [0.0] * (width - len(row)) for row in rows]), t(
        [[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows]
    )


# A second reference's sums, SamPO's token places, BMC's diff masks, HPO's auxiliary reward and value, DRDO's head.
OTHER_REF = {"chosen": [-5.0, -4.6, -2.9], "rejected": [-5.2, -3.0, -4.1]}
SUBSET = {"chosen": [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]], "rejected": [[0, 2, 3, 5], [0, 1, 2], [0, 1, 2, 3]]}
DIFF = {
    "chosen": [[0, 1, 0, 1], [1, 0, 1, 0, 1], [0, 0, 1, 1]],
    "rejected": [[0, 0, 1, 0, 1, 1], [0, 1, 1], [1, 0, 1, 0]],
}
AUXILIARY, VALUE, HEAD_MARGIN = [0.4, -0.1, 0.7], [0.2, 0.1, 0.3], [0.9, -0.2, 0.1]
# EM-DPO's responsibilities of type 0 for annotators A, B, A, who all chose as the pair says; advantages.
AGREEING = [0.6331346656348301, 0.5705919224305055, 0.6331346656348301]
ADVANTAGE = {"chosen": [0.4, -0.2, 0.15], "rejected": [-0.3, 0.1, -0.15]}


def three_pairs() -> PairBatch:
    """Sums and token log-probabilities of the policy are leaves of their own, with gradient."""
    tokens, masks = {}, {}
    for name, rows in TOKENS.items():
        tokens[name], masks[name] = padded(rows)
    width = {side: masks[side].shape[1] for side in ("chosen", "rejected")}
    return PairBatch(
        pair_id=torch.arange(3),
        chosen_logp=tokens["chosen"].sum(1).requires_grad_(),
        rejected_logp=tokens["rejected"].sum(1).requires_grad_(),
        chosen_tokens=torch.tensor([4, 5, 4]),
        rejected_tokens=torch.tensor([6, 3, 4]),
        ref_chosen_logp=tokens["ref_chosen"].sum(1),
        ref_rejected_logp=tokens["ref_rejected"].sum(1),
        dispersion_weight=t(WEIGHT),
        neg_log_dispersion=t(WEIGHT),
        chosen_reward=t(CHOSEN_REWARD),
        rejected_reward=t(REJECTED_REWARD),
        chosen_token_logp=tokens["chosen"].requires_grad_(),
        rejected_token_logp=tokens["rejected"].requires_grad_(),
        chosen_mask=masks["chosen"],
        rejected_mask=masks["rejected"],
        ref_chosen_token_logp=tokens["ref_chosen"],
        ref_rejected_token_logp=tokens["ref_rejected"],
        **{f"{side}_subset": padded([[1.0 * (n in row) for n in range(6)] for row in SUBSET[side]])[0][:, : width[side]]
           for side in SUBSET},
        **{f"{side}_diff": padded([[float(x) for x in row] for row in DIFF[side]])[0] for side in DIFF},
        **{f"other_ref_{side}_logp": t(values) for side, values in OTHER_REF.items()},
        # 4 samples and 2 members of the calibration vector: the rates of the first and of the last sample, every pair.
        chosen_win_rate=t([0.6982889189864321] * 3),
        rejected_win_rate=t([0.2381218107975144] * 3),
        auxiliary_reward=t(AUXILIARY),
        value=t(VALUE),
        head_margin=t(HEAD_MARGIN).requires_grad_(),
        agreeing=t(AGREEING),
        opposing=t([0.0] * 3),
        chosen_advantage=t(ADVANTAGE["chosen"]),
        rejected_advantage=t(ADVANTAGE["rejected"]),
        gap_mean=t([0.3] * 3),
        gap_sd=t([1.5] * 3),
        keep_draw=t([0.2, 0.5, 0.7]),
    )  # fmt: skip
