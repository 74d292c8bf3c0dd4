"""One self-contained HTML page of an evaluation: figures, tables, and prompts with both answers and verdict."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.evaluation.length_control import comparison_of
from prefopt.figures import inline
from prefopt.reporting.evaluation_figures import (
    LengthRelation,
    dataset_figure,
    length_figure,
    length_relation,
    rate_estimate,
    win_rate_figure,
)
from prefopt.reporting.web import environment
from prefopt.winrate import length_controlled_interval, model_win_probability

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

FIRST_ROWS = 5  # in the page itself; a reader without scripts has these
VERDICTS = ("won", "lost", "draw", "missing")
_SCRIPTS = ("report.js", "evaluation.js")
_TEXTS = ("instruction", "output_1", "output_2")


@dataclass(frozen=True)
class Evaluation:
    """A model's rows against a baseline, and what ``winrate`` says about them.

    ``rows``: ``preference``, ``len_model``, ``len_baseline``, ``index`` where difficulties are given, and where known
    the texts ``instruction``, ``output_1`` (baseline), ``output_2`` (model) and ``dataset``. ``metrics``: of
    ``length_controlled_win_rate``, with the names ``model`` and ``baseline`` where known. ``difficulty`` and ``gamed``:
    what the metrics were computed with; ``by_position`` too.
    """

    label: str
    rows: pd.DataFrame
    metrics: Mapping[str, Any]
    difficulty: Any = None
    gamed: Any = None
    by_position: bool = False

    def outcomes(self) -> np.ndarray:
        """p [n]: 0 baseline .. 1 model, NaN where missing."""
        return model_win_probability(self.rows["preference"])

    def rates(self) -> dict[str, dict[str, Any]]:
        """Win rate and length-controlled win rate in points, each with a 95 % interval where there is one."""
        p = self.outcomes()
        controlled = {"mean": self.metrics["length_controlled_win_rate"], "low": None, "high": None}
        if "C" in self.metrics:
            options = {"difficulty": self.difficulty, "gamed": self.gamed, "by_position": self.by_position}
            low, high = length_controlled_interval(self.rows, C=self.metrics["C"], **options)
            controlled |= {} if math.isnan(low) else {"low": low, "high": high}
        return {"win rate": rate_estimate(p[~np.isnan(p)]), "length-controlled win rate": controlled}

    def relation(self) -> LengthRelation:
        """Outcome against length difference, with the fitted curve where a model was fitted."""
        options = (self.difficulty, self.gamed, self.by_position)
        return length_relation(comparison_of(self.outcomes(), self.rows, *options), self.metrics.get("weights"))

    def by_dataset(self) -> dict[str, dict[str, Any]]:
        """Win rate per data set over its rows that have a preference; empty where the rows name no data set."""
        if "dataset" not in self.rows:
            return {}
        names, p = self.rows["dataset"], self.outcomes()
        there = ~np.isnan(p)
        return {str(name): rate_estimate(p[there & (names == name).to_numpy()]) for name in names.dropna().unique()}


def verdict_of(p: float) -> str:
    """won, lost, draw or missing, from the model's side."""
    return "missing" if math.isnan(p) else "won" if p > 0.5 else "lost" if p < 0.5 else "draw"


