"""The verbs that read several annotation files: ``rank``, ``compare-policies`` and ``fit-difficulty``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.verbs.arguments import Verbs

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.evaluation.bradley_terry import Ranking

CONFIDENCE = 0.95


def add_verbs(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Register the three verbs; nothing heavy is imported before one of them runs."""
    text = "strengths of several models from their annotations: Bradley-Terry, also at equal length"
    rank = _verb(verbs, common, "rank", text)
    rank.add_argument("--style", choices=("length",), help="what to hold equal between the answers")
    rank.add_argument("--ridge", type=float, default=0.0, help="small penalty, for models that never lose or win")
    rank.add_argument("--resamples", type=int, default=0, help="intervals by bootstrap over prompts, for example 1000")
    rank.set_defaults(run=lambda given: _show(rank_files(given.annotations, given.style, given.ridge, given.resamples),
                                              given.json, _ranking_text))  # fmt: skip
    text = "paired comparison of two policies judged against the same baseline on the same prompts"
    compare = _verb(verbs, common, "compare-policies", text)
    compare.add_argument(
        "--against", type=Path, nargs="+", help="files of the second policy; --annotations are then the first's seeds"
    )
    compare.set_defaults(run=lambda given: _show(compare_files(given.annotations, given.against), given.json, _lines))
    text = "prompt difficulties for win-rate --difficulty, from one joint fit over several models' annotations"
    fit = _verb(verbs, common, "fit-difficulty", text)
    fit.add_argument("--out", type=Path, required=True, help="the table to write, .csv")
    fit.add_argument("--baseline", type=Path, help="model_outputs of the baseline, for lengths and prompt numbers")
    fit.add_argument("--penalty", type=float, help="C of the fit, instead of cross-validation")
    fit.set_defaults(
        run=lambda given: _show(
            fit_files(given.annotations, given.out, given.baseline, given.penalty), given.json, _lines
        )
    )


