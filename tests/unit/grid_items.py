"""Small grids with made-up trials, whose means, win rates and verdicts are known by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from prefopt.grids.collect import collect_runs
from prefopt.grids.runs import Trial, trial_of

PROMPTS = 40
HEAD = {"paper": "p", "name": "n", "arxiv": None, "title": "T", "scale": "demo", "note": ""}


def answers(score, log_ratio=0.0, tokens=10.0, where=("test", 1.0, 10), order=None) -> pd.DataFrame:
    """Rows of answers.parquet: ``score`` [P] or [draws, P], anything else a number or of the same shape."""
    score = np.atleast_2d(np.asarray(score, dtype=float))
    name, fraction, step = where
    frame = pd.DataFrame(
        {
            "set": name,
            "fraction": float(fraction),
            "step": step,
            "draw": np.repeat(np.arange(len(score)), score.shape[1]),
            "prompt_id": np.tile(np.arange(score.shape[1]) * 7 + 3, len(score)),
            "score": score.ravel(),
            "log_ratio": np.broadcast_to(log_ratio, score.shape).ravel().astype(float),
            "tokens": np.broadcast_to(tokens, score.shape).ravel(),
            "ended": True,
            "text": "",
        }
    )
    return frame if order is None else frame.iloc[order].reset_index(drop=True)


def trial(*frames: pd.DataFrame, curve: Sequence[Mapping[str, float]] = (), ref: str = "trials/t-00000000") -> Trial:
    return trial_of(ref, pd.concat(frames), curve)


def arm(against: str = "reference", **more: Any) -> dict[str, Any]:
    return {"loss": {"name": "dpo"}, "label": "L", "against": against, "control": False, "member_bias": None} | more


def point(arm: str, condition: str = "c", **settings: float) -> dict[str, Any]:
    return {"condition": condition, "arm": arm, "settings": settings}


def grid(points: list[dict[str, Any]], expect: Sequence[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
    """Spec of an item node over these points; conditions and arms are those of the points unless given."""
    declared = {
        "tier": "quick",
        "layout": "bars",
        "conditions": {p["condition"]: {"value": None, "label": p["condition"]} for p in points},
        "arms": {p["arm"]: arm() for p in points},
        "sets": ["test"],
        "seeds": [0, 1, 2],
        "draws": 1,
        "at": [1.0],
        "judge": "oracle",
        "select": None,
        "points": points,
    }
    return {"item": HEAD, "grid": declared | more, "expect": list(expect)}


def claim(arm: str, than: Any, metric: str = "reward", **more: Any) -> dict[str, Any]:
    row = {"kind": "compare", "claim": "c", "source": "table 1", "reported": "", "metric": metric, "set": "test"}
    return row | {"arm": arm, "than": than, "conditions": None, "arm_at": "selected", "than_at": "selected"} | more


def judged(spec: Mapping[str, Any], runs: Mapping[tuple[int, int], Trial], reference=None) -> list[dict[str, Any]]:
    return collect_runs(spec, runs, reference or {})["expect"]


def noise(seed: int, shape=(PROMPTS,)) -> np.ndarray:
    """Centred noise: its mean over the prompts is 0 up to rounding."""
    drawn = np.random.default_rng(seed).normal(size=shape)
    return drawn - drawn.mean(axis=-1, keepdims=True)
