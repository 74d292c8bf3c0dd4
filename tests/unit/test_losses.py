"""Every loss of pairs alone against the numbers of its paper's vectors (float64), and bandits trained by them."""

from __future__ import annotations

import math

import pytest
import torch

from loss_batches import close, t, three_pairs
from prefopt.batch import PairBatch
from prefopt.losses import (
    LOSSES,
)
from prefopt.losses.mallows import _log_cubic, log_link, log_link_smooth

LN2 = math.log(2)


@pytest.fixture
def fixture() -> PairBatch:
    return three_pairs()


# name, parameters, value per pair, d/d chosen_logp, d/d rejected_logp ("-" is minus the former, None not given)
BASELINES = [
    ("dpo", {"beta": 0.1}, [0.6349461015956135, 0.7655951823371514, 0.6515500338125731],
     [-0.04700359482, -0.05349429452, -0.0478762785], "-"),
    ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}, [0.6469461015956135, 0.7515951823371514, 0.6600500338125731],
     [-0.03700359482, -0.04349429452, -0.0378762785], "-"),
    ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.1}, [0.6199461015956134, 0.7830951823371515, 0.640925033812573],
     [-0.05950359482, -0.06599429452, -0.0603762785], "-"),
    ("slic_hinge", {"beta": 0.1}, [0.88, 1.14, 0.915], [-0.1, -0.1, -0.1], "-"),
    ("slic_hf", {"beta": 1.0, "target_margin": 1.0, "nll_weight": 0.1}, [0.4, 5.9, 0.26],
     [-0.1, -1.1, -0.1], [0, 1, 0]),
    ("ipo", {"beta": 0.1}, [14.44, 40.96, 17.2225], [-7.6, -12.8, -8.3], "-"),
    ("ipo_mean", {"beta": 0.1}, [22.641736111111108, 28.7296, 22.920156250000005],
     [-2.379166667, -2.144, -2.39375], [1.586111111, 3.573333333, 2.39375]),
    ("simpo", {"beta": 2.0, "target_margin": 1.0}, [1.2175702574961484, 2.365295994374279, 0.4200553357027153],
     [-0.3520258138, -0.3624314016, -0.1714947687], [0.2346838759, 0.604052336, 0.1714947687]),
    ("cpo", {"beta": 0.1, "nll_weight": 1.0}, [1.5803299666264259, 2.1310837825796716, 1.1916983585938614],
     [-0.2940286351, -0.2605873668, -0.2918240623], [0.04402863507, 0.06058736684, 0.04182406232]),
    ("orpo", {"beta": 0.1}, [1.0642729515463247, 1.339704751058422, 0.6740268371328236],
     [-0.2687521534, -0.2215417187, -0.2611717403], [0.01204918818, 0.05799797104, 0.006923538888]),
    ("rdpo", {"beta": 0.1, "length_weight": 0.01}, [0.6443966600735709, 0.7549461015956136, 0.6515500338125731],
     [-0.04750208125, -0.05299640518, -0.0478762785], "-"),
    ("dpop", {"beta": 0.1, "penalty_weight": 5.0}, [0.6349461015956135, 0.9991627362708936, 0.7133471672280342],
     [-0.04700359482, -0.3790874506, -0.3059992001], [0.04700359482, 0.06318124177, 0.05099986669]),
    ("beta_dpo", {"beta": 0.1, "sensitivity": 0.6, "baseline_margin": 0.3},
     [0.6377708016545877, 0.7618566777879543, 0.6535870295221233],
     [-0.04479542842, -0.05065410196, -0.04558322892], "-"),
    ("dpo_nll", {"beta": 0.1, "nll_weight": 1.0}, [1.6349461015956135, 1.9655951823371514, 1.3015500338125732],
     [-0.2970035948, -0.2534942945, -0.2978762785], [0.04700359482, 0.05349429452, 0.0478762785]),
    ("ld_dpo", {"beta": 0.1, "tail_weight": 0.5}, [0.6443966600735709, 0.7629235777077612, 0.6515500338125731],
     None, None),
    ("temporal_decay", {"beta": 0.1, "decay": 0.98}, [0.6374246460122848, 0.763489140971648, 0.6525435629013036],
     None, None),
    ("dpo_mean", {"beta": 5.0}, [0.26135967487373957, 1.9529776105260737, 0.2968331378712071],
     [-0.2874951016, -0.8581489351, -0.3210399892], [0.191663401, 1.430248225, 0.3210399892]),
    ("exo_pair", {"beta": 0.1, "target_smoothing": 1e-3}, [2.5560731165613664, 3.0050170730944115, 2.6154527831639203],
     [-0.1690595245, -0.1753084541, -0.1702361952], "-"),
    ("apo_zero", {"beta": 0.1}, [0.9700097458493999, 1.0349848417749916, 0.9787773701549167], None, None),
    ("silver_soft", {"beta": 0.1}, [0.6649148889241994, 0.6944286236831747, 0.6884167103059607],
     [-0.02202960538, -0.002661038334, -0.004503717923], "-"),
    ("silver_hard", {"beta": 0.1}, [0.6349461015956135, 0.6255951823371514, 0.6515500338125731],
     None, None),
    ("mallows_theta", {"beta": 0.1}, [0.6806356908211078, 0.6983348799234654, 0.6708156688282402],
     [-0.01036019376, -0.003715061386, -0.02597235328], "-"),
    ("mallows_theta", {"beta": 10.0}, [0.07752437893309165, 1.3388670786476597, 0.010859143950702822],
     [-0.156535639, -0.5454150679, -0.05739855752], "-"),
    ("mallows_ipo", {"beta": 0.1}, [22.545260575433005, 26.045571938125157, 20.68674788709937],
     [-1.992773849, -0.7544866734, -4.834342256], "-"),
    ("distill_mean", {"beta": 0.1}, [0.9604, 0.011377777777777764, 0.03300277777777782],
     [-0.196, -0.02133333333, -0.03633333333], "-"),
    ("distill_ensemble", {"beta": 0.1}, [0.0784, 0.0036, 0.013225], None, None),
    ("distill", {"beta": 0.1}, [0.9604, 0.0036, 0.378225], None, None),
    ("distill_ensemble_batch", {"beta": 0.1}, [0.0784, 0.0676, 0.013225], None, None),
    # Smallest by size: .4 of (1.1, .4, 1.8), -.2 of (-.2, -.4, .5), -.1 of (.7, .2, -.1); beta margins .12, -.14, .085.
    ("distill_smallest", {"beta": 0.1}, [0.0784, 0.0036, 0.034225], None, None),
    ("mallows_distill", {"beta": 0.1}, [1.1552348029895851, 0.0005282968017719194, 0.049059385420089516],
     [-0.04510924079, 0.0003398001879, -0.02354248675], "-"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "params", "value", "chosen", "rejected"), BASELINES, ids=[row[0] for row in BASELINES]
)
def test_three_pair_vectors(fixture, name, params, value, chosen, rejected):  # noqa: PLR0917
    actual = LOSSES[name].fn(fixture, **params)
    close(actual, value)
    if chosen is not None:
        rejected = [-g for g in chosen] if rejected == "-" else rejected
        grads = torch.autograd.grad(actual.sum(), [fixture.chosen_logp, fixture.rejected_logp], allow_unused=True)
        # The published gradients carry ten digits.
        torch.testing.assert_close(grads[0], t(chosen), rtol=2e-9, atol=1e-12)
        torch.testing.assert_close(grads[1], t(rejected), rtol=2e-9, atol=1e-12)


