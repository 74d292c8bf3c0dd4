"""Can pairwise comparisons be ranked at all? Connectivity of the models, and separation by strength or style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import BadInput

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


def require_connected(names: Sequence[str], sides: Numbers) -> None:
    """Raise BadInput, naming the groups of models that no chain of comparisons connects. ``sides`` [n, 2]."""
    part = _components(len(names), sides[:, 0], sides[:, 1], "weak")
    if part.max() > 0:
        groups = [_listed(names, part == group) for group in range(part.max() + 1)]
        raise BadInput(
            "bradley_terry: no comparison connects these groups, so their strengths cannot be compared: "
            f"{' | '.join(groups)}; rank them apart, or add comparisons between them"
        )


def strengths_are_finite(models: int, sides: Numbers, outcome: Floats) -> bool:
    """Whether every model is reached from every other over (parts of) wins; Source: Ford 1957."""
    return bool(_components(models, *_losers_and_winners(sides, outcome), "strong").max() == 0)


def require_finite_strengths(names: Sequence[str], sides: Numbers, outcome: Floats) -> None:
    """Raise BadInput, naming a group of models that never lost to the others: their lead has no best value."""
    losers, winners = _losers_and_winners(sides, outcome)
    part = _components(len(names), losers, winners, "strong")
    if part.max() > 0:
        lost = set(part[losers[part[losers] != part[winners]]].tolist())
        best = next(group for group in range(part.max() + 1) if group not in lost)
        raise BadInput(
            f"bradley_terry: separation: {_listed(names, part == best)} never lost a comparison with the other models, "
            "so no finite strength is the best; give a small ridge such as 0.1, or leave them out"
        )


def require_finite_style(design: Floats, outcome: Floats, style: Sequence[str]) -> None:
    """Raise BadInput where some coefficients agree with every verdict: with style that needs no unbeaten model.

    A linear programme maximises the summed agreement s_r x_r . d, s_r = +-1 for a win or loss, over directions d in
    [-1, 1] with none of them negative and 0 for soft outcomes; separation is a positive maximum.

    Source: Albert and Anderson 1984.
    """
    from scipy.optimize import linprog

    certain = (outcome == 0) | (outcome == 1)
    hard = np.where(outcome[certain] == 1, 1.0, -1.0)[:, None] * design[certain]
    soft = design[~certain]
    found = linprog(
        -hard.sum(axis=0),
        A_ub=-hard if len(hard) else None,
        b_ub=np.zeros(len(hard)) if len(hard) else None,
        A_eq=soft if len(soft) else None,
        b_eq=np.zeros(len(soft)) if len(soft) else None,
        bounds=(-1, 1),
    )
    if found.status == 0 and -found.fun > 1e-6:
        raise BadInput(
            f"bradley_terry: separation: strengths with the style {', '.join(style)} agree with every verdict, so no "
            "finite fit is the best; give a small ridge such as 0.1, or leave the style out"
        )


def _listed(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, there in zip(names, chosen, strict=True) if there)


def _losers_and_winners(sides: Numbers, outcome: Floats) -> tuple[Numbers, Numbers]:
    a_won, b_won = outcome > 0, outcome < 1  # a soft outcome is a part of a win for both
    losers = np.concatenate([sides[a_won, 1], sides[b_won, 0]])
    return losers, np.concatenate([sides[a_won, 0], sides[b_won, 1]])


def _components(size: int, start: Numbers, end: Numbers, kind: str) -> NDArray[Any]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(start)), (start, end)), shape=(size, size))
    return connected_components(graph, directed=True, connection=kind)[1]
