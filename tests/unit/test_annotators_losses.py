"""Losses on shares of votes: what they are at the ends, where they are lowest, and who may ask for them."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.batch import PairBatch
from prefopt.losses import LOSSES, get_loss
from prefopt.training.policy_objective import PolicyObjective

NAMES = ("dpo_votes", "cdpo_votes", "distill_votes")


def batch(margin, share) -> PairBatch:
    """Pairs with these margins of policy over reference."""
    chosen = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(chosen).detach()
    return PairBatch(
        pair_id=torch.arange(len(margin)),
        chosen_logp=chosen,
        rejected_logp=zero,
        chosen_tokens=zero + 5,
        rejected_tokens=zero + 5,
        ref_chosen_logp=zero,
        ref_rejected_logp=zero,
        vote_share=torch.tensor(share, dtype=torch.float64),
    )


def values(name, margin, share, **params) -> torch.Tensor:
    return LOSSES[name].fn(batch(margin, share), beta=0.5, **params)


MARGINS = [-3.0, -0.4, 0.0, 1.7, 8.0]


def test_a_unanimous_vote_is_the_loss_of_the_paper():
    ones = [1.0] * len(MARGINS)
    for votes, plain in (("dpo_votes", "dpo"), ("cdpo_votes", "cdpo")):
        assert values(votes, MARGINS, ones).tolist() == pytest.approx(values(plain, MARGINS, ones).tolist())


def test_a_share_weighs_the_two_labels():
    # p = 0.8, beta * margin = 0.5: 0.8 log(1 + e^-0.5) + 0.2 log(1 + e^0.5)
    expected = 0.8 * math.log1p(math.exp(-0.5)) + 0.2 * math.log1p(math.exp(0.5))
    assert values("dpo_votes", [1.0], [0.8]).item() == pytest.approx(expected)
    # eps = 0.1 turns p = 0.8 into 0.8 * 0.8 + 0.1 = 0.74
    assert values("cdpo_votes", [1.0], [0.8]).item() == pytest.approx(values("dpo_votes", [1.0], [0.74]).item())
    logit = math.log(0.74 / 0.26)
    assert values("distill_votes", [1.0], [0.8]).item() == pytest.approx((logit - 0.5) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_exchanging_the_responses_changes_nothing(name):
    share = [0.1, 0.5, 0.9, 1.0, 0.0]
    turned = values(name, [-m for m in MARGINS], [1 - p for p in share])
    assert turned.tolist() == pytest.approx(values(name, MARGINS, share).tolist())


@pytest.mark.parametrize(("name", "eps"), [("dpo_votes", 0.0), ("cdpo_votes", 0.1), ("distill_votes", 0.1)])
def test_the_lowest_point_is_where_the_policy_gives_the_votes_share(name, eps):
    share = [0.2, 0.5, 0.6, 0.8]
    smoothed = [(1 - 2 * eps) * p + eps for p in share]
    best = batch([math.log(p / (1 - p)) / 0.5 for p in smoothed], share)
    LOSSES[name].fn(best, beta=0.5).sum().backward()
    assert best.chosen_logp.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_differences(name):
    share = [0.0, 0.3, 0.5, 0.8, 1.0]
    given = batch(MARGINS, share)
    LOSSES[name].fn(given, beta=0.5).sum().backward()
    step = 1e-6
    up, down = (values(name, [m + sign * step for m in MARGINS], share) for sign in (1, -1))
    assert given.chosen_logp.grad.tolist() == pytest.approx(((up - down) / (2 * step)).tolist(), abs=1e-7)


def test_the_need_is_declared_and_met_or_told():
    assert all(get_loss(name).needs == {"reference", "vote_share"} for name in NAMES)
    signals = {"ref_chosen_logp": [0.0], "ref_rejected_logp": [0.0]}
    rows = [[1]], [[2]], [[3]]
    with pytest.raises(ValueError, match="needs 'vote_share'"):
        PolicyObjective(*rows, [0], loss="dpo_votes", loss_params={"beta": 0.1}, signals=signals)