def test_kto_terms(fixture):
    kto = LOSSES["kto"].fn
    # A pair's value is the mean of its two terms, so twice a one-sided call is the single term.
    gain = kto(fixture, beta=0.1, reference_kl=0.5, undesirable_weight=0.0)
    close(2 * gain, [0.5, 0.5324543063873188, 0.5187412158785353])
    risk = kto(fixture, beta=0.1, reference_kl=0.5, desirable_weight=0.0)
    close(2 * risk, [0.47003594823542827, 0.5024999791668749, 0.4600851154444343])
    (grad,) = torch.autograd.grad(2 * gain.sum(), fixture.chosen_logp)
    torch.testing.assert_close(grad, t([-0.025, -0.0248946718, -0.02496487668]), rtol=2e-9, atol=0)


def test_kto_batch_anchor_is_the_mean_log_ratio_and_not_negative(fixture):
    # log-ratios [.5, -.8, -.25] and [-.7, .6, -1.1]: mean -.2917, so the anchor is 0.
    torch.testing.assert_close(
        LOSSES["kto"].fn(fixture, beta=0.1), LOSSES["kto"].fn(fixture, beta=0.1, reference_kl=0.0), rtol=0, atol=0
    )


def pair(c=1.0, lam=None, **change) -> PairBatch:
    """One pair with margin (-12 + 13) - (-15 + 14.5) = 1.5."""
    fields = {
        "chosen_logp": t([-12.0]),
        "rejected_logp": t([-15.0]),
        "ref_chosen_logp": t([-13.0]),
        "ref_rejected_logp": t([-14.5]),
        "chosen_tokens": torch.tensor([10]),
        "rejected_tokens": torch.tensor([12]),
        "dispersion_weight": t([c]),
        "neg_log_dispersion": t([c if lam is None else lam]),
    } | change
    return PairBatch(pair_id=torch.tensor([0]), **fields)


