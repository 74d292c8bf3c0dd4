"""Win rates of published AlpacaEval models, computed here and as published, as a Markdown table.

    python benchmarks/leaderboard.py --data ../shared/data/alpaca_eval

The folder is not part of the project. It holds annotations.csv.gz and annotations_ae1.csv.gz, leaderboard.csv and
leaderboard_ae1.csv with the published figures and the penalty C of each published fit, instruction_difficulty.csv, a
table of gamed rows and cv_folds.csv.gz with the folds of the published cross-validation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.winrate import length_controlled_interval, length_controlled_win_rate

BOARDS = {"AlpacaEval 2": "", "AlpacaEval 1": "_ae1"}
LC = "length_controlled_win_rate"
HEAD = ("model", "win rate", "LC published", "LC at its C", "difference", "own CV", "difference", "published folds",
        "95 % interval")  # fmt: skip


def table(folder: Path, resamples: int) -> str:
    """One row per model of both leaderboards, and the largest and median differences."""
    difficulty = pd.read_csv(folder / "instruction_difficulty.csv")["instruction_difficulty"].to_numpy()
    gamed = pd.read_csv(folder / "df_gamed_surrogate.csv")
    folds = pd.read_csv(folder / "cv_folds.csv.gz")
    lines = []
    for board, suffix in BOARDS.items():
        published = pd.read_csv(folder / f"leaderboard{suffix}.csv", index_col="model")
        rows = pd.read_csv(folder / f"annotations{suffix}.csv.gz")
        lines += [f"**{board}**", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        differences = []
        for name, part in rows.groupby("model", sort=False):
            figures = published.loc[name]
            # The published figures of files with missing rows look the difficulty up by row.
            options = {"difficulty": difficulty, "gamed": gamed, "by_position": len(part) < len(difficulty)}
            training_rows = len(gamed) + part["preference"].count()
            ours = _fits(part, figures["C_inferred"], folds[f"n{training_rows}"], resamples, options)
            truth = figures["length_controlled_winrate"]
            off = [ours[way] - truth for way in ("given", "own", "folds")]
            differences.append([abs(value) for value in off])
            lines.append(
                f"| {name} | {ours['win_rate']:.4f} | {truth:.4f} | {ours['given']:.4f} | {off[0]:+.4f} "
                f"| {ours['own']:.4f} | {off[1]:+.4f} | {off[2]:+.4f} | {ours['low']:.2f} to {ours['high']:.2f} |"
            )
        worst, middle = pd.DataFrame(differences).max(), pd.DataFrame(differences).median()
        for what, size in (("largest", worst), ("median", middle)):
            lines.append(f"| *{what} difference* | | | | {size[0]:.4f} | | {size[1]:.4f} | {size[2]:.4f} | |")
        lines.append("")
    return "\n".join(lines)


def _fits(part: Any, penalty: float, folds: Any, resamples: int, options: dict[str, Any]) -> dict[str, float]:
    given = length_controlled_win_rate(part, **options, C=penalty)
    own = length_controlled_win_rate(part, **options)
    shared = length_controlled_win_rate(part, **options, folds=folds)
    low, high = length_controlled_interval(part, **options, C=own["C"], resamples=resamples)
    rates = {"given": given[LC], "own": own[LC], "folds": shared[LC]}
    return rates | {"win_rate": given["win_rate"], "low": low, "high": high}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Published AlpacaEval win rates against ours, as a Markdown table.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/alpaca_eval"), help="default: %(default)s")
    parser.add_argument("--resamples", type=int, default=1000, help="of each interval's bootstrap")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"no folder {arguments.data}; name one with --data")
    print(table(arguments.data, arguments.resamples))
