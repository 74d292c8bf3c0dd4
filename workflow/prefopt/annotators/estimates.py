"""Estimates of dispersion beside human disagreement, over the pairs of one data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.annotators.agreement import agreement_summary, item_disagreement, phi_of_rankings
from prefopt.annotators.association import auroc, length_covariates, rank_correlations
from prefopt.dispersion import vote_entropy
from prefopt.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.annotators.votes import RankedPrompt

Floats = NDArray[np.float64]

ESTIMATES = {
    "token_entropy": "token entropy",
    "sequence_entropy": "sequence entropy",
    "reward_votes": "reward votes",
    "reward_variance": "reward variance",
    "length": "length (control)",
    "length_match": "equal lengths (control)",
}
"""Names of what is compared with people; all are oriented so that more means more disagreement is expected."""

CONTROLS = ("length", "length_match")
TARGETS = {
    "vote_entropy": "entropy of votes, ties a vote of their own",
    "preference_entropy": "entropy of preferences, ties half",
}


def reward_estimates(margins: ArrayLike) -> dict[str, Floats]:
    """Two estimates from an ensemble's reward margins [N, K]: entropy of its votes, variance of its scores.

    ``reward_variance``: over members, of margins divided by each member's standard deviation over the pairs, since
    reward scales differ between members. Raises BadInput for fewer than two members or a constant one.
    """
    values = np.asarray(margins, dtype=float)
    if values.ndim != 2 or values.shape[1] < 2:
        raise BadInput(f"reward estimates: margins of shape {values.shape}; expected [pairs, two members or more]")
    scale = values.std(axis=0)
    if not (scale > 0).all():
        raise BadInput(f"reward estimates: member {int(np.argmin(scale))} has the same margin on every pair")
    return {"reward_votes": vote_entropy(values), "reward_variance": (values / scale).var(axis=1, ddof=1)}


def length_estimates(length_a: ArrayLike, length_b: ArrayLike) -> dict[str, Floats]:
    """The two controls: log mean length, and how close the two lengths are (minus |log ratio|)."""
    covariates = length_covariates(length_a, length_b)
    return {"length": covariates[:, 0], "length_match": -covariates[:, 1]}


def compare_with_people(
    estimates: Mapping[str, ArrayLike],
    counts: ArrayLike,
    length_a: ArrayLike,
    length_b: ArrayLike,
    prompt: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Estimates against the annotators, on the pairs with two votes or more; bootstrap over prompts.

    ``estimates`` by name, one value per pair; ``counts`` [N, 3] votes for a, b, ties; ``prompt`` [N] the clusters.
    Returns ``pairs`` and ``prompts`` compared, ``agreement`` (of all pairs; see ``agreement_summary``) and
    ``estimates``: name -> auroc of split against unanimous pairs, and per target of ``TARGETS`` spearman, residual,
    partial. For the controls only what does not control for length.

    Raises BadInput where fewer than three pairs have two votes.
    """
    table, prompts = np.asarray(counts, dtype=float), np.asarray(prompt)
    people = item_disagreement(table)
    several = (people["votes"] >= 2).to_numpy()
    if several.sum() < 3:
        raise BadInput(f"{int(several.sum())} pairs with two votes or more; at least three are needed to compare")
    kept = {name: np.asarray(values, dtype=float)[several] for name, values in estimates.items()}
    controls = length_estimates(length_a, length_b)
    kept |= {name: values[several] for name, values in controls.items()}
    covariates = np.column_stack([controls["length"], -controls["length_match"]])[several]
    people, clusters = people[several], prompts[several]
    drawn = {"resamples": resamples, "seed": seed}
    found: dict[str, Any] = {
        name: {"auroc": auroc(values, people["split"].to_numpy() > 0, clusters, **drawn)}
        for name, values in kept.items()
    }
    for target in TARGETS:
        correlations = rank_correlations(kept, people[target].to_numpy(), covariates, clusters, **drawn)
        for name, three in correlations.items():
            found[name][target] = {k: v for k, v in three.items() if name not in CONTROLS or k == "spearman"}
    return {
        "pairs": int(several.sum()),
        "prompts": len(np.unique(clusters)),
        "agreement": agreement_summary(table, prompts, **drawn),
        "estimates": found,
    }


