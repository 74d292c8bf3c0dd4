"""beta-DPO with its filter and its running statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from loss_batches import close, t, three_pairs
from prefopt.losses import LOSSES
from prefopt.losses.running import kept_pairs
from prefopt.training.heads import follow_gap, heads_on

FILTERED = LOSSES["beta_dpo_filtered"]


def test_without_the_filter_it_is_beta_dpo_at_the_running_mean():
    """M = .3: the published vector of beta-DPO."""
    expected = [0.6377708016545877, 0.7618566777879543, 0.6535870295221233]
    close(FILTERED.fn(three_pairs(), beta=0.1, filter_share=0.0), expected, 1e-12)
    plain = LOSSES["dpo"].fn(three_pairs(), beta=0.1)
    torch.testing.assert_close(FILTERED.fn(three_pairs(), beta=0.1, sensitivity=0.0, filter_share=0.0), plain)


def test_a_filtered_batch_counts_as_a_whole_one_and_beta_follows_the_kept():
    """Margins 1.2, -1.4, .85; one of three goes: the mean loss is that of the two others, beta of their mean."""
    batch = three_pairs()
    found = FILTERED.fn(batch, beta=0.1, filter_share=1 / 3)
    kept = np.flatnonzero(found.detach().numpy())
    assert len(kept) == 2
    margins = np.array([1.2, -1.4, 0.85])[kept]
    beta = 0.1 * (1 + 0.6 * (margins.mean() - 0.3))
    assert found.mean().item() == pytest.approx(np.log1p(np.exp(-beta * margins)).mean(), rel=1e-12)
    far = replace(batch, gap_mean=t([300.0] * 3))
    low = FILTERED.fn(far, beta=0.1, filter_share=0.0)
    close(low, np.log1p(np.exp(-1e-3 * np.array([1.2, -1.4, 0.85]))).tolist(), 1e-12)  # beta is at least 1e-3


def test_pairs_are_kept_with_gaussian_weights():
    """One of two pairs stays, with chances exp(-z^2 / 2): z = 0 and z = 1.5."""
    draws = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin, mean, sd = t([0.2, 3.2]), t([0.2, 0.2]), t([2.0, 2.0])
    first = np.mean([kept_pairs(margin, mean, sd, draw, 0.5)[0].item() for draw in draws])
    chance = 1 / (1 + np.exp(-0.5 * 1.5**2))
    assert first == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 4000))
    assert kept_pairs(margin, mean, sd, draws[0], 0.99).sum() == 1


def test_statistics_are_those_of_earlier_batches():
    """First its own; then m = mean of the first; then .9 of that and .1 of the second batch."""
    model, batches = tiny.causal_lm(), [[1.0, 3.0], [5.0, 5.0], [0.0, 0.0]]
    with heads_on(model, FILTERED.needs):
        found = [[value.item() for value in follow_gap(model, torch.tensor(batch))] for batch in batches]
        assert "objective_heads.gap.state" in model.state_dict()
    assert found[0] == pytest.approx([2.0, 1.0])
    assert found[1] == pytest.approx([2.0, 1.0])
    assert found[2] == pytest.approx([0.9 * 2 + 0.1 * 5, 0.9 * 1.0])