@pytest.mark.parametrize(
    ("name", "c", "params", "expected"),
    [
        ("dpo", 1.0, {"beta": 0.1}, 0.6209570477895321),
        ("mallows_theta", 1.7, {"beta": 0.1}, 0.5737533784185956),
        ("mallows_theta", 0.4, {"beta": 0.1}, 0.6635971130761409),
        ("mallows_theta", -2 * math.log(math.exp(-0.5)), {"beta": 0.1}, 0.6209570477895321),
        ("mallows_theta", -2 * math.log(0.05), {"beta": 0.1}, 0.34152411972746444),
        ("mallows_theta", -2 * math.log(0.5), {"beta": 0.1}, 0.5945704895079416),
        ("mallows_theta", -2 * math.log(0.9), {"beta": 0.1}, 0.6774679824433321),
        ("mallows_phi", -math.log(0.05), {"beta": 0.1, "smoothing": 0.1}, 0.2568429714394972),
        ("mallows_phi", -math.log(0.5), {"beta": 0.1, "smoothing": 0.1}, 0.5546133821900218),
        ("mallows_phi", -math.log(0.9), {"beta": 0.1, "smoothing": 0.1}, 0.6705812833606191),
        ("mallows_phi_sigmoid", -math.log(0.05), {"beta": 0.1}, 0.49349824750272875),
        ("mallows_phi_sigmoid", -math.log(0.5), {"beta": 0.1}, 0.6425118079106418),
        ("mallows_phi_sigmoid", -math.log(0.9), {"beta": 0.1}, 0.6852763626682999),
        ("mallows_phi_adaptive", -math.log(0.05), {"beta": 0.1}, 0.6562893225981208),
        ("mallows_phi_adaptive", -math.log(0.5), {"beta": 0.1}, 0.6424475518871692),
        ("mallows_phi_adaptive", -math.log(0.9), {"beta": 0.1}, 0.6725157823809982),
        ("ipo", 1.0, {"beta": 0.1}, 12.25),
        ("mallows_ipo", 1.7, {"beta": 0.1}, 6.0025),
        ("ipo_scaled", 1.0, {"beta": 0.1}, 0.1225),
        ("mallows_ipo_scaled", 1.7, {"beta": 0.1}, 0.060025),
        # per-token margin -1.2 + 1.25 = .05; 10 * .05 - 10 * .3 = -2.5
        ("simpo", 1.0, {"beta": 10.0, "target_margin": 3.0}, 2.578889734292549),
        ("mallows_simpo", 1.0, {"beta": 10.0, "target_margin": 3.0}, 2.578889734292549),
        ("mallows_simpo", 1.7, {"beta": 10.0, "target_margin": 3.0}, 4.264163456931504),
    ],
)
def test_one_pair_vectors(name, c, params, expected):
    close(LOSSES[name].fn(pair(c), **params), [expected])


