"""What every pair loss must satisfy, run over the whole registry: a new loss is covered by being registered."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from prefopt.batch import PairBatch
from prefopt.losses import LOSSES

# Fields that each need provides; a loss that does not declare the need must work without them.
FIELDS = {
    "reference": ["ref_chosen_logp", "ref_rejected_logp", "ref_chosen_token_logp", "ref_rejected_token_logp"],
    "dispersion": ["dispersion_weight", "neg_log_dispersion"],
    "rewards": ["chosen_reward", "rejected_reward"],
    "tokens": [
        "chosen_token_logp",
        "rejected_token_logp",
        "chosen_mask",
        "rejected_mask",
        "ref_chosen_token_logp",
        "ref_rejected_token_logp",
    ],
    "vote_share": ["vote_share"],
    "subset": ["chosen_subset", "rejected_subset"],
    "diff": ["chosen_diff", "rejected_diff"],
    "second_reference": ["other_ref_chosen_logp", "other_ref_rejected_logp"],
    "win_rates": ["chosen_win_rate", "rejected_win_rate"],
    "auxiliary": ["auxiliary_reward", "value"],
    "reward_head": ["head_margin"],
    "responsibilities": ["agreeing", "opposing"],
    "advantages": ["chosen_advantage", "rejected_advantage"],
    "gap_state": ["gap_mean", "gap_sd", "keep_draw"],
}
# Losses that hold a statistic of the policy fixed, which differences would see: the settings that switch it off.
DETACHED = {
    "kto": {"reference_kl": 0.4},
    "beta_dpo": {"sensitivity": 0.0},
    "beta_dpo_filtered": {"sensitivity": 0.0},
    "bmc": {"diff_cap": 0.0},
    "bmc_own_weights": {"diff_cap": 0.0},
    "focal_dpo_detached": {"gamma": 0.0},
    "drdo": {"focus": 0.0},
    "drdo_odds": {"focus": 0.0},
    "spo_mu": {"likelihood_power": 0.0},
}
PAIRS, MEMBERS, WIDTH = 7, 3, 9
ENSEMBLES = ["distill_ensemble", "distill_ensemble_batch", "distill_smallest", "distill_mean"]


def random_batch(seed: int = 0, pairs: int = PAIRS, dtype: torch.dtype = torch.float64) -> PairBatch:
    """Policy log-probabilities are leaves with gradient; sums agree with the token log-probabilities."""
    gen = torch.Generator().manual_seed(seed)
    values = {"pair_id": torch.arange(pairs) + 1000 * seed}
    for side in ("chosen", "rejected"):
        lengths = torch.randint(1, WIDTH + 1, (pairs,), generator=gen)
        mask = (torch.arange(WIDTH) < lengths[:, None]).to(dtype)
        policy, ref = (-0.05 - 2 * torch.rand(pairs, WIDTH, generator=gen, dtype=dtype) * mask for _ in range(2))
        policy, ref = policy * mask, ref * mask
        values |= {
            f"{side}_token_logp": policy.requires_grad_(),
            f"ref_{side}_token_logp": ref,
            f"{side}_mask": mask,
            f"{side}_tokens": lengths,
            f"{side}_logp": policy.detach().sum(1).requires_grad_(),
            f"ref_{side}_logp": ref.sum(1),
            f"{side}_reward": torch.randn(pairs, MEMBERS, generator=gen, dtype=dtype),
        }
    weight = 0.2 + 2 * torch.rand(pairs, generator=gen, dtype=dtype)
    # Drawn last, so that everything above is the same whatever methods need beside it.
    shorter = torch.minimum(values["chosen_tokens"], values["rejected_tokens"])
    for side in ("chosen", "rejected"):
        mask = values[f"{side}_mask"]
        order = (torch.rand(pairs, WIDTH, generator=gen) + 2 * (1 - mask)).argsort(1).argsort(1)
        values |= {
            f"{side}_subset": (order < shorter[:, None]).to(dtype),
            f"{side}_diff": (torch.rand(pairs, WIDTH, generator=gen) < 0.5).to(dtype) * mask,
            f"other_ref_{side}_logp": values[f"ref_{side}_logp"] * (0.8 + 0.4 * torch.rand(pairs, generator=gen)),
            f"{side}_win_rate": torch.rand(pairs, generator=gen, dtype=dtype),
        }
        values[f"other_ref_{side}_logp"] = values[f"other_ref_{side}_logp"].to(dtype)
    for name in ("auxiliary_reward", "value", "head_margin", "vote_share", "agreeing", "opposing"):
        values[name] = torch.rand(pairs, generator=gen, dtype=dtype)
    for side in ("chosen", "rejected"):
        values[f"{side}_advantage"] = torch.randn(pairs, generator=gen, dtype=dtype)
    mean, sd = torch.rand(2, generator=gen, dtype=dtype)
    values |= {"gap_mean": mean.expand(pairs), "gap_sd": 1 + sd.expand(pairs)}
    values["keep_draw"] = torch.rand(pairs, generator=gen, dtype=dtype)
    return PairBatch(**values, dispersion_weight=weight, neg_log_dispersion=0.7 * weight)


def take(batch: PairBatch, rows) -> PairBatch:
    return replace(batch, **{f.name: getattr(batch, f.name)[rows] for f in fields(batch)})


def joined(first: PairBatch, second: PairBatch) -> PairBatch:
    return replace(
        first, **{f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(first)}
    )


def swapped(batch: PairBatch) -> PairBatch:
    def other(name: str) -> str:
        return name.replace("chosen", "rejected") if "chosen" in name else name.replace("rejected", "chosen")

    return replace(batch, **{f.name: getattr(batch, other(f.name)) for f in fields(batch) if "chosen" in f.name
                             or "rejected" in f.name})  # fmt: skip


def without(batch: PairBatch, names) -> PairBatch:
    return replace(batch, **dict.fromkeys(names))


def margin_batch(margins, lam=1.0, reward=0.3, dtype=torch.float64) -> PairBatch:
    """Pairs whose margin is as given, one token each, policy moving away from a reference at -1 nat."""
    margins = torch.as_tensor(margins, dtype=dtype)
    rows, ones = len(margins), torch.ones_like(margins)
    # Log-probabilities stay below zero: a positive margin lowers the rejected response, a negative one the chosen.
    chosen = (-ones - (-margins).clamp(min=0)).requires_grad_()
    rejected = (-ones - margins.clamp(min=0)).requires_grad_()
    count = torch.ones(rows, dtype=torch.long)
    rewards = torch.full((rows, MEMBERS), reward, dtype=dtype)
    scale = ones * lam
    return PairBatch(
        pair_id=torch.arange(rows),
        chosen_logp=chosen,
        rejected_logp=rejected,
        chosen_tokens=count,
        rejected_tokens=count,
        ref_chosen_logp=-ones,
        ref_rejected_logp=-ones,
        dispersion_weight=scale,
        neg_log_dispersion=scale,
        chosen_reward=rewards,
        rejected_reward=0 * rewards,
        chosen_token_logp=chosen[:, None],
        rejected_token_logp=rejected[:, None],
        chosen_mask=ones[:, None],
        rejected_mask=ones[:, None],
        ref_chosen_token_logp=-ones[:, None],
        ref_rejected_token_logp=-ones[:, None],
        chosen_subset=ones[:, None],
        rejected_subset=ones[:, None],
        chosen_diff=ones[:, None],
        rejected_diff=ones[:, None],
        other_ref_chosen_logp=-ones,
        other_ref_rejected_logp=-ones,
        chosen_win_rate=0.7 * ones,
        rejected_win_rate=0.4 * ones,
        auxiliary_reward=0.5 * ones,
        value=0.2 * ones,
        head_margin=0.1 * ones,
        vote_share=0.75 * ones,
        agreeing=0.6 * ones,
        opposing=0.2 * ones,
        chosen_advantage=0.15 * ones,
        rejected_advantage=-0.15 * ones,
        gap_mean=0.1 * ones,
        gap_sd=ones,
        keep_draw=torch.linspace(0.1, 0.9, rows, dtype=dtype),
    )


@pytest.fixture(params=sorted(LOSSES))
def entry(request):
    return LOSSES[request.param]


def value(entry, batch, beta=0.3):
    return entry.fn(batch, beta=beta)


def test_core_names_are_there():
    baselines = {"dpo", "ipo", "slic_hinge", "cdpo", "robust_dpo", "simpo", "rdpo", "dpop", "cpo", "orpo", "kto"}
    dispersion = {"mallows_theta", "mallows_phi", "mallows_phi_sigmoid", "mallows_ipo", "mallows_simpo"}
    rewards = {"distill", "distill_ensemble", "distill_mean", "mallows_distill"}
    assert baselines | dispersion | rewards <= set(LOSSES)


def test_only_beta_is_required(entry):
    entry.check_params({"beta": 0.1})
    assert entry.paper
    assert entry.equation
    assert entry.fn.__doc__


def test_one_value_per_pair_in_the_policy_dtype(entry):
    for dtype in (torch.float32, torch.float64):
        out = value(entry, random_batch(dtype=dtype))
        assert out.shape == (PAIRS,)
        assert out.dtype is dtype
        assert out.isfinite().all()


def test_permutation(entry):
    batch, order = random_batch(1), torch.randperm(PAIRS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(value(entry, take(batch, order)), value(entry, batch)[order], rtol=1e-12, atol=1e-14)


def test_concatenation_unless_pairs_are_coupled(entry):
    first, second = random_batch(1), random_batch(2, pairs=4)
    together = value(entry, joined(first, second))
    apart = torch.cat([value(entry, first), value(entry, second)])
    assert torch.allclose(together, apart, rtol=1e-12, atol=1e-14) is not entry.couples_pairs


def test_works_without_the_fields_of_undeclared_needs(entry):
    batch = random_batch(4)
    extra = {name for need, names in FIELDS.items() if need not in entry.needs for name in names}
    torch.testing.assert_close(value(entry, without(batch, extra)), value(entry, batch), rtol=0, atol=0)


def test_fails_without_the_fields_of_a_declared_need(entry):
    for need in entry.needs:
        with pytest.raises((TypeError, AttributeError)):
            value(entry, without(random_batch(4), FIELDS[need]))


def test_each_declared_need_changes_the_value(entry):
    batch = random_batch(5)
    for need in entry.needs:
        moved = {name: getattr(batch, name).roll(1, 0) for name in FIELDS[need] if "mask" not in name}
        assert not torch.allclose(value(entry, replace(batch, **moved)), value(entry, batch)), need


def leaves_of(entry) -> list[str]:
    """The fields through which the policy enters this loss."""
    kind = "token_logp" if "tokens" in entry.needs else "logp"
    return [f"chosen_{kind}", f"rejected_{kind}"]


def test_the_policy_receives_gradient(entry):
    batch = random_batch(6)
    value(entry, batch).sum().backward()
    assert any(getattr(batch, name).grad.abs().sum() > 0 for name in leaves_of(entry))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_gradient_against_finite_differences(entry, scale):
    batch = random_batch(7)
    names = leaves_of(entry)
    start = [(scale * getattr(batch, name)).detach().requires_grad_() for name in names]
    frozen = DETACHED.get(entry.name, {})

    def total(*leaves):
        return entry.fn(replace(batch, **dict(zip(names, leaves, strict=True))), beta=0.3, **frozen).sum()

    grads = torch.autograd.grad(total(*start), start)
    for leaf, grad in zip(start, grads, strict=True):
        step = 1e-6 * scale
        for index in torch.nonzero(torch.ones_like(leaf)).tolist():
            moved = []
            for sign in (1, -1):
                shifted = leaf.detach().clone()
                shifted[tuple(index)] += sign * step
                moved.append(total(*[shifted if x is leaf else x.detach() for x in start]).item())
            difference = (moved[0] - moved[1]) / (2 * step)
            assert grad[tuple(index)].item() == pytest.approx(difference, rel=2e-6, abs=2e-7)


@pytest.mark.parametrize("lam", [1e-8, 1e-6, 1e-4, 0.049, 0.3, 1.0, 7.0, 50.0])
@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_finite_values_and_gradients_far_out(entry, lam, beta):
    margins = [sign * size for size in (0, 1e-9, 1e-3, 0.05, 0.0999, 0.1, 0.5, 1, 30, 1e3, 1e4) for sign in (1, -1)]
    batch = margin_batch(margins, lam)
    out = value(entry, batch, beta)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), [batch.chosen_logp, batch.rejected_logp], allow_unused=True)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)


def test_finite_in_single_precision(entry):
    batch = margin_batch([0, 1e4, -1e4, 0.1, -0.1, 3], 5.0, dtype=torch.float32)
    out = value(entry, batch, 1.0)
    grads = torch.autograd.grad(out.sum(), [batch.chosen_logp, batch.rejected_logp], allow_unused=True)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads if grad is not None)


LINKS = [
    *("dpo", "mallows_theta", "mallows_phi", "mallows_phi_adaptive", "mallows_phi_sigmoid", "dpo_mean", "ld_dpo"),
    *("temporal_decay", "temporal_decay_from_one", "sampo", "sampo_expected", "bmc", "bmc_own_weights"),
    *("mrpo", "mrpo_crossed", "mrpo_fixed", "mrpo_unclipped", "uncertainty_mul", "uncertainty_lcb"),
]


@pytest.mark.parametrize("name", LINKS)
def test_a_pair_and_its_swap_have_probabilities_that_sum_to_one(name):
    batch = random_batch(8)
    both = torch.exp(-value(LOSSES[name], batch)) + torch.exp(-value(LOSSES[name], swapped(batch)))
    torch.testing.assert_close(both, torch.ones_like(both), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LINKS)
def test_links_fall_with_the_margin(name):
    margins = torch.linspace(-60, 60, 2001, dtype=torch.float64)
    for lam in (1e-8, 0.04, 0.06, 1.0, 5.0):
        out = value(LOSSES[name], margin_batch(margins, lam), 0.1)
        assert (out.diff() < 0).all()


@pytest.mark.parametrize("name", ["distill", *ENSEMBLES, "mallows_distill", "silver_soft"])
def test_distillation_does_not_see_labels(name):
    batch = random_batch(9)
    torch.testing.assert_close(value(LOSSES[name], swapped(batch)), value(LOSSES[name], batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["distill", *ENSEMBLES, "mallows_distill"])
def test_distillation_rests_where_the_margins_agree(name):
    # beta * c * margin = reward margin, c = 1: no loss and no gradient.
    beta, batch = 0.25, random_batch(10)
    rewards = (beta * batch.margin.detach())[:, None].expand(-1, MEMBERS)
    target = replace(
        batch,
        chosen_reward=rewards + 5,
        rejected_reward=torch.full_like(rewards, 5.0),
        dispersion_weight=torch.ones(PAIRS, dtype=torch.float64),
    )
    out = value(LOSSES[name], target, beta)
    grads = torch.autograd.grad(out.sum(), [batch.chosen_logp, batch.rejected_logp])
    for tensor in (out, *grads):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-14)


def constant(batch: PairBatch, c: float) -> PairBatch:
    scale = torch.full((PAIRS,), c, dtype=torch.float64)
    return replace(batch, dispersion_weight=scale, neg_log_dispersion=scale)


@pytest.mark.parametrize(
    ("scaled", "plain"),
    [
        ("mallows_theta", "dpo"),
        ("mallows_ipo", "ipo"),
        ("mallows_ipo_scaled", "ipo_scaled"),
        ("mallows_simpo", "simpo"),
        ("mallows_distill", "distill_mean"),
        ("mallows_phi_sigmoid", "dpo"),
    ],
)
def test_constant_dispersion_is_the_plain_method(scaled, plain):
    batch = random_batch(11)
    torch.testing.assert_close(
        value(LOSSES[scaled], constant(batch, 1.0)), value(LOSSES[plain], batch), rtol=1e-13, atol=0
    )


def test_constant_dispersion_is_dpo_at_another_beta():
    batch = random_batch(12)
    torch.testing.assert_close(
        value(LOSSES["mallows_theta"], constant(batch, 2.5), 0.2), value(LOSSES["dpo"], batch, 0.5), rtol=1e-12, atol=0
    )


def test_sigmoid_substitute_meets_the_phi_link_at_one():
    # s = beta * margin = +-1: G(1) = 1 / (1 + phi) = sigmoid(lambda).
    batch = margin_batch([2.0, -2.0], 1.3)
    torch.testing.assert_close(
        value(LOSSES["mallows_phi"], batch, 0.5), value(LOSSES["mallows_phi_sigmoid"], batch, 0.5), rtol=1e-12, atol=0
    )


def test_phi_one_carries_no_preference():
    # lambda -> 0: g -> 1/2 whatever the margin, as long as lambda * margin stays small.
    out = value(LOSSES["mallows_phi"], margin_batch([-5.0, 0.0, 5.0], 1e-12), 1.0)
    torch.testing.assert_close(out, torch.full_like(out, math.log(2)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_one_member_is_plain_distillation(name):
    batch = random_batch(13)
    single = replace(batch, chosen_reward=batch.chosen_reward[:, :1], rejected_reward=batch.rejected_reward[:, :1])
    torch.testing.assert_close(value(LOSSES[name], single), value(LOSSES["distill"], single), rtol=1e-13, atol=0)


def test_the_ensemble_minimum_is_below_every_member_and_equals_one():
    batch = random_batch(14)
    both = batch.chosen_reward, batch.rejected_reward
    single = [replace(batch, chosen_reward=both[0][:, k:], rejected_reward=both[1][:, k:]) for k in range(MEMBERS)]
    members = torch.stack([value(LOSSES["distill"], member) for member in single])
    torch.testing.assert_close(value(LOSSES["distill_ensemble"], batch), members.min(0).values, rtol=1e-13, atol=0)
    best = members.mean(1).argmin()
    torch.testing.assert_close(value(LOSSES["distill_ensemble_batch"], batch), members[best], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("name", "params", "other"),
    [
        ("cdpo", {"label_smoothing": 0.0}, "dpo"),
        ("robust_dpo", {"label_smoothing": 0.0}, "dpo"),
        ("rdpo", {"length_weight": 0.0}, "dpo"),
        ("dpop", {"penalty_weight": 0.0}, "dpo"),
        ("dpo_nll", {"nll_weight": 0.0}, "dpo"),
        ("beta_dpo", {"sensitivity": 0.0}, "dpo"),
        ("ld_dpo", {"tail_weight": 1.0}, "dpo"),
        ("temporal_decay", {"decay": 1.0}, "dpo"),
        ("temporal_decay_from_one", {"decay": 1.0}, "dpo"),
        ("temporal_decay_free", {"decay": 1.0}, "dpo_free"),
        ("focal_dpo", {"gamma": 0.0}, "dpo"),
        ("focal_dpo_detached", {"gamma": 0.0}, "dpo"),
        ("bmc", {"diff_cap": 0.0}, "dpo"),
        ("bmc_own_weights", {"diff_cap": 0.0}, "dpo"),
        ("mrpo", {"clip": 0.0}, "dpo"),
        ("mrpo_crossed", {"clip": 0.0}, "dpo"),
        ("mrpo_fixed", {"second_weight": 0.0}, "dpo"),
        ("mrpo_unclipped", {"second_weight": 0.0}, "dpo"),
        ("uncertainty_lcb", {"penalty": 0.0}, "dpo"),
        ("uncertainty_att", {"penalty": 0.0}, "dpo"),
        ("spo_mu", {"likelihood_power": 0.0}, "spo"),
        ("composed", {}, "dpo"),
    ],
)
def test_switched_off_variants_are_dpo(name, params, other):
    batch = random_batch(15)
    if other == "dpo_free":
        expected = LOSSES["composed"].fn(batch, beta=0.3, reference="none")
    else:
        expected = LOSSES[other].fn(batch, beta=0.3)
    torch.testing.assert_close(LOSSES[name].fn(batch, beta=0.3, **params), expected, rtol=1e-12, atol=0)


def test_identities_between_baselines():
    batch, beta, eps = random_batch(16), 0.3, 0.2
    # robust * (1 - 2 eps) + 2 eps * (-log sigmoid(-beta margin)) = cdpo
    robust = LOSSES["robust_dpo"].fn(batch, beta=beta, label_smoothing=eps)
    rebuilt = robust * (1 - 2 * eps) + 2 * eps * LOSSES["dpo"].fn(swapped(batch), beta=beta)
    smoothed = LOSSES["cdpo"].fn(batch, beta=beta, label_smoothing=eps)
    torch.testing.assert_close(rebuilt, smoothed, rtol=1e-12, atol=0)
    # beta^2 * ipo = ipo_scaled, and distill with reward margin 1/2 is ipo_scaled.
    scaled = value(LOSSES["ipo_scaled"], batch)
    torch.testing.assert_close(beta**2 * value(LOSSES["ipo"], batch), scaled, rtol=1e-12, atol=0)
    half = torch.full((PAIRS, 1), 0.5, dtype=torch.float64)
    target = replace(batch, chosen_reward=half, rejected_reward=0 * half)
    torch.testing.assert_close(value(LOSSES["distill"], target), scaled, rtol=1e-12, atol=0)


def test_padding_does_not_count():
    # NaN and -inf beyond the mask must reach neither the value nor the gradient.
    for name in sorted(name for name, entry in LOSSES.items() if entry.needs >= {"tokens", "reference"}):
        batch = random_batch(17)
        spoilt = {
            "chosen_token_logp": batch.chosen_token_logp.detach().masked_fill(batch.chosen_mask == 0, -torch.inf),
            "ref_rejected_token_logp": batch.ref_rejected_token_logp.masked_fill(batch.rejected_mask == 0, torch.nan),
        }
        leaf = spoilt["chosen_token_logp"].requires_grad_()
        out = value(LOSSES[name], replace(batch, **spoilt))
        torch.testing.assert_close(out, value(LOSSES[name], batch), rtol=1e-13, atol=0)
        assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()
