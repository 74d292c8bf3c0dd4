"""Does the right dispersion for each context help? A contextual bandit where it is known (an addition to the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from prefopt.errors import BadInput
from prefopt.lazy import LazyModule
from prefopt.specs import Count, Positive
from prefopt.studies.registry import StudyResult, study

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from prefopt.mallows.context import Contexts, Path
else:
    np = LazyModule("numpy")
    pd = LazyModule("pandas")

_ITEMS = 6
# Trained at every beta of the grid; the controls only at the first.
_TUNED = ("dpo", "oracle", "estimated")
_LABELS = {
    "oracle": "true dispersion",
    "estimated": "estimated from entropy",
    "oracle_shuffled": "true, shuffled",
    "estimated_shuffled": "estimated, shuffled",
    "oracle_inverse": "true, inverted",
    "oracle_retuned": "true; both at best beta",
    "estimated_retuned": "estimated; both at best beta",
}


def dispersion_weights(contexts: Contexts, reference: NDArray[np.float64], seed: int) -> dict[str, NDArray[np.float64]]:
    """The weight c of every training context by arm, mean 1: true, estimated from the reference, and controls."""
    from prefopt.dispersion import apply_control, dispersion_weight, normalised_entropy, phi_star
    from prefopt.mallows.context import log_policy

    logp = log_policy(contexts.features, reference)
    entropy, one = -(np.exp(logp) * logp).sum(axis=1), np.ones(len(logp))
    fraction = normalised_entropy(entropy, entropy, one, one, logp.shape[1])
    oracle, everyone = -np.log(contexts.phi) / np.mean(-np.log(contexts.phi)), np.ones(len(logp), dtype=bool)
    estimated = dispersion_weight(fraction, phi_star(fraction))
    return {
        "dpo": np.ones(len(logp)),
        "oracle": oracle,
        "estimated": estimated,
        "oracle_shuffled": apply_control(oracle, everyone, "shuffled", seed),
        "estimated_shuffled": apply_control(estimated, everyone, "shuffled", seed),
        "oracle_inverse": apply_control(oracle, everyone, "inverse"),
    }


@study("mallows_context", "contextual bandit with known dispersion: gain of the weights over DPO at equal KL, controls")
def context(
    *,
    seeds: Annotated[list[int], Field(min_length=2)],
    betas: Annotated[list[Positive], Field(min_length=1)],
    compare_at: Annotated[list[Positive], Field(min_length=1)],
    phis: Annotated[list[Annotated[float, Field(gt=0.0, lt=1.0)]], Field(min_length=2, max_length=2)],
    features: Count = 6,
    train_contexts: Count = 1500,
    test_contexts: Count = 3000,
    rate: Positive = 0.3,
    max_steps: Count = 1500,
) -> StudyResult:
    """MallowsPO-theta with several weights against DPO on the same data, by the reward where each run passes a KL.

    All arms of a seed share contexts, pairs and reference; differences are paired over seeds, with 95 % t intervals
    (``_low``, ``_high``), and are there where every seed's runs reach the KL. Values at each KL k of ``compare_at``:
    ``<arm>_at_<k>``, the gain over DPO at the first beta; ``<arm>_over_shuffled_at_<k>``, over the same weights dealt
    to other contexts; ``dpo_over_inverse_at_<k>``; ``<arm>_retuned_at_<k>``, arm and DPO each at the beta of the grid
    that is best on average at that KL; ``<arm>_over_tuned_dpo_at_<k>``, only DPO so.
    ``correlation`` of estimated and true weights and ``reference_reward`` are means over seeds.

    Raises BadInput where the runs reach none of the KLs.

    Source: an addition; 2405.14953 has no bandit with contexts.
    """
    outcomes, facts, curves = [], [], []
    for seed in seeds:
        paths, fact = _one_seed(
            seed,
            betas=betas,
            phis=(phis[0], phis[1]),
            features=features,
            sizes=(train_contexts, test_contexts),
            rate=rate,
            until_kl=max(compare_at),
            max_steps=max_steps,
        )
        facts.append(fact)
        for (arm, beta), path in paths.items():
            outcomes += [
                {"seed": seed, "arm": arm, "beta": beta, "kl": kl, "reward": path.reward_at(kl)} for kl in compare_at
            ]
            curves.append({"arm": arm, "beta": beta, "path": path})
    table = pd.DataFrame(outcomes)
    rewards = table.pivot(index=["arm", "beta", "kl"], columns="seed", values="reward")
    values = {name: float(np.mean([fact[name] for fact in facts])) for name in facts[0]}
    comparisons: dict[str, Any] = {}
    for kl in compare_at:
        comparisons |= {f"{name}_at_{kl:g}": gain for name, gain in _gains(rewards, betas, kl).items()}
    comparisons = {name: gain for name, gain in comparisons.items() if np.isfinite(gain).all()}
    if not comparisons:
        raise BadInput(
            f"mallows_context: not all runs reach {min(compare_at):g} nats in {max_steps} steps; raise the rate"
        )
    for name, gain in comparisons.items():
        values |= _interval(name, gain)
    gains = pd.DataFrame(
        [{"comparison": name.rsplit("_at_", 1)[0], "kl": float(name.rsplit("_at_", 1)[1])}
         | {key.removeprefix(name).strip("_") or "mean": value for key, value in _interval(name, gain).items()}
         for name, gain in comparisons.items()]
    )  # fmt: skip
    figures = {"gains": _gains_figure(gains), "curves": _curves_figure(curves, betas[0])}
    return StudyResult(values, {"gains": gains, "rewards": table}, figures)


def _one_seed(
    seed: int,
    *,
    betas: Sequence[float],
    phis: tuple[float, float],
    features: int,
    sizes: tuple[int, int],
    rate: float,
    until_kl: float,
    max_steps: int,
) -> tuple[dict[tuple[str, float], Path], dict[str, float]]:
    from prefopt.mallows import context as bandit

    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((features, _ITEMS))
    contexts, test = (bandit.draw_contexts(rng, scores, phis, size) for size in sizes)
    reference = bandit.fit_reference(contexts.features, contexts.rated(rng)[:, 0], _ITEMS)
    pairs = bandit.draw_pairs(rng, contexts)
    weights = dispersion_weights(contexts, reference, seed)
    paths = {
        (arm, beta): bandit.train(
            contexts, pairs, reference, test, loss="mallows_theta", beta=beta, weight=weight,
            rate=rate, until_kl=until_kl, max_steps=max_steps,
        )
        for arm, weight in weights.items()
        for beta in (betas if arm in _TUNED else betas[:1])
    }  # fmt: skip
    return paths, {
        "correlation": float(np.corrcoef(weights["oracle"], weights["estimated"])[0, 1]),
        "reference_reward": float(paths["dpo", betas[0]].reward[0]),
    }


def _gains(rewards: pd.DataFrame, betas: Sequence[float], kl: float) -> dict[str, NDArray[np.float64]]:
    """Differences of reward at that KL, one per seed, by comparison."""

    def run(arm: str, beta: float = betas[0]) -> NDArray[np.float64]:
        return rewards.loc[(arm, beta, kl)].to_numpy()

    def best(arm: str) -> NDArray[np.float64]:
        # A beta whose runs do not all reach this KL takes no part in the tuning, unless none does.
        runs = [run(arm, beta) for beta in betas]
        return max([rewards for rewards in runs if np.isfinite(rewards).all()] or runs, key=np.mean)

    gains = {arm: run(arm) - run("dpo") for arm in dict.fromkeys(rewards.index.get_level_values("arm")) if arm != "dpo"}
    for arm in ("oracle", "estimated"):
        gains[f"{arm}_over_shuffled"] = run(arm) - run(f"{arm}_shuffled")
        gains[f"{arm}_retuned"] = best(arm) - best("dpo")
        gains[f"{arm}_over_tuned_dpo"] = run(arm) - best("dpo")
    gains["dpo_over_inverse"] = -gains["oracle_inverse"]
    return gains


def _interval(name: str, gain: NDArray[np.float64]) -> dict[str, float]:
    from scipy.stats import t

    mean, reach = float(gain.mean()), float(t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / math.sqrt(len(gain)))
    return {name: mean, f"{name}_low": mean - reach, f"{name}_high": mean + reach}


def _gains_figure(gains: pd.DataFrame) -> str:
    from prefopt.figures import COLOURS, INK, drawing

    kls = sorted(gains["kl"].unique())
    with drawing(7.2, 3.0) as canvas:
        panels = canvas.figure.subplots(1, len(kls), sharey=True, squeeze=False)[0]
        for panel, kl in zip(panels, kls, strict=True):
            panel.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            part = gains[gains["kl"] == kl].set_index("comparison")
            for row, name in enumerate(_LABELS):
                if name not in part.index:
                    continue
                mean, low, high = part.loc[name, ["mean", "low", "high"]]
                colour = COLOURS[0] if "shuffled" not in name and "inverse" not in name else COLOURS[1]
                panel.plot([low, high], [row, row], color=colour, linewidth=2)
                panel.plot(mean, row, "o", color=colour, markersize=5)
            panel.set_title(f"KL {kl:g}")
            panel.tick_params(axis="x", labelsize=8)
        panels[0].set_yticks(range(len(_LABELS)), _LABELS.values())
        panels[0].set_ylim(len(_LABELS) - 0.5, -0.5)
        canvas.figure.supxlabel("reward gain over DPO at equal KL", fontsize=10)
    return canvas.svg


def _curves_figure(curves: Sequence[dict[str, Any]], beta: float) -> str:
    """Mean over seeds of reward against KL at the first beta."""
    from prefopt.figures import COLOURS, DASHES, drawing

    arms = dict.fromkeys(run["arm"] for run in curves)
    with drawing(6.0, 3.4) as canvas:
        panel = canvas.figure.subplots()
        for number, arm in enumerate(arms):
            paths = [run["path"] for run in curves if run["arm"] == arm and run["beta"] == beta]
            kls = np.linspace(0.005, min(path.kl.max() for path in paths), 60)
            mean = [np.mean([path.reward_at(kl) for path in paths]) for kl in kls]
            panel.plot(kls, mean, color=COLOURS[number], linestyle=DASHES[number % 4], label=_LABELS.get(arm, "DPO"))
        panel.set_xlabel(f"KL from the reference (nats), beta = {beta:g}")
        panel.set_ylabel("expected reward")
        panel.legend(loc="lower right")
    return canvas.svg