def _verb(verbs: Verbs, common: argparse.ArgumentParser, name: str, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, parents=[common], help=text, description=text)
    verb.add_argument(
        "--annotations", type=Path, nargs="+", required=True, help="AlpacaEval's annotations, .json or .csv, also .gz"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    return verb


def rank_files(
    files: Sequence[Path], style: str | None = None, ridge: float = 0.0, resamples: int = 0
) -> dict[str, Any]:
    """Bradley-Terry strengths with 95 % intervals of all models and baselines in the files; see ``bradley_terry``.

    A model is ``generator_2`` (or ``model``), its opponent ``generator_1``; prompts are told apart by ``instruction``
    or ``index`` and are the clusters of the intervals. Raises BadInput, naming the file, for what cannot be used.
    """
    from prefopt.evaluation.bradley_terry import bradley_terry, style_difference

    if resamples < 0 or resamples == 1:
        raise BadInput(f"--resamples is {resamples}; give 2 or more, or 0 for none")
    rows = _rows_of(files, lengths=style is not None)
    comparisons = rows.rename(columns={"model": "model_a", "baseline": "model_b"}).assign(outcome=rows["p"])
    if style is not None:
        comparisons["length"] = style_difference(rows["len_model"], rows["len_baseline"])
    ranking = bradley_terry(comparisons, [style] if style else None, ridge=ridge, resamples=resamples)
    return _ranking_json(ranking, "bootstrap" if resamples else "sandwich", int(rows["p"].isna().sum()))


def compare_files(first: Sequence[Path], second: Sequence[Path] | None = None) -> dict[str, Any]:
    """``compare_policies`` of two files, or of the generation seeds of two policies, one file per seed.

    Rows are paired by ``instruction`` or ``index``; a prompt that a file lacks counts as missing there. Raises BadInput
    for several models in a file, several baselines, or a prompt that is in a file twice.
    """
    from prefopt.evaluation.comparison import compare_policies

    if second is None:
        if len(first) != 2:
            raise BadInput(f"--annotations names {len(first)} files; give two, or the second policy's with --against")
        first, second = first[:1], first[1:]
    rows = _rows_of([*first, *second], lengths=False)
    if rows["baseline"].nunique() > 1:
        raise BadInput(f"the files have several baselines: {', '.join(sorted(rows['baseline'].unique()))}")
    table = _prompts_by_file(rows)
    sides = [range(len(first)), range(len(first), len(first) + len(second))]
    names = [", ".join(rows.loc[rows["file"].isin(side), "model"].unique()) for side in sides]
    a, b = (1 + table[list(side)].to_numpy().T for side in sides)
    return {"policy_a": names[0], "policy_b": names[1]} | compare_policies(a, b, confidence=CONFIDENCE)


def fit_files(
    files: Sequence[Path], out: Path, baseline: Path | None = None, penalty: float | None = None
) -> dict[str, Any]:
    """Write the difficulties that ``fit_difficulty`` finds, and return its diagnostics.

    Prompts are numbered by ``index``, or by their place in the ``baseline`` file. Raises BadInput, naming the file.
    """
    import pandas as pd

    from prefopt.evaluation.difficulty import fit_difficulty
    from prefopt.files import write_text

    if out.suffix != ".csv":
        raise BadInput(f"--out {out}: the table is written as .csv")
    parts = [_read(path, lengths=True, baseline=baseline) for path in files]
    for path, part in zip(files, parts, strict=True):
        if "index" not in part:
            raise BadInput(f"{path}: no prompt numbers; give --baseline, whose order numbers them")
    rows = pd.concat(parts, ignore_index=True)
    if rows["baseline"].nunique() > 1:
        raise BadInput(f"the files have several baselines: {', '.join(sorted(rows['baseline'].unique()))}")
    fit = fit_difficulty(rows, C=penalty)
    write_text(out, fit.table().to_csv(index=False))
    return {"out": str(out)} | fit.diagnostics | {"models": fit.models}


def _read(path: Path, *, lengths: bool, baseline: Path | None = None) -> pd.DataFrame:
    """Rows of one file with ``model``, ``baseline``, ``preference``, and what else was asked for."""
    from prefopt.stages import annotated

    rows = annotated.as_numbers(annotated.table_of(path, "preference"), path, "preference")
    if "index" in rows:
        rows = annotated.numbered(rows, path)
    names = annotated.model_names(rows, path)
    if names is None:
        raise BadInput(f"{path}: neither 'generator_2' nor 'model' says whose answers these are")
    if lengths:
        rows = annotated.with_lengths(rows, path, None, "output_2", "len_model")
        rows = annotated.with_lengths(rows, path, baseline, "output_1", "len_baseline")
    return rows.assign(model=names.astype(str), baseline=rows.get("generator_1", "baseline"))


def _rows_of(files: Sequence[Path], *, lengths: bool) -> pd.DataFrame:
    """All files' rows with ``prompt``, ``p`` (the model's win probability) and ``file``, its place among the files."""
    import pandas as pd

    from prefopt.winrate import model_win_probability

    parts = [_read(path, lengths=lengths) for path in files]
    if len({"generator_1" in part for part in parts}) > 1:
        path = files[["generator_1" in part for part in parts].index(False)]
        raise BadInput(f"{path}: no 'generator_1', which the other files have; name the baseline there")
    key = next((name for name in ("instruction", "index") if all(name in part for part in parts)), None)
    if key is None:
        raise BadInput("no column 'instruction' or 'index' that is in every file; prompts cannot be told apart")
    for place, (path, part) in enumerate(zip(files, parts, strict=True)):
        try:
            p = model_win_probability(part["preference"])
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        parts[place] = part.assign(prompt=part[key], p=p, file=place)
    return pd.concat(parts, ignore_index=True)


def _prompts_by_file(rows: pd.DataFrame) -> pd.DataFrame:
    """p [prompts, files]; NaN where a file lacks the prompt or its preference."""
    if (twice := rows.duplicated(["file", "model", "prompt"])).any():
        raise BadInput(f"prompt {str(rows['prompt'][twice].iloc[0])[:60]!r} is in one file twice; keep one row")
    if (several := rows.groupby("file")["model"].nunique()).max() > 1:
        raise BadInput(f"one file has {several.max()} models; give one file per policy and seed")
    return rows.pivot(index="prompt", columns="file", values="p")


def _ranking_json(ranking: Ranking, method: str, missing: int) -> dict[str, Any]:
    from prefopt.evaluation.bradley_terry import elo

    count = len(ranking.models)
    limits = ranking.intervals(method, CONFIDENCE)
    wins = ranking.win_probabilities()
    models = [
        {
            "model": name,
            "strength": float(ranking.strength[i]),
            "low": float(limits[i, 0]),
            "high": float(limits[i, 1]),
            "elo": float(elo(ranking.strength[i])),
            "elo_low": float(elo(limits[i, 0])),
            "elo_high": float(elo(limits[i, 1])),
            "n_comparisons": int(ranking.comparisons[i]),
            "wins_against": dict(zip(ranking.models, map(float, wins[i]), strict=True)),
        }
        for i, name in enumerate(ranking.models)
    ]
    style = {
        name: {"coefficient": value, "low": float(limits[count + i, 0]), "high": float(limits[count + i, 1])}
        for i, (name, value) in enumerate(ranking.style.items())
    }
    return {
        "models": models,
        "style": style,
        "interval": f"{100 * CONFIDENCE:g} % {method}, prompts as clusters",
        "ties": "half a win for each side",
        "n_missing": missing,
        "resamples_left_out": ranking.left_out,
    }


def _show(result: dict[str, Any], as_json: bool, text: Any) -> None:
    print(json.dumps(_without_nan(result), ensure_ascii=False, allow_nan=False) if as_json else text(result))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ranking_text(result: dict[str, Any]) -> str:
    width = max(len(row["model"]) for row in result["models"])
    lines = [f"{'model':{width}}  strength  {'95 % interval':18}   Elo  {'95 % interval':14}  comparisons"]
    for row in result["models"]:
        lines.append(
            f"{row['model']:{width}}  {row['strength']:8.3f}  {row['low']:8.3f} to {row['high']:6.3f}"
            f"  {row['elo']:5.0f}  {row['elo_low']:5.0f} to {row['elo_high']:5.0f}  {row['n_comparisons']:11}"
        )
    for name, fitted in result["style"].items():
        lines.append(f"style {name}: {fitted['coefficient']:.3f} ({fitted['low']:.3f} to {fitted['high']:.3f})")
    return "\n".join([*lines, f"{result['interval']}; a tie is {result['ties']}; {result['n_missing']} missing"])


def _lines(result: dict[str, Any]) -> str:
    return "\n".join(f"{name:17} {value}" for name, value in result.items())
