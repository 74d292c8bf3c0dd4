"""The related methods against their vectors (float64), their reductions to DPO, and what each promises."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from loss_batches import close, t, three_pairs
from prefopt.errors import BadInput
from prefopt.losses import LOSSES, STEPS, get_loss, reverse_kl
from prefopt.losses.addons import expectile_loss
from prefopt.losses.margin import spread
from prefopt.losses.reference import harmonic_weight
from prefopt.losses.weights import density_ratios
from test_loss_battery import random_batch, take, value

BETA = {"beta": 0.1}

# name, parameters beside beta = .1, value per pair, d/d chosen_logp, d/d rejected_logp ("-": minus the former)
VECTORS = [
    ("temporal_decay_from_one", {}, [0.6385068969699038, 0.7620370496017809, 0.6533388015033199], None, None),
    ("focal_dpo", {"gamma": 0.05}, [0.6151048929056958, 0.7368422223533166, 0.6306661803296186],
     [-0.04408918887, -0.04951440137, -0.04483202322], "-"),
    ("focal_dpo", {"gamma": 1.0}, [0.3364986086537307, 0.3560454406987754, 0.3396121250356473],
     [-0.0090935713, -0.005831499393, -0.008695533389], "-"),
    ("focal_dpo", {"gamma": 2.0}, [0.1783321660552721, 0.16558144404121808, 0.17701847822235886],
     [0.003562986986, 0.006145682601, 0.003942550357], "-"),
    ("focal_dpo_detached", {"gamma": 0.05}, [0.6151048929056958, 0.7368422223533166, 0.6306661803296186],
     [-0.04553479592592519, -0.05148524411286381, -0.04634172070475973], "-"),
    ("minor_dpo", {}, [0.6684596480132863, 0.7655951823371514, 0.7057253035255249],
     [-0.04875026035, -0.05349429452, -0.05062496745], [0, 0.05349429452, 0]),
    ("bmc", {"diff_cap": 2.0}, [0.5715734864417373, 0.8989783633254078, 0.5906304393429487], None, None),
    ("bmc_own_weights", {"diff_cap": 2.0}, [0.5715734864417372, 0.9074416731075209, 0.5922459473052338], None, None),
    ("sampo", {}, [0.6443966600735709, 0.749658918622423, 0.651550033812573], None, None),
    ("sampo_expected", {}, [0.645981448280687, 0.748604472522456, 0.651550033812573], None, None),
    # The published value has no value loss; that of expectile .7 is the vector .028, .012, .112.
    ("hpo", {"advantage_weight": 0.5, "advantage_temperature": 1.0, "expectile": 0.7},
     [1.2456474806756983 + 0.028, 1.2568336341839406 + 0.012, 1.136393060545986 + 0.112], None, None),
    ("mrpo_unclipped", {"second_weight": 0.5}, [0.6117553388706229, 0.8017565147170712, 0.6231660376206799],
     None, None),
    ("mrpo_fixed", {"second_weight": 0.5, "clip": 0.1}, [0.6232271737439297, 0.7761143610700394, 0.642775970491353],
     [-0.04637888043, -0.05398093234, -0.04741692944], "-"),
    ("mrpo", {"clip": 0.1}, [0.6316155414392136, 0.7729400930222701, 0.6458665508398957],
     [-0.04682679285, -0.0538346234, -0.04757919077], "-"),
    ("mrpo_crossed", {"clip": 0.1}, [0.6146372716858035, 0.7794162663212771, 0.6395819129039992],
     [-0.04591629634, -0.05413263236, -0.04724870757], "-"),
    ("uncertainty_mul", {"temperature": 1.0}, [0.6491190136077581, 0.748676359536893, 0.6638315347035004],
     [-0.03584566168, -0.03788847864, -0.04120347568], [0.03584566168, 0.0444632462, 0.03561266431]),
    ("uncertainty_lcb", {"penalty": 0.1}, [0.6349461015956135, 0.7741869550191225, 0.6445951787773655],
     [-0.04700359482, -0.05389214938, -0.04751250204], "-"),
    ("uncertainty_att", {"penalty": 0.1}, [0.6083991975153789, 0.7391619262860845, 0.6292105860221665],
     [-0.04557786369, -0.05224860602, -0.04669875976], "-"),
    ("uncertainty_weight", {}, [0.3585228906776309, 0.5205012644562674, 0.4684226688645271], None, None),
    ("drdo_attached", {"focus": 2.0}, [0.07321635209696906, 0.11474399097605195, 0.036224549653685365],
     [-0.01442121537, -0.02059696916, -0.005257609169], [0.007763692678, 0.03876167225, 0.003625049149]),
    ("drdo", {"focus": 2.0}, [0.07321635209696906, 0.11474399097605195, 0.036224549653685365],
     [-0.005840426889, -0.008534578006, -0.002321102993], [0.002043167022, 0.01865768699, 0.0006885429729]),
    ("drdo_odds_attached", {"focus": 2.0}, [0.037581762758309184, 0.07526947311833902, 0.015675914747060062],
     [-0.00861471547, -0.01880028505, -0.00064913655], [0.00552031573, 0.04386064202, -0.001197546563]),
    ("drdo_odds", {"focus": 2.0}, [0.037581762758309184, 0.07526947311833902, 0.015675914747060062],
     [-0.009239419297, -0.01221309003, -0.004856329079], [0.005936784948, 0.03288198367, 0.003009645966]),
    ("spo", {"beta": 0.5}, [1.3532387927052052, 1.7279264210182537, 1.0160352059554534],
     [-0.1229168595, -0.1157023358, -0.09957820495], [0.08194457303, 0.1928372264, 0.09957820495]),
    ("spo_sum", {"beta": 0.5}, [0.5265649346760622, 4.520369206022218, 0.3513488748298649], None, None),
    ("spo_mu", {"beta": 0.5, "likelihood_power": 0.5}, [1.1418907884884753, 1.6104124817507768, 0.8803958273364922],
     None, None),
]  # fmt: skip


@pytest.fixture
def fixture():
    return three_pairs()


def gradients(loss, batch, names=("chosen_logp", "rejected_logp")):
    leaves = [getattr(batch, name) for name in names]
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize(
    ("name", "params", "expected", "chosen", "rejected"), VECTORS, ids=[f"{r[0]}{list(r[1].values())}" for r in VECTORS]
)
def test_three_pair_vectors(fixture, name, params, expected, chosen, rejected):  # noqa: PLR0917
    params = BETA | params
    LOSSES[name].check_params(params)
    actual = LOSSES[name].fn(fixture, **params)
    close(actual, expected, 1e-12)
    if chosen is not None:
        rejected = [-g for g in chosen] if rejected == "-" else rejected
        for found, want in zip(gradients(actual, fixture), (chosen, rejected), strict=True):
            torch.testing.assert_close(found, t(want), rtol=2e-9, atol=1e-12)  # published with ten digits


def test_capo_regresses_to_the_difference_of_win_rates(fixture):
    # Pair 0: target .6982889... - .2381218... = .4601671..., beta * D = .12.
    assert LOSSES["capo"].fn(fixture, beta=0.1)[0].item() == pytest.approx(0.11571366149361084, rel=1e-12)


def test_apo_down_by_hand(fixture):
    # aw = [.5, -.8, -.25], D = [1.2, -1.4, .85]: sigmoid(.1 aw) + sigmoid(-.1 D).
    sides = zip([0.5, -0.8, -0.25], [1.2, -1.4, 0.85], strict=True)
    expected = [1 / (1 + math.exp(-0.1 * a)) + 1 / (1 + math.exp(0.1 * d)) for a, d in sides]
    close(LOSSES["apo_down"].fn(fixture, beta=0.1), expected, 1e-12)


def test_expectile_value_loss_vector(fixture):
    close(expectile_loss(fixture.auxiliary_reward, fixture.value, 0.7), [0.028, 0.012, 0.112], 1e-12)


def test_the_expectile_of_a_sample_minimises_the_value_loss():
    rewards = t([-1.0, 0.0, 2.0, 5.0])
    grid = torch.linspace(-1, 5, 6001, dtype=torch.float64)
    for expectile in (0.1, 0.5, 0.9):
        best = grid[torch.stack([expectile_loss(rewards, v, expectile).mean() for v in grid]).argmin()]
        # First-order condition: expectile * mean of what lies above = (1 - expectile) * mean of what lies below.
        above, below = (rewards - best).clamp(min=0).mean(), (best - rewards).clamp(min=0).mean()
        assert (expectile * above).item() == pytest.approx(((1 - expectile) * below).item(), abs=1e-3)
    assert rewards.mean() == pytest.approx(1.5)
    assert grid[torch.stack([expectile_loss(rewards, v, 0.5).mean() for v in grid]).argmin()] == pytest.approx(1.5)


def test_density_ratio_vector():
    expected = [1.968189800962531, 0.5928073759945435, 1.3193170779880794, 0.11968574505484679]
    close(density_ratios(t([0.1, 0.7, 0.3, 1.5]), 0.5), expected, 1e-12)


def test_density_ratio_weighs_by_the_ensembles_expected_loss(fixture):
    risk = [sum(math.log1p(math.exp(-m)) for m in row) / 3 for row in fixture.reward_margin.tolist()]
    ratio = [math.exp(-r / 0.5) for r in risk]
    ratio = [3 * r / sum(ratio) for r in ratio]
    dpo = LOSSES["dpo"].fn(fixture, beta=0.1).tolist()
    close(LOSSES["density_ratio"].fn(fixture, beta=0.1), [r * x for r, x in zip(ratio, dpo, strict=True)], 1e-12)
    # Rejection: what lies at or below the threshold gets no loss, the others theirs.
    cut = sorted(ratio)[0] * 1.000001
    kept = LOSSES["density_ratio"].fn(fixture, beta=0.1, reject_below=cut)
    close(kept, [r * x * (r > cut) for r, x in zip(ratio, dpo, strict=True)], 1e-12)
    assert (kept == 0).sum() == 1


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("temporal_decay_from_one", [1.1243956771264005, -1.33338254336, 0.81267401600]),
        ("temporal_decay", [1.1473425276800004, -1.360594432, 0.8292592000000002]),
        ("bmc", [2.6000000000000014, -3.7644237600781016, 2.167563936464995]),
        ("bmc_own_weights", [2.600000000000005, -3.9067287197656926, 2.131379848120515]),
        ("sampo", [1.0000000000000004, -1.1, 0.8500000000000001]),
        ("sampo_expected", [0.9666666666666672, -1.08, 0.8500000000000001]),
    ],
)
def test_intermediate_margins(fixture, name, margin):
    made = LOSSES[name].combination
    close(made.aggregation.fn(fixture, made.reference.fn(fixture)).difference, margin, 1e-12)


def test_intermediate_references(fixture):
    plain = STEPS["reference"]["harmonic"].fn(fixture)
    close(plain.chosen, [-4.780929803620161, -4.94434076992594, -2.662345300903392], 1e-12)
    close(plain.rejected, [-5.480929803620161, -2.7100388683255123, -4.510038868325513], 1e-12)
    clipped = STEPS["reference"]["harmonic_clipped"].fn(fixture)
    close(clipped.chosen, [-4.610258759271295, -5.045428108146327, -2.394545385230238], 1e-12)
    close(clipped.rejected, [-5.559270562137222, -2.3411786531673577, -4.660396491084109], 1e-12)
    close(1 - harmonic_weight(fixture), [0.8571428571428571, 0.6444444444444445, 0.6712328767123289], 1e-12)


def test_intermediate_uncertainties(fixture):
    close(spread(fixture.chosen_reward), [0.2867441755680875, 0.32998316455372223, 0.16329931618554527], 1e-12)
    close(spread(fixture.rejected_reward), [0.28674417556808757, 0.16996731711975951, 0.3091206165165235], 1e-12)
    close(spread(fixture.reward_margin), [0.5715476066494082, 0.3858612300930075, 0.3299831645537222], 1e-12)


def test_spo_weight_vector(fixture):
    ratio = value(LOSSES["spo_mu"], fixture, 0.5) / value(LOSSES["spo"], fixture, 0.5)
    close(ratio, [0.8438206136595946, 0.931991352271686, 0.8665013005219545], 1e-12)
    # The weight is held fixed: the gradient is weight times that of spo.
    weighted = gradients(value(LOSSES["spo_mu"], fixture, 0.5), fixture)
    plain = gradients(value(LOSSES["spo"], fixture, 0.5), fixture)
    for found, one in zip(weighted, plain, strict=True):
        torch.testing.assert_close(found, (ratio * one).detach(), rtol=1e-12, atol=0)


# --- reductions -------------------------------------------------------------------------------------------------------


def equal_lengths(seed=0):
    """Pairs whose responses have equally many tokens, the subset being all of them."""
    batch = random_batch(seed)
    values = {}
    mask = batch.chosen_mask
    for side in ("chosen", "rejected"):
        policy, ref = (getattr(batch, f"{p}{side}_token_logp").detach() for p in ("", "ref_"))
        policy, ref = (torch.where(x == 0, -0.7 - 0.01 * torch.arange(x.shape[1]), x) * mask for x in (policy, ref))
        values |= {
            f"{side}_token_logp": policy,
            f"ref_{side}_token_logp": ref,
            f"{side}_mask": mask,
            f"{side}_subset": mask,
            f"{side}_tokens": batch.chosen_tokens,
            f"{side}_logp": policy.sum(1),
            f"ref_{side}_logp": ref.sum(1),
        }
    return replace(batch, **values)


@pytest.mark.parametrize("name", ["ld_dpo", "sampo", "sampo_expected"])
def test_length_aware_sums_are_dpo_at_equal_lengths(name):
    batch = equal_lengths()
    torch.testing.assert_close(value(LOSSES[name], batch), value(LOSSES["dpo"], batch), rtol=1e-12, atol=0)
    unequal = random_batch(0)
    assert not torch.allclose(value(LOSSES[name], unequal), value(LOSSES["dpo"], unequal))


def test_the_expected_subset_is_the_mean_over_all_subsets():
    # Pair 0 has 4 and 6 tokens: all 15 subsets of 4 of the 6 rejected ones, the chosen ones all.
    batch = replace(three_pairs(), vote_share=torch.ones(3))
    batch = take(batch, [0])
    aggregate = STEPS["aggregation"]["subset"].fn
    reference = STEPS["reference"]["single"].fn(batch)
    margins = []
    for places in combinations(range(6), 4):
        mask = t([[float(n in places) for n in range(6)]])
        margins.append(aggregate(replace(batch, rejected_subset=mask), reference).difference.item())
    expected = STEPS["aggregation"]["expected_subset"].fn(batch, reference).difference.item()
    assert sum(margins) / 15 == pytest.approx(expected, rel=1e-12)


def test_decay_from_one_is_decay_from_zero_at_a_smaller_beta():
    batch = random_batch(3)
    from_one = LOSSES["temporal_decay_from_one"].fn(batch, beta=0.3, decay=0.9)
    torch.testing.assert_close(from_one, LOSSES["temporal_decay"].fn(batch, beta=0.27, decay=0.9), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mrpo", "mrpo_crossed", "mrpo_fixed", "mrpo_unclipped"])
def test_two_equal_references_are_one(name):
    batch = random_batch(4)
    batch = replace(batch, other_ref_chosen_logp=batch.ref_chosen_logp, other_ref_rejected_logp=batch.ref_rejected_logp)
    torch.testing.assert_close(value(LOSSES[name], batch), value(LOSSES["dpo"], batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["uncertainty_mul", "uncertainty_lcb", "uncertainty_att", "uncertainty_weight"])
def test_without_uncertainty_the_penalties_are_dpo(name):
    batch = random_batch(5)
    sure = replace(batch, chosen_reward=batch.chosen_reward[:, :1], rejected_reward=batch.rejected_reward[:, :1])
    torch.testing.assert_close(value(LOSSES[name], sure), value(LOSSES["dpo"], sure), rtol=1e-12, atol=0)


def test_minor_is_dpo_where_the_rejected_response_rose_and_free_of_it_elsewhere():
    batch = random_batch(6, pairs=40)
    minor, rose = value(LOSSES["minor_dpo"], batch), (batch.rejected_logp > batch.ref_rejected_logp).detach()
    assert 5 < rose.sum() < 35
    torch.testing.assert_close(minor[rose], value(LOSSES["dpo"], batch)[rose], rtol=1e-12, atol=0)
    rejected = gradients(minor, batch)[1]
    assert (rejected[~rose] == 0).all()
    assert (rejected[rose] > 0).all()


def test_soft_labels_reduce_to_dpo_and_smoothing():
    batch, eps = random_batch(7), 0.2
    sure = torch.full_like(batch.chosen_reward, 60.0)
    certain = replace(batch, chosen_reward=sure, rejected_reward=0 * sure)
    torch.testing.assert_close(value(LOSSES["silver_soft"], certain), value(LOSSES["dpo"], batch), rtol=1e-12, atol=0)
    odds = torch.full_like(sure, math.log((1 - eps) / eps))  # sigmoid(odds) = 1 - eps
    smoothed = LOSSES["cdpo"].fn(batch, beta=0.3, label_smoothing=eps)
    actual = value(LOSSES["silver_soft"], replace(batch, chosen_reward=odds, rejected_reward=0 * odds))
    torch.testing.assert_close(actual, smoothed, rtol=1e-12, atol=0)


def test_spo_on_sums_is_dpo_without_a_reference_over_beta():
    batch = random_batch(8)
    free = LOSSES["composed"].fn(batch, beta=0.3, reference="none")
    torch.testing.assert_close(value(LOSSES["spo_sum"], batch), free / 0.3, rtol=1e-12, atol=0)


# --- promises ---------------------------------------------------------------------------------------------------------


def slope(name, margins, **params):
    """dL/dz at beta = 1, for margins that lie in the chosen response alone."""
    batch = random_batch(9, pairs=len(margins))
    shift = (margins - batch.margin).detach()
    batch = replace(batch, chosen_logp=(batch.chosen_logp + shift).detach().requires_grad_())
    return gradients(LOSSES[name].fn(batch, beta=1.0, **params), batch)[0]


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0, 2.0])
def test_the_focal_gradient_turns_round_where_p_is_below_exp_minus_one_over_gamma(gamma):
    turn = math.exp(-1 / gamma)
    p = t([turn * f for f in (0.5, 0.9, 1.1)] + [0.99])
    z = torch.logit(p)
    found = slope("focal_dpo", z, gamma=gamma)
    torch.testing.assert_close(found, -(p**gamma) * (1 - p) * (1 + gamma * p.log()), rtol=1e-7, atol=1e-12)
    assert (found.sign() == t([1, 1, -1, -1])).all()
    assert (slope("focal_dpo_detached", z, gamma=gamma) < 0).all()


def uncertain(batch, u):
    """Rewards of two members whose spread is u on both responses and on the margin 2 u."""
    zero = torch.zeros(len(batch.pair_id), 1, dtype=torch.float64)
    chosen, rejected = torch.cat([zero - u, zero + u], 1), torch.cat([zero + u, zero - u], 1)
    return replace(batch, chosen_reward=chosen, rejected_reward=rejected)


@pytest.mark.parametrize("name", ["uncertainty_mul", "uncertainty_att", "uncertainty_weight"])
def test_uncertainty_attenuates_the_gradient(name):
    batch = random_batch(10, pairs=60)
    small = batch.margin.detach().abs() * 0.3 < 1  # beyond that ``mul`` pulls a good margin back to where the slope is
    assert small.sum() > 30
    sizes = [gradients(value(LOSSES[name], uncertain(batch, u)), batch)[0].abs() for u in (0, 0.1, 0.5, 1.0, 3.0)]
    for less, more in pairwise(sizes):
        assert (more[small] < less[small]).all()


def test_lower_confidence_bounds_do_not_attenuate_in_general():
    # Only the rejected response uncertain: the shift lowers nothing but raises the margin; only the chosen one: the
    # margin falls and the gradient grows.
    batch, spread = random_batch(11), torch.tensor([[-1.0, 1.0]], dtype=torch.float64).expand(7, 2)
    sizes = {}
    for side in ("chosen", "rejected"):
        rewards = {f"{s}_reward": spread if s == side else 0 * spread for s in ("chosen", "rejected")}
        sizes[side] = gradients(value(LOSSES["uncertainty_lcb"], replace(batch, **rewards)), batch)[0].abs()
    plain = gradients(value(LOSSES["dpo"], batch), batch)[0].abs()
    assert (sizes["chosen"] > plain).all()
    assert (sizes["rejected"] < plain).all()


@pytest.mark.parametrize("name", ["drdo", "drdo_odds"])
def test_drdo_never_raises_the_rejected_response(name):
    for seed in range(20):
        chosen, rejected = gradients_of(name, seed)
        assert (rejected >= 0).all()
        assert (chosen <= 0).all()


def gradients_of(name, seed):
    batch = random_batch(seed)
    return gradients(value(LOSSES[name], batch), batch)


def test_drdo_with_the_gradient_through_q_can_raise_it():
    assert any((gradients_of("drdo_odds_attached", seed)[1] < 0).any() for seed in range(20))


def test_drdo_fits_the_head_to_the_mean_reward_margin(fixture):
    (head,) = gradients(LOSSES["drdo"].fn(fixture, beta=0.1), fixture, ["head_margin"])
    # Ensemble means 1.1, -1/30, 4/15 and head margins .9, -.2, .1.
    close(head, [-2 * (1.1 - 0.9), -2 * (-1 / 30 + 0.2), -2 * (4 / 15 - 0.1)], 1e-12)


def test_bmc_weighs_a_tokens_gradient_by_its_improbability_and_not_through_it():
    batch = random_batch(12)
    out = LOSSES["bmc"].fn(batch, beta=0.3, diff_cap=2.0)
    (found,) = gradients(out, batch, ["chosen_token_logp"])
    weight = 1 + batch.chosen_diff * torch.exp(-batch.chosen_token_logp.detach()).clamp(max=2.0)
    slope_of_pair = 0.3 * (1 - torch.exp(-out.detach()))
    torch.testing.assert_close(found, -slope_of_pair[:, None] * weight * batch.chosen_mask, rtol=1e-10, atol=1e-14)
    assert weight.max() == 3.0
    assert (batch.chosen_diff * (weight < 3)).sum() > 0  # both the cap and what is below it


def test_no_gradient_reaches_signals():
    batch = random_batch(13)
    fields = ["chosen_reward", "rejected_reward"]
    moved = replace(batch, **{name: getattr(batch, name).clone().requires_grad_() for name in fields})
    for name in ("uncertainty_mul", "uncertainty_lcb", "uncertainty_att", "uncertainty_weight", "density_ratio"):
        out = value(LOSSES[name], moved)
        found = torch.autograd.grad(out.sum(), [getattr(moved, f) for f in fields], allow_unused=True)
        assert all(g is None for g in found), name


def test_the_advantage_is_detached_and_the_value_head_learns_its_expectile_alone(fixture):
    head = replace(fixture, value=fixture.value.clone().requires_grad_())
    (found,) = gradients(LOSSES["hpo"].fn(head, beta=0.1, expectile=0.7), head, ["value"])
    # u = [.2, -.2, .4]: -2 * (.7, .3, .7) * u.
    close(found, [-0.28, 0.12, -0.56], 1e-12)


def test_reverse_kl_expectation_and_gradient_are_exact():
    logits, ref = t([1.0, 0.0, -1.0, 0.5]).requires_grad_(), t([0.1, 0.2, 0.3, 0.4])
    logp = torch.log_softmax(logits, 0)
    terms = reverse_kl(logp, ref.log())
    assert (terms >= 0).all()
    expectation, exact = (ref * terms).sum(), (logp.exp() * (logp - ref.log())).sum()
    torch.testing.assert_close(expectation, exact, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expectation, exact)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


# --- combinations -----------------------------------------------------------------------------------------------------


def test_every_declared_method_can_be_composed_by_name():
    batch = random_batch(14)
    for name, entry in LOSSES.items():
        made = entry.combination
        if made is None or name == "composed":
            continue
        steps = {
            "link": made.link.name,
            **{k: [s.name for s in getattr(made, k)] for k in ("margin", "addon", "weight")},
        }
        if made.link.reads != "nothing":
            steps |= {"aggregation": made.aggregation.name, "reference": made.reference.name}
        params = {k: v for k, v in made_defaults(entry).items() if v is not None}
        composed = get_loss("composed").form(steps)
        composed.check_params(BETA | steps | params)
        assert (composed.needs, composed.couples_pairs) == (entry.needs, entry.couples_pairs), name
        torch.testing.assert_close(composed.fn(batch, beta=0.3, **steps, **params), value(entry, batch), rtol=0, atol=0)


def made_defaults(entry):
    """The settings a method's own defaults amount to, under the steps' names."""
    own = {"slic_hf": {"hinge_at": 1.0, "nll_weight": 0.1}}
    return own.get(entry.name, {})


def test_a_free_combination_does_all_its_steps():
    # LD sums, focal link, NLL and an ensemble weight at once, each by its own formula.
    batch = random_batch(15)
    params = {"beta": 0.3, "aggregation": "ld", "link": "focal", "addon": "nll", "weight": "uncertainty",
              "tail_weight": 0.25, "gamma": 0.5, "nll_weight": 0.1}  # fmt: skip
    loss = get_loss("composed").form(params)
    loss.check_params(params)
    assert loss.needs == {"reference", "tokens", "rewards"}
    logp = -LOSSES["ld_dpo"].fn(batch, beta=0.3, tail_weight=0.25)
    expected = -torch.exp(0.5 * logp) * logp - 0.1 * batch.chosen_logp / batch.chosen_tokens
    u = batch.reward_margin.std(dim=1, correction=0)
    torch.testing.assert_close(loss.fn(batch, **params), torch.exp(-u) * expected, rtol=1e-12, atol=0)


def test_several_margin_parts_act_in_turn():
    batch = random_batch(16)
    params = {"beta": 0.3, "margin": ["clamp_rejected", "dispersion", "target"], "target_margin": 0.7}
    ratio = batch.chosen_logp - batch.ref_chosen_logp, batch.rejected_logp - batch.ref_rejected_logp
    z = 0.3 * batch.dispersion_weight * (ratio[0] - ratio[1].clamp(min=0)) - 0.7
    actual = get_loss("composed").form(params).fn(batch, **params)
    torch.testing.assert_close(actual, -torch.nn.functional.logsigmoid(z), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"link": "fokal"}, "unknown link 'fokal'; did you mean 'focal'?"),
        ({"link": 3}, "link is 3 (int); expected a name"),
        ({"link": ["focal"]}, "link is ['focal'] (list); expected a name"),
        ({"margin": ["length", 2]}, "margin is 2 (int); expected a name or a list of names"),
        ({"margin": ["length", "length"]}, "margin 'length' stands more than once"),
        ({"agregation": "mean"}, "unknown parameter 'agregation'; did you mean 'aggregation'?"),
        ({"gamma": 0.1}, "parameter 'gamma' belongs to link 'focal' or link 'focal_detached', which is not chosen"),
        ({"link": "focal", "gamma": "x"}, "'gamma' is 'x' (str); expected a number"),
        ({"link": "focal", "gamma": -1.0}, "'gamma' is -1.0; expected a number at least 0"),
        ({"aggregation": "decay", "decay": 1.5}, "expected a number above 0 and at most 1"),
        ({"aggregation": "ld", "reference": "harmonic"}, "'harmonic' knows whole responses alone"),
        ({"link": "anchored_zero", "margin": "target"}, "margin 'target' adds a shift"),
        ({"link": "reward_head", "aggregation": "ld"}, "does not look at the margin; leave out 'aggregation'"),
        ({"link": "reward_head", "weight": "likelihood"}, "weight 'likelihood' reads the margin"),
        ({"addon": ["nll", "nll_sum"]}, "both take 'nll_weight'"),
    ],
)
def test_bad_combinations_are_named(params, message):
    with pytest.raises(BadInput) as caught:
        get_loss("composed").check_params(BETA | params)
    assert message in str(caught.value)
    assert "loss 'composed'" in str(caught.value)


def test_a_combination_needs_beta_and_only_its_own_parameters():
    with pytest.raises(BadInput, match="missing parameter 'beta'"):
        get_loss("composed").check_params({"link": "focal"})
    assert list(get_loss("composed").form({"link": "focal"}).parameters())[:2] == ["beta", "gamma"]
    with pytest.raises(TypeError):
        get_loss("focal_dpo").fn(random_batch(), beta=0.1, gama=0.1)


def test_one_parameter_name_means_one_thing():
    # The same name in two kinds of steps would make some combinations impossible to write.
    seen = {}
    for kind, steps in STEPS.items():
        for one in steps.values():
            for name in one.parameters:
                assert seen.setdefault(name, kind) == kind, name
