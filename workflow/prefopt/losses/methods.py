"""The other published methods that are one choice in every step: declared here, computed by the steps.

What a declaration does not name is DPO's: sum over tokens, one reference, no margin part, logistic link. Notation:
chosen and rejected are log-ratios log pi - log ref, D their difference, beta > 0. Where a source could not be read in
full, or a paper and its code differ, every reading has a name of its own and the text says so.
"""

from __future__ import annotations

# The steps register themselves when their modules are imported.
from prefopt.losses import addons, aggregation, links, margin, reference, weights  # noqa: F401
from prefopt.losses.registry import free_combination, method

# --- token aggregation ----------------------------------------------------------------------------------------------

method(
    "ld_dpo",
    "DPO with the tokens beyond the shorter response's length scaled by tail_weight (the paper: .5); 1 is DPO.",
    paper="2409.06411",
    equation="length-desensitised DPO",
    aggregation="ld",
)
method(
    "temporal_decay",
    "DPO with response token t = 0, 1, ... weighted by decay^t; 1 is DPO. This is the plain reading of the sum; the "
    "released code is ``temporal_decay_from_one``. The code's defaults are decay .98 and beta .1.",
    paper="2502.14340",
    equation="temporally decayed DPO",
    aggregation="decay",
)
method(
    "temporal_decay_from_one",
    "DPO with response token t = 1, 2, ... weighted by decay^t, as in the released code: ``temporal_decay`` at beta * "
    "decay.",
    paper="2502.14340",
    equation="temporally decayed DPO, released code",
    aggregation="decay_from_one",
)
method(
    "temporal_decay_free",
    "-log sigmoid(beta * decayed policy margin): the form without a reference, t = 0, 1, ...",
    paper="2502.14340",
    equation="reference-free form",
    aggregation="decay",
    reference="none",
)
method(
    "sampo",
    "DPO on min(chosen tokens, rejected tokens) tokens of either response, drawn without replacement and anew at every "
    "step; policy and reference share the draw. The released code draws for each of them, so that its two sums are "
    "over different tokens; it has beta .1 for 8B models, .5 for 2.8B.",
    paper="2406.10957",
    equation="down-sampled DPO, one draw",
    aggregation="subset",
)
method(
    "sampo_expected",
    "-log sigmoid(beta * (chosen * k / chosen tokens - rejected * k / rejected tokens)), k the smaller length: the "
    "expected margin of ``sampo`` in place of a draw.",
    paper="2406.10957",
    equation="down-sampled DPO, expected margin",
    aggregation="expected_subset",
)
method(
    "bmc",
    "DPO with every token's log-ratio weighted by 1 + diff * min(1 / pi, diff_cap), without gradient; diff marks the "
    "tokens in which a response differs from the other. The prose's reading: policy weights for both models. The "
    "paper's diff_cap is 1.5 to 2.5, its beta .01 or .05; its chosen responses are rewritten ones, which see "
    "prefopt.inputs.rewriting.",
    paper="2408.07471",
    equation="weighted DPO, the prose's weights",
    aggregation="diff",
)
method(
    "bmc_own_weights",
    "``bmc`` with the reference's log-probabilities weighted by its own probabilities, as in the released code.",
    paper="2408.07471",
    equation="weighted DPO, the code's weights",
    aggregation="diff_own",
)

# --- reference ------------------------------------------------------------------------------------------------------

_MRPO = "2405.16388"
method(
    "mrpo",
    "DPO against 1 / (a1/ref + a2/ref2), a in proportion to each reference's |log-probability of chosen - rejected|, "
    "log ref2 clipped to a share of log ref on either side; clip .1 and beta .1 in the released code. The formula's "
    "orientation of a; the released code's is ``mrpo_crossed``. 2512.10040 finds plain DPO with one reference ahead of "
    "all such weightings, and that weights of the labelled pair leak its label.",
    paper=_MRPO,
    equation="multi-reference DPO, adaptive weights",
    reference="harmonic_adaptive",
)
method(
    "mrpo_crossed",
    "``mrpo`` with each reference's weight on the other one, as the released code computes it, and with its 1e-6.",
    paper=_MRPO,
    equation="multi-reference DPO, the code's weights",
    reference="harmonic_crossed",
)
method(
    "mrpo_fixed",
    "``mrpo`` with the fixed weight second_weight of the second reference.",
    paper=_MRPO,
    equation="multi-reference DPO, fixed weights",
    reference="harmonic_clipped",
)
method(
    "mrpo_unclipped",
    "``mrpo_fixed`` without clipping.",
    paper=_MRPO,
    equation="multi-reference DPO, no clipping",
    reference="harmonic",
)

# --- margin ---------------------------------------------------------------------------------------------------------

method(
    "minor_dpo",
    "-log sigmoid(beta * (chosen - max(0, rejected))): no gradient to a rejected response that is already below the "
    "reference.",
    paper="2408.09834",
    equation="MinorDPO",
    margin="clamp_rejected",
)
_UP = "2410.20187"
method(
    "uncertainty_mul",
    "-log sigmoid(beta * (exp(-u/temperature) * chosen - exp(-u'/temperature) * rejected)), u, u' the ensemble's "
    "spread on either response. The paper's equations could not be read: the multiplicative form is attested, its "
    "details are a reconstruction.",
    paper=_UP,
    equation="multiplicative penalty (reconstruction)",
    margin="uncertainty_mul",
)
method(
    "uncertainty_lcb",
    "-log sigmoid(beta * D - penalty * (u - u')): lower confidence bounds of both implicit rewards. A reconstruction; "
    "it does not attenuate uncertain pairs in general.",
    paper=_UP,
    equation="additive penalty (reconstruction)",
    margin="uncertainty_lcb",
)
method(
    "uncertainty_att",
    "-log sigmoid(beta * D + penalty * (u + u')): uncertain pairs get a smaller gradient. A reconstruction.",
    paper=_UP,
    equation="attenuating shift (reconstruction)",
    margin="uncertainty_att",
)
method(
    "uncertainty_weight",
    "exp(-u) * dpo, u the ensemble's spread on the reward margin. A reconstruction.",
    paper=_UP,
    equation="attenuating weight (reconstruction)",
    weight="uncertainty",
)

