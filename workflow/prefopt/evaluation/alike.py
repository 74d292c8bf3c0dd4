"""Arms that cannot be told apart: runs whose answers measure the same on every prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_MEASURED = ("outcome", "reward_model", "tokens_model")


def arms_alike(results: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[str]:
    """One sentence for every group of arms with the same measurements, prompt by prompt, in all of their seeds.

    ``results`` is what ``items.collect_item`` takes; runs without ``prompts`` are left out. Answers are drawn with the
    same seeds for every arm, so that two policies which differ too little to change a word score the same everywhere:
    their intervals then look like several findings and are one.
    """
    measured: dict[str, dict[int, pd.DataFrame]] = {}
    for (arm, seed), run in results.items():
        if "prompts" in run:
            measured.setdefault(arm, {})[seed] = _by_prompt(run["prompts"])
    groups: list[list[str]] = []
    for arm, tables in measured.items():
        for group in groups:
            if _same(measured[group[0]], tables):
                group.append(arm)
                break
        else:
            groups.append([arm])
    return [
        f"{', '.join(group)}: the same measurements on every prompt, so that these arms are one finding; train longer, "
        "or at a greater learning rate, to tell them apart"
        for group in groups
        if len(group) > 1
    ]


def _by_prompt(prompts: pd.DataFrame) -> pd.DataFrame:
    key = [name for name in ("prompt_id", "draw") if name in prompts]
    columns = [name for name in _MEASURED if name in prompts]
    return prompts.set_index(key)[columns].sort_index()


def _same(a: Mapping[int, pd.DataFrame], b: Mapping[int, pd.DataFrame]) -> bool:
    return a.keys() == b.keys() and all(a[seed].equals(b[seed]) for seed in a)
