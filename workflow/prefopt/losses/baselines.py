"""The field's baselines, DPO and its next of kin: declared here, computed by the steps; notation as in ``methods``."""

from __future__ import annotations

# The steps register themselves when their modules are imported.
from prefopt.losses import addons, aggregation, links, margin, reference, weights  # noqa: F401
from prefopt.losses.registry import method

method("dpo", "-log sigmoid(beta * D).", paper="2305.18290", equation="eq. 7")
method(
    "dpo_mean",
    "-log sigmoid(beta * D of log-ratios per token): length-normalised DPO.",
    paper="2305.18290",
    equation="eq. 7 per token",
    aggregation="mean",
)
method(
    "dpo_nll",
    "DPO + nll_weight * negative log-likelihood per token of the chosen response; RPO (2405.16436) has weight .005.",
    paper="2404.19733",
    equation="DPO with an NLL term",
    addon="nll",
)
method(
    "ipo",
    "(D - 1/(2 beta))^2 on summed log-probabilities; beta is the paper's tau.",
    paper="2310.12036",
    equation="eq. 17",
    link="square",
)
method(
    "ipo_mean",
    "(D of log-ratios per token - 1/(2 beta))^2: length-normalised IPO.",
    paper="2310.12036",
    equation="eq. 17 per token",
    aggregation="mean",
    link="square",
)
method(
    "ipo_scaled",
    "(beta * D - 1/2)^2: IPO's minimiser with beta^2 times its scale.",
    paper="2310.12036",
    equation="eq. 17 times beta^2",
    link="square_scaled",
)
method(
    "slic_hinge",
    "max(0, 1 - beta * D): SLiC's hinge on reference-normalised log-probabilities.",
    paper="2309.06657",
    equation="hinge loss, reference-normalised",
    link="hinge",
    fixed={"hinge_at": 1.0},
)
method(
    "slic_hf",
    "max(0, target_margin - beta * policy margin) - nll_weight * chosen log-probability; the paper has beta = 1.",
    paper="2305.10425",
    equation="rank calibration with cross-entropy",
    reference="none",
    link="hinge",
    addon="nll_sum",
    defaults={"nll_weight": 0.1},
    renamed={"hinge_at": "target_margin"},
)
method(
    "cdpo",
    "(1 - eps) * dpo + eps * dpo of the swapped pair.",
    paper="2305.18290",
    equation="eq. 7 with smoothed labels",
    link="smoothed",
)
method(
    "robust_dpo",
    "[(1 - eps) * dpo - eps * dpo of the swapped pair] / (1 - 2 eps): unbiased under label flips of rate eps.",
    paper="2403.00409",
    equation="unbiased loss",
    link="debiased",
)
method(
    "exo_pair",
    "KL(q || (1 - eps, eps)) with q = sigmoid(beta * D); target_smoothing is eps, above 0.",
    paper="2402.00856",
    equation="EXO on pairs, KL to smoothed labels",
    link="exo",
)
method(
    "apo_zero",
    "1 - sigmoid(beta * chosen) + sigmoid(beta * rejected): anchored preference optimisation, for a policy that is "
    "worse than the chosen responses.",
    paper="2408.06266",
    equation="APO-zero",
    link="anchored_zero",
)
method(
    "apo_down",
    "sigmoid(beta * chosen) + 1 - sigmoid(beta * D): anchored preference optimisation, for a policy that is better "
    "than the chosen responses; it lowers both.",
    paper="2408.06266",
    equation="APO-down",
    link="anchored_down",
)
method(
    "rdpo",
    "-log sigmoid(beta * D + length_weight * (chosen tokens - rejected tokens)).",
    paper="2403.19159",
    equation="length-regularised DPO",
    margin="length",
)
method(
    "dpop",
    "-log sigmoid(beta * (D - penalty_weight * max(0, -chosen))). The weight is inside beta; 50 in some scripts.",
    paper="2402.13228",
    equation="DPO-positive",
    margin="keep_chosen",
)
method(
    "beta_dpo",
    "DPO with beta_batch = beta * (1 + sensitivity * (mean D - baseline_margin)), detached, at least 1e-3. One beta "
    "per batch as in the authors' code; ``beta_dpo_filtered`` has their filter of pairs and their running baseline.",
    paper="2407.08639",
    equation="batch-level beta",
    margin="batch_beta",
)
method(
    "simpo",
    "-log sigmoid(beta * (chosen per token - rejected per token) - target_margin); target_margin is the paper's gamma.",
    paper="2405.14734",
    equation="eq. 6",
    aggregation="mean",
    reference="none",
    margin="target",
)
method(
    "cpo",
    "-log sigmoid(beta * policy margin) + nll_weight * negative log-likelihood per token of the chosen response.",
    paper="2401.08417",
    equation="preference loss plus NLL",
    reference="none",
    addon="nll",
)
method(
    "orpo",
    "Chosen NLL per token - beta * log sigmoid(log-odds ratio) of the per-token mean probabilities; beta is lambda.",
    paper="2403.07691",
    equation="eq. 6",
    aggregation="mean",
    reference="none",
    margin="odds",
    link="logistic_times_beta",
    addon="nll",
    fixed={"nll_weight": 1.0},
)
method(
    "kto",
    "Mean of a pair's two KTO terms, w+ (1 - sigmoid(beta (chosen - z))) and w- (1 - sigmoid(beta (z - rejected))). "
    "z is reference_kl in nats, or else the detached batch mean of all log-ratios, at least 0, which stands in for the "
    "KL that the paper estimates on mismatched prompts.",
    paper="2402.01306",
    equation="Kahneman-Tversky loss",
    link="kahneman_tversky",
)
