"""Evaluations of annotation files as the page of answers shows them: rows with their texts, and their metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.reporting.evaluation_page import Evaluation
from prefopt.stages import annotated

if TYPE_CHECKING:
    import pandas as pd

_UNNAMED = "model"


def evaluations_of(
    files: Sequence[Path],
    *,
    outputs: Path | None = None,
    baseline: Path | None = None,
    difficulty: Path | None = None,
    gamed: Path | None = None,
    by_position: bool = False,
) -> list[Evaluation]:
    """Every model of every file, in order. Names that several files share get their file's folder behind them.

    Options as of ``annotated.win_rates_of``. Texts and data sets that the annotations lack are taken from the files of
    answers. Raises BadInput, naming the file and the row, for anything that cannot be used.
    """
    if outputs is not None and len(files) > 1:
        raise BadInput(f"--outputs is of one model, but --annotations names {len(files)} files; show one at a time")
    given: dict[str, Any] = {"difficulty": difficulty, "gamed": gamed, "by_position": by_position}
    inputs: dict[str, Any] = {
        "difficulty": None if difficulty is None else annotated.difficulties_of(difficulty),
        "gamed": None if gamed is None else annotated.gamed_of(gamed),
        "by_position": by_position,
    }
    found = []
    for path in files:
        metrics = annotated.win_rates_of(path, outputs=outputs, baseline=baseline, **given)
        by_name = metrics.get("models", {metrics.get("model"): metrics})
        parts = _parts(path, outputs, baseline)
        found += [
            (path, Evaluation(_UNNAMED if name is None else str(name), parts[name], by_name[name], **inputs))
            for name in by_name
        ]
    return _told_apart(found)


def _parts(path: Path, outputs: Path | None, baseline: Path | None) -> dict[str | None, pd.DataFrame]:
    """Rows by model, with lengths, prompt numbers and texts; ``win_rates_of`` has checked the files."""
    rows = annotated.as_numbers(annotated.table_of(path, "preference"), path, "preference")
    if "index" in rows:
        rows = annotated.numbered(rows, path)
    names = annotated.model_names(rows, path)
    for answers, text, length in ((outputs, "output_2", "len_model"), (baseline, "output_1", "len_baseline")):
        rows = annotated.with_lengths(rows, path, answers, text, length)
        if answers is not None:
            rows = _with_texts(rows, answers, text)
    return {None: rows} if names is None else dict(list(rows.groupby(names, sort=False)))


def _with_texts(rows: pd.DataFrame, path: Path, text: str) -> pd.DataFrame:
    """``text``, the instruction and the data set from a file of answers, where the rows lack them."""
    answers = annotated.table_of(path, "output")
    by_text = "instruction" in rows and "instruction" in answers
    place = annotated.numbered(answers, path)["index"] if "index" in answers else answers.index.to_series()
    table = answers.set_index(answers["instruction"] if by_text else place)
    key = rows["instruction"] if by_text else rows["index"]
    sources = {text: "output", "instruction": "instruction", "dataset": "dataset"}
    lacking = {name: column for name, column in sources.items() if name not in rows and column in table}
    return rows.assign(**{name: key.map(table[column]) for name, column in lacking.items()})


def _told_apart(found: Sequence[tuple[Path, Evaluation]]) -> list[Evaluation]:
    times = Counter(evaluation.label for _, evaluation in found)
    labels = [e.label if times[e.label] == 1 else f"{e.label} ({path.parent.name})" for path, e in found]
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise BadInput(f"--annotations: '{repeated[0]}' is there twice; name every file once, each in its own folder")
    return [replace(e, label=label) for label, (_, e) in zip(labels, found, strict=True)]
