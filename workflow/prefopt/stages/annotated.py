"""Win rates of annotation files: AlpacaEval's records or their numeric extract, from anyone's judge.

A file is a JSON list of records or a CSV table, plain or gzipped. Per row: ``preference``, and the texts
(``output_1`` of the baseline, ``output_2`` of the model) or their lengths (``len_baseline``, ``len_model``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.errors import BadInput
from prefopt.inputs.containers import csv_rows, list_rows
from prefopt.readers.raw import broken_at
from prefopt.winrate import length_controlled_win_rate, win_rate

if TYPE_CHECKING:
    import pandas as pd

_TEXTS = (
    "instruction",
    "output",
    "output_1",
    "output_2",
    "generator",
    "generator_1",
    "generator_2",
    "model",
    "dataset",
)
_MOST_PROMPTS = 10_000_000
_LARGEST_LOG_ODDS = 1000.0
_LONGEST_ANSWER = 1e9
_NOTES = {
    "length_controlled_minimal": "no difficulty file given: length and model terms only, not comparable with the "
    "published figures; lc_standard_error is 0 by construction",
    "length_controlled_noreg": "no gamed rows given: not comparable with the published figures",
}


def win_rates_of(
    annotations: Path,
    *,
    outputs: Path | None = None,
    baseline: Path | None = None,
    difficulty: Path | None = None,
    gamed: Path | None = None,
    by_position: bool = False,
) -> dict[str, Any]:
    """Metrics of the one model in a file, or ``{"models": {name: metrics}}`` of several; NaN becomes None.

    ``outputs`` and ``baseline`` are model_outputs files: they give the lengths that the annotations lack, must agree
    with those that are there, and number the prompts (the baseline's order, or its ``index``); ``outputs`` is also what
    ``avg_length`` is taken over. ``difficulty``: columns ``index`` and ``instruction_difficulty``. ``gamed``: see
    ``length_controlled_win_rate``.

    Raises BadInput, naming the file and the row, for anything that cannot be used.
    """
    if by_position and difficulty is None:
        raise BadInput("--by-position says how difficulties are looked up; give --difficulty with it")
    rows = as_numbers(table_of(annotations, "preference"), annotations, "preference")
    if "index" in rows:
        rows = numbered(rows, annotations)
    names = model_names(rows, annotations)
    if outputs is not None and names is not None and names.nunique() > 1:
        raise BadInput(f"{annotations}: annotations of {names.nunique()} models, but --outputs is of one")
    rows = with_lengths(rows, annotations, outputs, "output_2", "len_model")
    rows = with_lengths(rows, annotations, baseline, "output_1", "len_baseline")
    options = {
        "difficulty": None if difficulty is None else difficulties_of(difficulty),
        "gamed": None if gamed is None else gamed_of(gamed),
        "by_position": by_position,
    }
    if difficulty is not None and not by_position and "index" not in rows:
        raise BadInput(f"{annotations}: no prompt numbers; give --baseline, whose order numbers them, or --by-position")
    parts = {None: rows} if names is None else dict(list(rows.groupby(names, sort=False)))
    try:
        results = {name: _metrics(name, part, options) for name, part in parts.items()}
    except BadInput as error:
        raise BadInput(f"{annotations}: {error}") from error
    if outputs is not None:
        average = int(_text_lengths(table_of(outputs, "output")["output"], outputs).mean())
        results = {name: metrics | {"avg_length": average} for name, metrics in results.items()}
    return next(iter(results.values())) if len(results) == 1 else {"models": results}


def model_names(rows: pd.DataFrame, path: Path) -> pd.Series | None:
    """The model of every row, or None where the file does not say."""
    column = _first_of(rows, "generator_2", "model")
    if column is None:
        return None
    if (unnamed := rows[column].isna() | (rows[column].str.strip() == "")).any():
        raise BadInput(f"{path}: row {int(np.argmax(unnamed))} has no '{column}'")
    return rows[column]


def _metrics(name: str | None, rows: pd.DataFrame, options: dict[str, Any]) -> dict[str, Any]:
    head: dict[str, Any] = {} if name is None else {"model": name}
    if "generator_1" in rows:
        if rows["generator_1"].nunique(dropna=False) > 1:
            raise BadInput(f"several baselines: {', '.join(sorted(map(str, rows['generator_1'].unique())))}")
        head["baseline"] = rows["generator_1"].iloc[0]
    if name is not None and head.get("baseline") == name:  # by definition, as in the published metric
        metrics: dict[str, Any] = win_rate(rows["preference"])
        metrics |= {"length_controlled_win_rate": 50.0, "lc_standard_error": 0.0}
        metrics |= {"avg_length": int(rows["len_model"].mean()), "variant": "model is the baseline"}
    else:
        metrics = length_controlled_win_rate(rows, **options)
    if note := _NOTES.get(metrics["variant"]):
        metrics["note"] = note
    return head | {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in metrics.items()}


def with_lengths(rows: pd.DataFrame, annotations: Path, answers: Path | None, text: str, column: str) -> pd.DataFrame:
    """``column`` in code points from the texts, or from a file of answers joined on the instruction or its number."""
    if column in rows:
        rows = as_numbers(rows, annotations, column)
    elif text in rows:
        rows = rows.assign(**{column: _text_lengths(rows[text], annotations)})
    if answers is not None:
        key = _first_of(rows, "instruction", "index")
        if key is None:
            raise BadInput(f"{annotations}: no 'instruction' column to find its rows in {answers} by")
        table = _answers(answers, key)
        found = rows[key].map(table["length"])
        if column not in rows:
            rows = rows.assign(**{column: found})
        elif (differ := found.notna() & (found != rows[column])).any():
            row = int(np.argmax(differ))
            raise BadInput(
                f"{annotations}: row {row} has {rows[column].iloc[row]:g} characters where {answers} has "
                f"{found.iloc[row]:g}; they are not of the same answers"
            )
        if column == "len_baseline" and "index" not in rows:
            rows = rows.assign(index=rows[key].map(table["place"]))
        if (absent := rows[column].isna() | (rows["index"].isna() if "index" in rows else False)).any():
            row = int(np.argmax(absent))
            raise BadInput(f"{answers}: no answer for row {row} of {annotations}: {str(rows[key].iloc[row])[:60]!r}")
    if column not in rows:
        option = "--outputs" if column == "len_model" else "--baseline"
        raise BadInput(f"{annotations}: neither '{text}' nor '{column}' is there; give {option}")
    if (wrong := ~rows[column].between(0, _LONGEST_ANSWER)).any():
        row = int(np.argmax(wrong))
        raise BadInput(f"{annotations}: row {row} has no output length: '{column}' is {rows[column].iloc[row]:g}")
    return rows


def _answers(path: Path, key: str) -> pd.DataFrame:
    """``length`` and ``place`` of every answer of a model_outputs file, by ``key``."""
    table = table_of(path, "output", key) if key != "index" else table_of(path, "output")
    place = numbered(table, path)["index"] if "index" in table else table.index.to_series()
    by = place if key == "index" else table[key]
    if by.duplicated().any():
        row = int(np.argmax(by.duplicated()))
        raise BadInput(f"{path}: row {row} repeats {str(by.iloc[row])[:60]!r}; one answer per prompt is needed")
    return table.assign(length=_text_lengths(table["output"], path), place=place).set_index(by)[["length", "place"]]


def _text_lengths(texts: pd.Series, path: Path) -> pd.Series:
    is_text = texts.map(lambda value: isinstance(value, str))
    if not is_text.all():
        row = int(np.argmin(is_text))
        raise BadInput(f"{path}: '{texts.name}' of row {row} is not a text but {texts.iloc[row]!r}")
    return texts.map(len)


def difficulties_of(path: Path) -> np.ndarray:
    """Difficulty by prompt number; NaN where the file has none."""
    table = _log_odds(table_of(path, "instruction_difficulty"), path, "instruction_difficulty")
    place = numbered(table, path)["index"].to_numpy(dtype=int) if "index" in table else np.arange(len(table))
    if len(set(place)) != len(place):
        raise BadInput(f"{path}: 'index' must hold every prompt's number from 0 once")
    by_number = np.full(place.max() + 1, np.nan)
    by_number[place] = table["instruction_difficulty"]
    return by_number


def gamed_of(path: Path) -> pd.DataFrame:
    """Comparisons of the baseline with its verbose and concise selves, their columns as numbers."""
    table = as_numbers(table_of(path, "preference"), path, "preference")
    table = as_numbers(table, path, "std_delta_len") if "std_delta_len" in table else table
    return _log_odds(table, path, "instruction_difficulty") if "instruction_difficulty" in table else table


def _log_odds(table: pd.DataFrame, path: Path, column: str) -> pd.DataFrame:
    table = as_numbers(table, path, column)
    if (wrong := table[column].abs() > _LARGEST_LOG_ODDS).any():
        row = int(np.argmax(wrong))
        raise BadInput(f"{path}: '{column}' of row {row} is {table[column].iloc[row]:g}, which are no log-odds")
    return table


def numbered(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with ``index``, the prompts' numbers, as floats; BadInput names the row of what is no whole number."""
    table = as_numbers(table, path, "index")
    index = table["index"].to_numpy()
    whole = (index >= 0) & (index <= _MOST_PROMPTS) & (index == np.floor(index))
    if not whole.all():
        row = int(np.argmin(whole))
        raise BadInput(f"{path}: 'index' of row {row} is {index[row]:g}, expected a prompt's number from 0")
    return table


def as_numbers(table: pd.DataFrame, path: Path, column: str) -> pd.DataFrame:
    """The table with a column as floats, missing ones NaN; BadInput names the row of anything else."""
    numbers = []
    for row, value in enumerate(table[column]):
        try:
            numbers.append(_number(value))
        except (ValueError, OverflowError):
            raise BadInput(f"{path}: '{column}' of row {row} is {value!r:.60}, not a number") from None
    return table.assign(**{column: np.array(numbers)})


def _number(value: Any) -> float:
    """A number, also as the text that CSV has, NaN for nothing; ValueError or OverflowError for anything else."""
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "_" in str(value):
        raise ValueError
    return float(value)


def _first_of(table: pd.DataFrame, *columns: str) -> str | None:
    return next((name for name in columns if name in table), None)


def table_of(path: Path, *needed: str) -> pd.DataFrame:
    """A JSON list of records or a CSV table, plain or gzipped; BadInput where a needed column is not there.

    Of a CSV table all values are texts. Columns of texts and names hold texts, None where there is none.
    """
    import pandas as pd

    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    records = []
    for _, place, row in csv_rows(path) if is_csv else list_rows(path):
        if not isinstance(row, Mapping):
            raise BadInput(f"{path}: {place}: {type(row).__name__} where an object with keys is expected")
        for key, value in row.items():
            if broken_at(key) is not None or (isinstance(value, str) and broken_at(value) is not None):
                raise BadInput(f"{path}: {place}: {key!r:.60} has a lone surrogate, which is no Unicode")
        records.append(row)
    table = pd.DataFrame.from_records(records)
    if absent := [name for name in needed if name not in table or table.empty]:
        raise BadInput(f"{path}: no rows with '{absent[0]}'; columns there: {', '.join(map(str, table)) or 'none'}")
    return table.assign(**{name: _checked_texts(table[name], path) for name in _TEXTS if name in table})


def _checked_texts(column: pd.Series, path: Path) -> pd.Series:
    import pandas as pd

    checked = [None if isinstance(value, float) and math.isnan(value) else value for value in column]
    for row, value in enumerate(checked):
        if value is not None and not isinstance(value, str):
            raise BadInput(f"{path}: '{column.name}' of row {row} is not a text but {value!r:.60}")
    return pd.Series(checked, index=column.index, name=column.name, dtype=object)
