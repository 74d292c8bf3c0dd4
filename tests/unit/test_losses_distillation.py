"""Distillation losses and regularisers against vectors, and on a table where every expectation is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loss_batches import close, t
from prefopt.batch import PairBatch
from prefopt.losses import COMPOSITIONS, LOSSES, REGULARISERS, forward_kl, linear_gamma, token_forward_kl

# Distillation vectors: h = [2.5, -3.5, 0, 7.5], three reward models.
LOGP = {
    "chosen_logp": [-12, -30.5, -7.25, -20],
    "rejected_logp": [-14, -28, -7.25, -35.5],
    "ref_chosen_logp": [-13, -29, -8, -22],
    "ref_rejected_logp": [-12.5, -30, -8, -30],
}
REWARD_MARGIN = [[2, 0.5, -1], [-0.5, 1.5, 0.25], [1, 0, 3], [0.75, 2.25, -0.5]]


@pytest.fixture
def distillation() -> PairBatch:
    fields = {name: t(value) for name, value in LOGP.items()}
    fields["chosen_logp"].requires_grad_()
    ones = torch.ones(4, dtype=torch.long)
    return PairBatch(
        pair_id=torch.arange(4), chosen_tokens=ones, rejected_tokens=ones,
        chosen_reward=t(REWARD_MARGIN) + 7, rejected_reward=torch.full((4, 3), 7.0, dtype=torch.float64), **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("beta", "dpo", "ipo_mean", "distill", "members", "ensemble_mean", "gradient"),
    [
        (0.1, 0.6348349404931165, 27.4375, [3.0625, 0.0225, 1, 0], [1, 0, 1, 0], 0.02125, [-0.0875, 0.0075, -0.05, 0]),
        (
            0.5,
            0.7196364691789576,
            16.4375,
            [0.5625, 1.5625, 1, 9],
            [0, 0, 1, 1],
            1.09375,
            [-0.1875, -0.3125, -0.25, 0.75],
        ),
    ],
)
def test_distillation_vectors(distillation, beta, dpo, ipo_mean, distill, members, ensemble_mean, gradient):  # noqa: PLR0917
    assert LOSSES["dpo"].fn(distillation, beta=beta).mean().item() == pytest.approx(dpo, rel=1e-12)
    assert LOSSES["ipo"].fn(distillation, beta=beta).mean().item() == pytest.approx(ipo_mean, rel=1e-12)
    close(LOSSES["distill"].fn(distillation, beta=beta), distill, 1e-12)
    (grad,) = torch.autograd.grad(LOSSES["distill"].fn(distillation, beta=beta).mean(), distillation.chosen_logp)
    close(grad, gradient, 1e-12)
    value = LOSSES["distill_ensemble"].fn(distillation, beta=beta)
    assert value.mean().item() == pytest.approx(ensemble_mean, rel=1e-12)
    # The members the minimum selects, ties to the lowest, seen through the gradient's residual.
    (grad,) = torch.autograd.grad(value.sum(), distillation.chosen_logp)
    residual = distillation.reward_margin.gather(1, torch.tensor(members)[:, None])[:, 0] - beta * distillation.margin
    torch.testing.assert_close(grad, (-2 * beta * residual).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("beta", "minimum"), [(0.1, 1.02125), (0.5, 3.03125)])
def test_batch_minimum_vector(distillation, beta, minimum):
    assert LOSSES["distill_ensemble_batch"].fn(distillation, beta=beta).mean().item() == pytest.approx(
        minimum, rel=1e-12
    )


def test_ensemble_tie_goes_to_the_lowest_member():
    # beta * margin = 0 with targets +1 and -1: equal losses, opposite gradients.
    for targets, sign in (([[1.0, -1.0]], -1.0), ([[-1.0, 1.0]], 1.0)):
        logp = t([0.0]).requires_grad_()
        one = torch.ones(1, dtype=torch.long)
        batch = PairBatch(
            pair_id=torch.tensor([0]), chosen_logp=logp, rejected_logp=t([0.0]), chosen_tokens=one, rejected_tokens=one,
            ref_chosen_logp=t([0.0]), ref_rejected_logp=t([0.0]), chosen_reward=t(targets),
            rejected_reward=0 * t(targets),
        )  # fmt: skip
        for name in ("distill_ensemble", "distill_ensemble_batch"):
            (grad,) = torch.autograd.grad(LOSSES[name].fn(batch, beta=0.5).sum(), logp)
            close(grad, [sign])


@pytest.mark.parametrize(
    ("name", "members"),
    [
        # |reward margins| are smallest in columns 1, 2, 1, 2; batch means 1.02125, 1.43375, 3.12125 choose column 0.
        ("distill_ensemble", [1, 0, 1, 0]),
        ("distill_ensemble_batch", [0, 0, 0, 0]),
        ("distill_smallest", [1, 2, 1, 2]),
    ],
)
def test_losses_that_match_one_member_say_which(distillation, name, members):
    found = LOSSES[name].member(distillation, beta=0.1)
    assert found.dtype is torch.long
    assert found.tolist() == members
    chosen = t(REWARD_MARGIN).gather(1, found[:, None])[:, 0]
    residual = (chosen - 0.1 * distillation.margin).detach() ** 2
    torch.testing.assert_close(LOSSES[name].fn(distillation, beta=0.1).detach(), residual, rtol=1e-12, atol=0)


def test_the_smallest_member_is_where_the_ensemble_minimum_starts_and_stays(distillation):
    # With margins of 0 the residual is the reward margin itself, so both choose the same member and agree.
    still = replace(
        distillation, chosen_logp=distillation.ref_chosen_logp, rejected_logp=distillation.ref_rejected_logp
    )
    assert LOSSES["distill_ensemble"].member(still, beta=0.1).tolist() == [1, 2, 1, 2]
    for beta in (0.1, 10.0):
        torch.testing.assert_close(LOSSES["distill_smallest"].fn(still, beta=beta), t([0.25, 0.0625, 0, 0.25]))
        assert LOSSES["distill_smallest"].member(distillation, beta=beta).tolist() == [1, 2, 1, 2]


def test_only_losses_that_match_one_member_have_a_choice_to_tell():
    assert {name for name, entry in LOSSES.items() if entry.member is not None} == {
        "distill_ensemble",
        "distill_ensemble_batch",
        "distill_smallest",
    }


# Tabular policy over four arms: pi = softmax(s), pair (0, 2), exact KL.
TABLE_REF = [0.1, 0.2, 0.3, 0.4]
TABLE_LOGITS = [1.0, 0.0, -1.0, 0.5]


def tabular(logits: torch.Tensor, rewards=None) -> PairBatch:
    logp, ref = torch.log_softmax(logits, 0), t(TABLE_REF).log()
    one = torch.ones(1, dtype=torch.long)
    reward = None if rewards is None else t([rewards])
    return PairBatch(
        pair_id=torch.tensor([0]), chosen_logp=logp[:1], rejected_logp=logp[2:3],
        chosen_tokens=one, rejected_tokens=one,
        ref_chosen_logp=ref[:1], ref_rejected_logp=ref[2:3],
        chosen_reward=reward, rejected_reward=None if reward is None else 0 * reward,
    )  # fmt: skip


def test_forward_kl_expectation_and_gradient_are_exact():
    logits, ref = t(TABLE_LOGITS).requires_grad_(), t(TABLE_REF)
    expectation = (ref * forward_kl(torch.log_softmax(logits, 0), ref.log())).sum()
    assert expectation.item() == pytest.approx(0.4667130433401238, rel=1e-12)
    (grad,) = torch.autograd.grad(expectation, logits)
    close(grad, (torch.softmax(t(TABLE_LOGITS), 0) - ref).tolist(), 1e-12)  # d KL(ref || pi) / ds = pi - ref


@pytest.mark.parametrize(
    ("name", "rewards", "value", "gradient"),
    [
        ("p_dpo", None, 0.19726511539153513,
         [-0.083853344073376, -0.000256285123597, 0.085234729390210, -0.001125100193238]),
        ("dp_dpo", [0.25, 2, -1], 1.6928635871376287,
         [1.3030460527965955, -0.0002562851235967, -1.3016646674797612, -0.0011251001932376]),
        ("e_dpo", [0.25, 2, -1], 0.20779208196843713,
         [-0.4469539472034044, -0.0002562851235967, 0.44833533252023877, -0.0011251001932376]),
    ],
)  # fmt: skip
def test_compositions_on_the_tabular_policy(name, rewards, value, gradient):
    logits = t(TABLE_LOGITS).requires_grad_()
    composition = COMPOSITIONS[name]
    gamma = 0.01
    (penalty,) = composition.regulariser
    main = LOSSES[composition.loss].fn(tabular(logits, rewards), beta=0.5).mean()
    ref = t(TABLE_REF)
    total = main + gamma * (ref * REGULARISERS[penalty].fn(torch.log_softmax(logits, 0), ref.log())).sum()
    assert total.item() == pytest.approx(value, rel=1e-12)
    (grad,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(grad, t(gradient), rtol=0, atol=2e-14)


def test_d_dpo_is_distillation_alone():
    assert COMPOSITIONS["d_dpo"] == ("distill", {})
    assert all(
        COMPOSITIONS[n].regulariser == {"forward_kl": {"gamma": [1e-4, 1e-2]}} for n in ("p_dpo", "dp_dpo", "e_dpo")
    )
    assert all(item.loss in LOSSES and set(item.regulariser) <= set(REGULARISERS) for item in COMPOSITIONS.values())


def test_token_kl_is_the_expected_sampled_kl():
    # Two steps over three tokens with history-dependent logits: enumerate all nine reference samples.
    gen = torch.Generator().manual_seed(0)
    policy, ref = (torch.randn(1 + 3, 3, generator=gen, dtype=torch.float64) for _ in range(2))  # row 0, then 1 + token
    policy.requires_grad_()
    sampled, exact = t(0.0), t(0.0)
    for first in range(3):
        for second in range(3):
            logits = [torch.stack([x[0], x[1 + first]]) for x in (policy, ref)]
            picks = [torch.log_softmax(x, -1)[[0, 1], [first, second]].sum() for x in logits]
            weight = picks[1].exp()
            sampled = sampled + weight * forward_kl(picks[0], picks[1])
            # A masked third position, where policy and reference differ wildly, must not count.
            junk = [torch.cat([x, t([[20.0 * k, 0, -k]])]) for k, x in zip((1, -1), logits, strict=True)]
            exact = exact + weight * token_forward_kl(junk[0][None], junk[1][None], t([[1, 1, 0]]))[0]
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (sampled, exact))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("step", "expected"), [(0, 1e-4), (5000, 0.00505), (9999, 0.00999901)])
def test_gamma_schedule(step, expected):
    assert linear_gamma(step, 10000, 1e-4, 1e-2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("gamma", "expected"), [
    (0.1, [0.4876359660601119, 0.01236403393988805, 0.09995843858997379, 0.00004156141002620815, 0.25, 0.15]),
    (1.0, [0.3, 0.2, 0.095325238070399, 0.004674761929601, 0.25, 0.15]),
])  # fmt: skip
def test_p_dpo_optimum_keeps_the_mass_of_every_component(gamma, expected):
    ref, pairs = t([0.2, 0.3, 0.05, 0.05, 0.25, 0.15]), ([0, 2], [1, 3])
    two = torch.ones(2, dtype=torch.long)
    logits = ref.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], lr=1, max_iter=2000, tolerance_grad=1e-14, tolerance_change=0,
                                  line_search_fn="strong_wolfe", history_size=50)  # fmt: skip

    def objective():
        optimiser.zero_grad()
        logp = torch.log_softmax(logits, 0)
        batch = PairBatch(
            pair_id=torch.arange(2), chosen_logp=logp[pairs[0]], rejected_logp=logp[pairs[1]], chosen_tokens=two,
            rejected_tokens=two, ref_chosen_logp=ref.log()[pairs[0]], ref_rejected_logp=ref.log()[pairs[1]],
        )  # fmt: skip
        total = LOSSES["dpo"].fn(batch, beta=0.5).mean() + gamma * (ref * forward_kl(logp, ref.log())).sum()
        total.backward()
        return total

    optimiser.step(objective)
    torch.testing.assert_close(torch.softmax(logits, 0).detach(), t(expected), rtol=0, atol=1e-8)
