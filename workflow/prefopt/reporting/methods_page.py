"""The tables of docs/methods.md, generated from the registry of losses so that they cannot say anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.errors import BadInput
from prefopt.losses import COMPOSITIONS, KINDS, LOSSES, STEPS, Combination, Loss
from prefopt.procedures import PROCEDURES, Procedure

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
_DEFAULT = {"aggregation": "sum", "reference": "single", "link": "logistic"}


def steps_text(made: Combination | None) -> str:
    """The steps of a method that are not DPO's, in words; a dash for a function of its own."""
    if made is None:
        return "own function"
    parts = []
    for kind in KINDS:
        chosen = getattr(made, kind)
        names = [one.name for one in (chosen if isinstance(chosen, tuple) else (chosen,))]
        unread = made.link.reads == "nothing" and kind in KINDS[:3]
        if names and names != [_DEFAULT.get(kind)] and not unread:
            parts.append(f"{kind} {' + '.join(names)}")
    return ", ".join(parts) or "–"


def parameters_text(loss: Loss) -> str:
    """``beta, gamma = 0.05``."""
    items = loss.parameters().values()
    return ", ".join(item.name if item.default is item.empty else f"{item.name} = {item.default}" for item in items)


def method_rows() -> list[dict[str, str]]:
    """One row per loss: name, formula and notes, steps, parameters, needs, source."""
    rows = []
    for name, loss in LOSSES.items():
        free = name == "composed"
        rows.append(
            {
                "method": f"`{name}`",
                "loss": " ".join((loss.fn.__doc__ or "").split()),
                "steps": "by name" if free else steps_text(loss.combination),
                "parameters": "beta, the six steps, theirs" if free else parameters_text(loss),
                "needs": "what its steps need" if free else ", ".join(sorted(loss.needs)) or "–",
                "source": f"{_link(loss.paper)}, {loss.equation}",
            }
        )
    for name, (base, regulariser) in COMPOSITIONS.items():
        terms = [f"{term} (gamma {s['gamma'][0]:g} to {s['gamma'][1]:g})" for term, s in regulariser.items()]
        text = " + ".join([f"`{base}`", *terms])
        needs = LOSSES[base].needs | ({"reference_samples"} if terms else set())
        row = {"method": f"`{name}`", "loss": text, "steps": "–", "parameters": parameters_text(LOSSES[base])}
        rows.append(row | {"needs": ", ".join(sorted(needs)), "source": _link(LOSSES[base].paper)})
    return rows


def step_rows() -> list[dict[str, str]]:
    """One row per choice of every step."""
    return [
        {
            "step": kind,
            "name": f"`{one.name}`",
            "what it does": one.about,
            "parameters": ", ".join(f"{n} = {p.default}" for n, p in one.parameters.items()) or "–",
            "needs": ", ".join(sorted(one.needs)) or "–",
        }
        for kind, steps in STEPS.items()
        for one in steps.values()
    ]


def procedure_rows() -> list[dict[str, str]]:
    """One row per procedure: kind, what it does, what is declared beside it, source."""
    return [
        {
            "kind": f"`{kind}`",
            "procedure": one.about,
            "parameters": procedure_parameters(one),
            "source": f"{_link(one.paper)}, {one.equation}",
        }
        for kind, one in PROCEDURES.items()
    ]


def procedure_parameters(one: Procedure) -> str:
    """``count = 3, momentum = 0.3``; those without a default stand alone."""
    given = one.parameters().items()
    return ", ".join(name if default is ... else f"{name} = {default}" for name, default in given)


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() else paper


def _table(rows: list[dict[str, str]]) -> str:
    import pandas as pd

    from prefopt.evaluation.items import pipe_table

    return pipe_table(pd.DataFrame([_escaped(row) for row in rows]))


def _escaped(row: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value).replace("``", "`") for key, value in row.items()}


def page_with_tables(text: str) -> str:
    """A page's text with the tables between its two markers; BadInput where it does not have both, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise BadInput(f"the page needs one line '{BEGIN}' and one line '{END}', between which the tables go")
    before, rest = text.split(BEGIN)
    sections = {"Methods": method_rows(), "Procedures": procedure_rows(), "Steps": step_rows()}
    tables = "\n\n".join(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items())
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"