def compare_with_phi(
    estimates: Mapping[str, ArrayLike],
    prompt: ArrayLike,
    rankings: Mapping[Any, RankedPrompt],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Spearman of each estimate's mean over a prompt's pairs with phi fitted to that prompt's rankings.

    None with fewer than five prompts that two annotators or more ranked completely.
    """
    import pandas as pd

    fits = {key: fitted for key, one in rankings.items() if (fitted := phi_of_rankings(one)) is not None}
    means = pd.DataFrame(dict(estimates)).groupby(np.asarray(prompt)).mean()
    shared = [key for key in means.index if key in fits]
    if len(shared) < 5:
        return None
    phi = np.array([fits[key]["phi"] for key in shared])
    nothing = np.zeros((len(shared), 1))
    columns = {name: means.loc[shared, name].to_numpy() for name in means}
    found = rank_correlations(columns, phi, nothing, np.arange(len(shared)), resamples=resamples, seed=seed)
    return {
        "prompts": len(shared),
        "mean_phi": float(phi.mean()),
        "estimates": {name: three["spearman"] for name, three in found.items()},
    }


def rows_of(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> pd.DataFrame:
    """All data sets' comparisons as one table, a row per data set and estimate, numbers with their intervals."""
    import pandas as pd

    rows = []
    for dataset, result in results.items():
        for name, found in result["estimates"].items():
            phi = (result.get("phi") or {}).get("estimates", {}).get(name)
            rows.append(
                {
                    "data": labels[dataset],
                    "estimate": ESTIMATES.get(name, name),
                    "pairs": result["pairs"],
                    "prompts": result["prompts"],
                    **{kind: interval_text(found["vote_entropy"].get(kind)) for kind in _KINDS},
                    "AUROC split": interval_text(found["auroc"]),
                    "spearman, ties half": interval_text(found["preference_entropy"].get("spearman")),
                    "spearman with phi": interval_text(phi),
                }
            )
    return pd.DataFrame(rows)


_KINDS = ("spearman", "residual", "partial")


def interval_text(found: Mapping[str, float | None] | None) -> str:
    """``.12 [.05, .19]``; a dash where there is nothing."""
    if not found or found["mean"] is None:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def agreement_rows(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> pd.DataFrame:
    """How far people agree, a row per data set."""
    import pandas as pd

    rows = []
    for dataset, result in results.items():
        found = result["agreement"]
        both = [found["pairwise"], found["pairwise_without_ties"]]
        agreed = [{"mean": one["agreement"], "low": one["low"], "high": one["high"]} for one in both]
        unanimous = found["unanimous"] or {"share": None, "low": None, "high": None}
        rows.append(
            {
                "data": labels[dataset],
                "pairs": found["items"],
                "with two votes": found["items_with_several_votes"],
                "votes": found["votes"],
                "ties": f"{found['ties']:.3f}",
                "unanimous": interval_text({"mean": unanimous["share"], **{k: unanimous[k] for k in ("low", "high")}}),
                "agreement of two": interval_text(agreed[0]),
                "without ties": interval_text(agreed[1]),
                "alpha": "–" if found["alpha"] is None else f"{found['alpha']:.3f}",
            }
        )
    return pd.DataFrame(rows)


def flat_values(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every number under the name that claims use: ``<data>.<estimate>.<kind>``, with ``.low`` and ``.high``.

    Kinds are auroc, spearman, residual, partial (of vote_entropy), and the same under ``preference_entropy.``; of
    rankings ``phi.spearman``. What could not be estimated is left out.
    """
    values: dict[str, float] = {}
    for dataset, result in results.items():
        values[f"{dataset}.pairs"], values[f"{dataset}.prompts"] = result["pairs"], result["prompts"]
        for name, found in result["estimates"].items():
            kinds = {"auroc": found["auroc"], **found["vote_entropy"]}
            kinds |= {f"preference_entropy.{kind}": one for kind, one in found["preference_entropy"].items()}
            if result.get("phi"):
                kinds["phi.spearman"] = result["phi"]["estimates"][name]
            for kind, one in kinds.items():
                values |= _limits(f"{dataset}.{name}.{kind}", one)
        agreement = result["agreement"]
        values |= _limits(f"{dataset}.agreement", agreement["pairwise"] | {"mean": agreement["pairwise"]["agreement"]})
        if agreement["unanimous"]:
            values[f"{dataset}.unanimous"] = agreement["unanimous"]["share"]
    return values


def _limits(name: str, found: Mapping[str, float | None]) -> dict[str, float]:
    mean = found["mean"]
    if mean is None:
        return {}
    limits = {f"{name}.{key}": value for key in ("low", "high") if (value := found[key]) is not None}
    return {name: mean} | limits