@pytest.mark.parametrize(
    ("phi", "expected"), [(0.05, 1.4849647024208896), (0.5, 0.8540069006404641), (0.9, 0.7162340769073363)]
)
def test_phi_link_of_the_swapped_pair(phi, expected):
    swapped = pair(
        -math.log(phi),
        chosen_logp=t([-15.0]),
        rejected_logp=t([-12.0]),
        ref_chosen_logp=t([-14.5]),
        ref_rejected_logp=t([-13.0]),
    )
    close(LOSSES["mallows_phi"].fn(swapped, beta=0.1, smoothing=0.1), [expected])


@pytest.mark.parametrize(("c", "expected"), [(1.7, -0.0742208463354271), (0.4, -0.0194001799352236)])
def test_theta_gradient_vector(c, expected):
    logp = t([-12.0]).requires_grad_()
    (grad,) = torch.autograd.grad(LOSSES["mallows_theta"].fn(pair(c, chosen_logp=logp), beta=0.1).sum(), logp)
    close(grad, [expected])


RAW_LINK = [
    (0.05, 0.01, -0.32479447205486078),
    (0.05, 0.1, -0.27967405403542295),
    (0.05, 1.0, -0.048790164169432003),
    (0.05, 1.0, math.log(20 / 21)),
    (0.05, 5.0, -1.4687515654316112e-6),
    (0.05, -0.1, -1.410710529624202),
    (0.05, -5.0, -13.431098527604425),
    (0.05, -30.0, -86.52382004604739),
    (0.5, 0.1, -0.56449576313754013),
    (0.5, 0.5, -0.48894923344777705),
    (0.5, 2.0, math.log(16 / 21)),
    (0.5, -5.0, -2.7173095265150068),
    (0.5, -200.0, -134.02927846782451),
    (0.9, 0.1, -0.67229868045843242),
    (0.9, -30.0, -2.3186587646679033),
    (0.99, 1.0, -0.68813463873640103),
    # g(1) = 1/(1 + phi) for every phi; g -> 1/2 + lambda (2u + 1)/12 for phi -> 1.
    (0.3, 1.0, -math.log(1.3)),
    (math.exp(-1e-8), 1.0, math.log(0.5 + 3e-8 / 12)),
    (math.exp(-1e-8), -7.0, math.log(0.5 - 15e-8 / 12)),
]


@pytest.mark.parametrize(("phi", "s", "expected"), RAW_LINK)
def test_raw_link(phi, s, expected):
    torch.testing.assert_close(log_link(t([s]), t([-math.log(phi)])), t([expected]), rtol=1e-9, atol=1e-15)


def test_raw_link_at_the_jump_is_one_half():
    close(log_link(t([0.0]), t([3.0])), [-LN2])


@pytest.mark.parametrize(
    ("phi", "right"), [(0.05, 0.7188233782520344), (0.5, 0.5573049591110366), (0.9, 0.5087784189700972)]
)
def test_raw_link_right_of_the_jump(phi, right):
    # G(0+) = 1/(1 - phi) - 1/lambda
    assert right == pytest.approx(1 / (1 - phi) + 1 / math.log(phi), rel=1e-13)
    close(log_link(t([1e-12]), t([-math.log(phi)])).exp(), [right])


