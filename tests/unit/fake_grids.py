"""Contents of item.json of grid items with made-up round numbers, one per layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FRACTIONS = (0.05, 0.5, 0.95)
PAPERS = {"by_condition": "reward_distillation", "ranking": "own"}


def estimate(mean: float, half: float | None = 0.25) -> dict[str, Any]:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "n_seeds": 3, "n_prompts": 40}


def arm(label: str, against: str = "reference", **more: Any) -> dict[str, Any]:
    return {"loss": {"name": "dpo"}, "label": label, "against": against, "control": False, "member_bias": None} | more


def curve(members: int = 0) -> dict[str, Any]:
    found = {
        key: [[f, level * f, level * f - 0.1, level * f + 0.1] for f in FRACTIONS]
        for key, level in (("loss", 0.7), ("accuracy", 0.8), ("chosen_log_ratio", -2), ("rejected_log_ratio", -6))
    }
    shares = [[f, *(1 / members for _ in range(members))] for f in FRACTIONS] if members else None
    return found | ({"members": shares} if shares else {})


def point(arm: str, condition: str, settings: Mapping[str, float], selected: bool, sets: Sequence[str], **more: Any):
    values = {"advantage": estimate(0.5), "reward": estimate(0.7), "win_rate": estimate(55.0, 4.0), "kl": estimate(3.0)}
    values |= {"lc_win_rate": None, "tokens": estimate(20.0), "score_positive": estimate(0.8)}
    found = {"condition": condition, "arm": arm, "settings": dict(settings), "selected": selected, "runs": {}}
    return found | {"sets": {name: dict(values) for name in sets}, "curve": curve()} | more


def claim(**more: Any) -> dict[str, Any]:
    row = {"kind": "compare", "claim": "the weighted loss is better", "source": "figure 10", "reported": "57.7"}
    row |= {"metric": "reward", "arm": "theta", "than": "dpo", "set": "test", "difference": estimate(0.5), "p": 0.0312}
    return row | {"verdict": "direction only", "reason": "the interval [0.25, 0.75] lies above 0"} | more


def item(layout: str, **more: Any) -> dict[str, Any]:
    """A grid item over two arms with a base, a control, two conditions where the layout has them, and two betas."""
    if layout == "histogram":
        return _histogram() | more
    sets = ["near", "far"] if layout == "bars" else ["test", "validation"]
    values = (0.25, 0.75) if layout == "by_condition" else (None,)
    conditions = {f"c{n}": {"value": v, "label": f"condition {n}"} for n, v in enumerate(values)}
    arms = {
        "dpo": arm("DPO"),
        "theta": arm("Mallows θ", "dpo", member_bias=[0.0, 0.5, 1.0] if layout == "by_condition" else None),
        "shuffled": arm("shuffled", "dpo", control=True),
    }
    points = [
        point(name, condition, {"beta": beta, "learning_rate": 0.001}, layout != "bars" and beta == 0.1, sets)
        for condition in conditions
        for name in arms
        for beta in (0.1, 0.5)
    ]
    for held in points:
        held["curve"] = curve(len(arms[held["arm"]]["member_bias"] or ()))
    select = None if layout == "bars" else {"set": "validation", "metric": "reward"}
    found = _head(layout) | {"conditions": conditions, "arms": arms, "sets": sets, "points": points, "select": select}
    found |= {"seeds": [0, 1, 2], "reference": {sets[0]: {"reward": estimate(0.5), "tokens": estimate(20.0)}}}
    return found | ({"frontier": _frontier(arms)} if layout == "frontier" else {}) | more


def _head(layout: str) -> dict[str, Any]:
    return {
        "paper": PAPERS.get(layout, "mallowspo"),
        "name": layout.replace("_", "-"),
        "arxiv": "2405.14953",
        "title": f"Layout {layout}",
        "scale": "demo",
        "note": "",
        "kind": "grid",
        "tier": "quick",
        "layout": layout,
        "method": "95 % interval",
        "draws": 1,
        "expect": [claim()],
        "verdict": "direction only",
    }


def _frontier(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    base = {"condition": "c0", "settings": {"beta": 0.1, "learning_rate": 0.001}, "step": 1}
    measured = {"reward": estimate(0.7), "score_positive": estimate(0.8)}
    return [
        base | {"arm": name, "fraction": fraction, "kl": estimate(10 * fraction)} | measured
        for name in arms
        for fraction in FRACTIONS
    ]


def _histogram() -> dict[str, Any]:
    conditions = {name: {"value": None, "label": f"data {name}"} for name in ("narrow", "wide")}
    shares = {"edges": [0.5, 0.9, 1.1, 1.5], "closed": [0.1, 0.2, 0.2], "open": [0.2, 0.2, 0.1]}
    ends = {end: [{"prompt": f"{end} <i>prompt</i>", "weight": 0.5, "kind": "open"}] for end in ("lowest", "highest")}
    held = {"phi_star": 0.29, "mean": 1.0, "sd": 0.25, "skewness": None, "histogram": shares} | ends
    row = claim(kind="weights", quantity="skewness", condition="wide", than="narrow")
    del row["metric"], row["arm"]
    found = _head("histogram") | {"conditions": conditions, "weights": dict.fromkeys(conditions, held), "expect": [row]}
    return found | {"arms": {}, "points": [], "sets": [], "seeds": [], "select": None, "reference": {}}