# --- link -----------------------------------------------------------------------------------------------------------

method(
    "focal_dpo",
    "-p^gamma log p, p = sigmoid(beta * D), with the gradient through p^gamma: dL/dz = -p^gamma (1 - p)(1 + gamma log "
    "p) turns round where p < exp(-1/gamma), harmless at the default .05 (recalled as the paper's, not confirmed).",
    paper="2501.06645",
    equation="FocalPO, full gradient",
    link="focal",
)
method(
    "focal_dpo_detached",
    "``focal_dpo`` with p^gamma held fixed in the gradient, as a public implementation has it.",
    paper="2501.06645",
    equation="FocalPO, factor detached",
    link="focal_detached",
)
method(
    "spo",
    "-log sigmoid(beta * (chosen - rejected per token)) / beta without a reference; beta is the paper's alpha. The "
    "factor 1/beta is recalled, not confirmed. ``spo_kl`` adds the paper's KL(pi || ref), estimated on reference "
    "samples.",
    paper="2405.00747",
    equation="pair term, token mean",
    aggregation="mean",
    reference="none",
    link="logistic_per_beta",
)
method(
    "spo_sum",
    "``spo`` on summed log-probabilities.",
    paper="2405.00747",
    equation="pair term, sequence sum",
    reference="none",
    link="logistic_per_beta",
)
method(
    "spo_mu",
    "``spo`` times (exp chosen + exp rejected)^likelihood_power, detached: pairs that the policy would say count more.",
    paper="2405.00747",
    equation="pair term with its weight",
    aggregation="mean",
    reference="none",
    link="logistic_per_beta",
    weight="likelihood",
)
method(
    "capo",
    "(w - w' - beta * D)^2, w and w' the calibrated win rates of chosen and rejected: the mean over a set of responses "
    "to the prompt of sigmoid(reward difference), averaged over reward models. The paper has 16 responses; its beta "
    "and its choice of pairs from the Pareto front are not part of this.",
    paper="2502.02588",
    equation="regression to calibrated rewards",
    link="win_rate",
)
method(
    "silver_soft",
    "p * dpo + (1 - p) * dpo of the swapped pair, p = sigmoid(mean reward margin).",
    paper="2405.01511",
    equation="soft labels of the ensemble mean",
    link="soft_labels",
)
method(
    "silver_hard",
    "DPO with the pair ordered by the sign of the mean reward margin; log 2 where it is zero.",
    paper="2405.01511",
    equation="labels of the ensemble mean",
    link="relabelled",
)

# --- add-on and weight ----------------------------------------------------------------------------------------------

method(
    "hpo",
    "DPO - advantage_weight * exp((auxiliary reward - V) / advantage_temperature) * chosen log-probability per token + "
    "expectile loss of V(x), a head on the policy, which is detached in the weight. The paper's constants could not be "
    "confirmed; these are ours. Also called UPO in its third version.",
    paper="2405.17956",
    equation="DPO with an advantage-weighted likelihood",
    addon=["advantage", "value_fit"],
)
_DRDO = "2410.08458"
method(
    "drdo",
    "(mean reward margin - head margin)^2 - beta (1 - q)^focus [log p + log(1 - p')], p and p' the per-token "
    "probabilities of chosen and rejected, q = sigmoid(log p - log p') held fixed; no reference. beta is the paper's "
    "alpha (.1), focus its gamma (2). The printed inner logarithm could not be confirmed: ``drdo_odds`` is the other "
    "reading.",
    paper=_DRDO,
    equation="distillation plus unlikelihood",
    link="reward_head",
    addon="contrast",
)
method(
    "drdo_attached",
    "``drdo`` with the gradient through q.",
    paper=_DRDO,
    equation="distillation plus unlikelihood, full gradient",
    link="reward_head",
    addon="contrast_attached",
)
method(
    "drdo_odds",
    "``drdo`` with logit p - logit p' in the bracket.",
    paper=_DRDO,
    equation="distillation plus log-odds",
    link="reward_head",
    addon="contrast_odds",
)
method(
    "drdo_odds_attached",
    "``drdo_odds`` with the gradient through q: where the bracket is positive it raises the rejected response.",
    paper=_DRDO,
    equation="distillation plus log-odds, full gradient",
    link="reward_head",
    addon="contrast_odds_attached",
)
method(
    "density_ratio",
    "rho * dpo, rho = exp(-L / risk_temperature) over its batch mean and 0 where it is at most reject_below; L is the "
    "ensemble's mean loss -log sigmoid(reward margin) on the label. The paper rejects in classification; the use as a "
    "weight of preference pairs is ours.",
    paper="2405.18686",
    equation="density ratio, KL case",
    weight="density_ratio",
)

free_combination(
    "composed",
    "Any choice in the six steps by name: aggregation, reference, margin, link, addon, weight, beside beta and the "
    "steps' own parameters; what is not named is DPO's. ``margin``, ``addon`` and ``weight`` may be lists.",
    paper="this project",
    equation="free combination",
)