def test_raw_link_series_meets_the_closed_form():
    # Both sides of the switch at lambda (u + 1) = 0.05 continue each other, for near and for far margins.
    for u in (0.01, 1.0, 50.0, 1e4):
        lam = 0.05 / (u + 1)
        below, above = (log_link(t([u, -u]), t([lam * f] * 2)) for f in (1 - 1e-9, 1 + 1e-9))
        torch.testing.assert_close(below, above, rtol=0, atol=5e-10)


@pytest.mark.parametrize(
    ("phi", "width", "a1", "a3"),
    [
        (0.05, 0.05, 6.947840165296158, -876.7542998174706),
        (0.05, 0.1, 3.661946789630291, -110.16455269479657),
        (0.5, 0.1, 0.9731451059752633, -28.66770343654051),
        (0.5, 2 * LN2, 0.17365374017961777, -0.013225026330091184),
    ],
)
def test_cubic_coefficients(phi, width, a1, a3):
    s = torch.linspace(-0.99 * width, 0.99 * width, 41, dtype=torch.float64)
    lam, half_width = (torch.full_like(s, v) for v in (-math.log(phi), width))
    close(_log_cubic(s, lam, half_width).exp(), (0.5 + a1 * s + a3 * s**3).tolist(), 1e-9)


@pytest.mark.parametrize(
    ("phi", "width", "s", "value", "slope"),
    [
        (0.05, 0.05, -0.1, 1.410710529624202, -1.4633372691699944),
        (0.05, 0.05, -0.025, 1.0788000090589724, -15.599631347744815),
        (0.05, 0.05, 0.0, LN2, -13.895680330592317),
        (0.05, 0.05, 0.025, 0.41552041640167087, -8.036291252510708),
        (0.05, 0.05, 0.05, 0.3040855830251682, -0.5044511607704745),
        (0.05, 0.05, 1.0, 0.048790164169432, -0.1058288671277075),
        (0.5, 0.1, -0.05, 0.7876200542151514, -1.6665061662406493),
        (0.5, 0.1, 0.0, LN2, -1.9462902119505265),
        (0.5, 0.1, 0.05, 0.6068340946419282, -1.3908893452864803),
        (0.5, 0.1, 0.2, 0.5448576488960579, -0.19385201017496234),
    ],
)
def test_smooth_link_value_and_slope(phi, width, s, value, slope):
    at = t([s]).requires_grad_()
    negative = -log_link_smooth(at, t([-math.log(phi)]), width)
    (grad,) = torch.autograd.grad(negative.sum(), at)
    close(negative.detach(), [value])
    close(grad, [slope])


def test_smooth_link_continues_at_its_ends():
    # Where lambda * width is large, 1 - G(width) is so small that the cubic's left end is a cliff: not tried here.
    for lam, widths in ((1e-8, (0.01, 0.1, 2.0)), (0.04, (0.01, 0.3)), (3.0, (0.01, 0.1, 2.0)), (50.0, (0.01, 0.1))):
        for width in widths:
            for end in (-width, width):
                at = t([end * (1 - 1e-12), end * (1 + 1e-12)]).requires_grad_()
                value = log_link_smooth(at, t([lam, lam]), width)
                (slope,) = torch.autograd.grad(value.sum(), at)
                assert value[0].item() == pytest.approx(value[1].item(), rel=1e-6, abs=1e-12)
                assert slope[0].item() == pytest.approx(slope[1].item(), rel=1e-5, abs=1e-9)


def test_single_precision_keeps_its_digits():
    wide = pair(3.0)
    narrow = pair(3.0, chosen_logp=wide.chosen_logp.float(), rejected_logp=wide.rejected_logp.float(),
                  ref_chosen_logp=wide.ref_chosen_logp.float(), ref_rejected_logp=wide.ref_rejected_logp.float(),
                  dispersion_weight=t([3.0]).float(), neg_log_dispersion=t([3.0]).float())  # fmt: skip
    for name, entry in LOSSES.items():
        if entry.needs <= {"reference", "dispersion"}:
            out = entry.fn(narrow, beta=0.1)
            assert out.dtype is torch.float32, name
            torch.testing.assert_close(out.double(), entry.fn(wide, beta=0.1), rtol=2e-6, atol=1e-7, msg=name)