def page_data(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What the page's script reads: every distinct text once, and rows of numbers that point at them.

    ``rows``: [model, data set, prompt, baseline's answer, model's answer, preference or None, length of the model's
    answer, of the baseline's, number of the prompt]; -1 where a text is not known.
    """
    texts: dict[str, int] = {}
    datasets: dict[str, int] = {}

    def place(table: dict[str, int], value: Any) -> int:
        known = isinstance(value, str)  # what a table lacks is None or NaN
        return table.setdefault(value, len(table)) if known else -1

    rows = []
    for number, evaluation in enumerate(evaluations):
        columns = evaluation.rows
        numbers = columns["index"] if "index" in columns else range(len(columns))
        nothing = [None] * len(columns)
        known = [columns.get(name, nothing) for name in ("dataset", *_TEXTS)]
        lengths = (columns["len_model"], columns["len_baseline"])
        for dataset, prompt, base, mine, p, long, short, index in zip(
            *known, evaluation.outcomes(), *lengths, numbers, strict=True
        ):
            preference = None if math.isnan(p) else 1 + float(p)  # not rounded: 1.50001 is no draw
            pointers = [place(datasets, dataset), *(place(texts, text) for text in (prompt, base, mine))]
            rows.append([number, *pointers, preference, int(long), int(short), int(index)])
    models = [[e.label, str(e.metrics.get("baseline", "baseline"))] for e in evaluations]
    return {"models": models, "datasets": list(datasets), "texts": list(texts), "rows": rows}


def shown_row(data: Mapping[str, Any], row: Sequence[Any]) -> dict[str, Any]:
    """One row of ``page_data`` as the template prints it; the page's script does the same."""
    number, dataset, prompt, base, mine, preference, long, short, index = row
    longer = f"the model's answer is {abs(long - short)} characters {'longer' if long > short else 'shorter'}"
    facts = [f"prompt {index}"] + ([data["datasets"][dataset]] if dataset >= 0 else [])
    facts += [] if preference is None else [f"preference {preference:.3f}"]
    facts += [longer if long != short else "both answers are equally long"]
    texts = [data["texts"][pointer] if pointer >= 0 else None for pointer in (prompt, base, mine)]
    model, baseline = data["models"][number]
    verdict = verdict_of(math.nan if preference is None else preference - 1)
    return {"model": model, "against": baseline, "verdict": verdict, "facts": " · ".join(facts)} | dict(
        zip(("prompt", "baseline", "answer"), texts, strict=True)
    )


def render_page(evaluations: Sequence[Evaluation]) -> str:
    """The page for these evaluations, whose labels differ; the same input gives the same page.

    All text from outside is escaped, in the page and in the data of its script; the page may load nothing, and run its
    own two scripts only (a content security policy by their hashes).
    """
    environment = _environment()
    loader: Any = environment.loader  # there, since ``environment`` sets it
    scripts = [loader.get_source(environment, name)[0] for name in _SCRIPTS]
    data = page_data(evaluations)
    rates = {e.label: e.rates() for e in evaluations}
    return environment.get_template("evaluation.html.j2").render(
        policy=_policy(scripts),
        scripts=[_trusted(script) for script in scripts],
        data=data,
        baselines=sorted({baseline for _, baseline in data["models"]}),
        first=[shown_row(data, row) for row in data["rows"][:FIRST_ROWS]],
        blank=dict.fromkeys(("model", "against", "verdict", "facts", "prompt", "baseline", "answer"), ""),
        verdicts=VERDICTS,
        figures=_figures(evaluations, rates),
        table=[_table_row(evaluation, rates[evaluation.label]) for evaluation in evaluations],
        datasets=[
            [e.label, name, estimate["n"], _interval(estimate)]
            for e in evaluations
            for name, estimate in e.by_dataset().items()
        ],
        notes=sorted({e.metrics["note"] for e in evaluations if e.metrics.get("note")}),
    )


def _environment() -> Environment:
    made = environment()
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    return made


def _policy(scripts: Sequence[str]) -> str:
    """Nothing from anywhere, styles of the page itself, and scripts with exactly these texts."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"


def _trusted(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _figures(evaluations: Sequence[Evaluation], rates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title, drawing, label and caption of every figure that the rows allow."""
    found = [
        (
            "Win rates",
            win_rate_figure(rates),
            "Bars end at the rate; the line over a bar's end is its 95 % interval, with the prompts drawn again (and, "
            "for the length-controlled rate, the model fitted again). A bar without a line is fixed by definition.",
        ),
        (
            "Outcome and length",
            length_figure({e.label: e.relation() for e in evaluations}),
            "Bins of about equally many prompts. The curve is the fitted model's mean prediction over the prompts; at "
            "t = 0, answers of equal length, it is the length-controlled win rate.",
        ),
    ]
    by_dataset = {e.label: estimates for e in evaluations if (estimates := e.by_dataset())}
    if by_dataset:
        caption = "Win rate per data set with 95 % interval; in brackets the number of prompts with a preference."
        found.append(("Win rates by data set", dataset_figure(by_dataset), caption))
    names = ", ".join(rates)
    drawn = [
        inline(svg, f"{title} of {names}; the tables have the numbers", f"figure{number}")
        for number, (title, svg, _) in enumerate(found)
    ]
    return [
        {"title": title, "svg": _trusted(svg), "caption": caption}
        for svg, (title, _, caption) in zip(drawn, found, strict=True)
    ]


def _table_row(evaluation: Evaluation, rates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    metrics = evaluation.metrics
    counts = "/".join(str(metrics[name]) for name in ("n_wins", "n_draws", "n_wins_base"))
    return [
        evaluation.label,
        *map(_interval, rates.values()),
        f"{metrics['discrete_win_rate']:.2f}",
        counts,
        str(metrics["n_missing"]),
        str(metrics["avg_length"]),
        metrics["variant"].removeprefix("length_controlled_"),
    ]


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate["mean"] is None:
        return "–"
    limits = "" if estimate["low"] is None else f" [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return f"{estimate['mean']:.2f}{limits}"