def test_the_phi_link_keeps_single_precision_where_float32_would_cancel():
    # G is a difference of two B over lambda: in float32 its error is 1e-7 B / lambda.
    for lam in (0.002, 0.06, 0.3, 20.0):
        s = torch.tensor([-300.0, -40.0, -1.0, -0.02, 0.02, 1.0, 40.0])
        wide, narrow = (log_link_smooth(x, torch.full_like(x, lam), 0.1) for x in (s.double(), s))
        torch.testing.assert_close(narrow.double(), wide, rtol=3e-6, atol=1e-30)


def test_orpo_is_finite_where_a_probability_rounds_to_one():
    sure = pair(chosen_logp=t([0.0]).requires_grad_(), rejected_logp=t([0.0]).requires_grad_())
    out = LOSSES["orpo"].fn(sure, beta=0.1)
    close(out, [0.1 * LN2])
    grads = torch.autograd.grad(out.sum(), [sure.chosen_logp, sure.rejected_logp])
    assert all(grad.isfinite().all() for grad in grads)


# Bandit of five arms: 16 pairs, softmax policy from zero logits, uniform reference, gradient descent at 5e-3.
BANDIT = "3>5 2>5 2>5 1>2 3>5 1>5 1>4 1>5 4>5 2>4 2>1 2>5 1>3 3>5 3>4 4>2"


@pytest.mark.parametrize(
    ("name", "beta", "trajectory"),
    [
        ("dpo", 0.1, {
            1: [0.2000124998, 0.2000093747, 0.2000093747, 0.1999968745, 0.1999718764],
            100: [0.2012478223, 0.2009335211, 0.2009335575, 0.1996822180, 0.1972028812],
            1000: [0.2122746778, 0.2089735560, 0.2089773542, 0.1963733398, 0.1734010722],
        }),
        ("mallows_phi", 0.1, {
            1: [0.2003472560, 0.2002602761, 0.2002602761, 0.1999127339, 0.1992194579],
            100: [0.2257133463, 0.2150295206, 0.2154160600, 0.1914149440, 0.1524261291],
            1000: [0.2800337199, 0.2192603042, 0.2196278865, 0.1727886433, 0.1082894460],
        }),
        ("mallows_phi", 0.05, {1000: [0.2893608928, 0.2299933860, 0.2314292036, 0.1626637675, 0.0865527501]}),
    ],
)  # fmt: skip
def test_bandit_trajectories(name, beta, trajectory):
    winners, losers = (torch.tensor([int(item[place]) - 1 for item in BANDIT.split()]) for place in (0, 2))
    flat, count = torch.full((16,), -math.log(5), dtype=torch.float64), torch.ones(16, dtype=torch.long)
    params = {"smoothing": 0.05} if name == "mallows_phi" else {}
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for step in range(1, 1 + max(trajectory)):
        logp = torch.log_softmax(logits, 0)
        batch = PairBatch(
            pair_id=torch.arange(16), chosen_logp=logp[winners], rejected_logp=logp[losers], chosen_tokens=count,
            rejected_tokens=count, ref_chosen_logp=flat, ref_rejected_logp=flat,
            neg_log_dispersion=torch.full_like(flat, -math.log(0.05)),
        )  # fmt: skip
        (grad,) = torch.autograd.grad(LOSSES[name].fn(batch, beta=beta, **params).mean(), logits)
        logits = (logits - 5e-3 * grad).detach().requires_grad_()
        if step in trajectory:
            torch.testing.assert_close(torch.softmax(logits, 0).detach(), t(trajectory[step]), rtol=0, atol=1e-9)
