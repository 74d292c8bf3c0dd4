"""Tables of parents: token rows, prompts and votes, of pairs or of the prompt set in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.tables import join_one_to_one, read_table

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

PROMPTS = "prompts.parquet"  # of a prompt set, which stands where pairs and their tokens do
VOTE_SIDES = ("chosen", "rejected", "tie")


def token_rows(artifact: Path, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Token table of a tokens artifact, one split or all, with plain lists of ids.

    Raises BadInput where the split is empty.
    """
    table = read_table(_table(artifact, "tokens.parquet"), columns, split)
    if split is not None and table.empty:
        raise BadInput(f"{artifact}: no pair in the split '{split}'; give it a larger share or more data")
    for column in table.columns[table.columns.str.endswith("_ids")]:
        table[column] = [ids.tolist() for ids in table[column]]
    return table


def _table(artifact: Path, name: str) -> Path:
    """A table of pairs or tokens, or the one table of a prompt set in its place."""
    prompts = artifact / PROMPTS
    return prompts if prompts.is_file() else artifact / name


def prompt_rows(artifact: Path, split: str, count: int | None) -> pd.DataFrame:
    """The first ``count`` prompts of a split by prompt_id (None: all), each once: prompt_id, prompt_ids.

    ``artifact``: tokens, or a prompt set. Raises BadInput where the split is empty.
    """
    rows = token_rows(artifact, split, ("prompt_id", "prompt_ids")).drop_duplicates("prompt_id")
    return rows.sort_values("prompt_id").head(len(rows) if count is None else count).reset_index(drop=True)


def prompt_texts(artifact: Path, prompt_ids: Sequence[int], split: str | None = None) -> list[str]:
    """The prompts of pairs or a prompt set with these ids, in their order, each as one string; ``split``: only that."""
    from prefopt.engine.answers import instruction_text

    pairs = read_table(_table(artifact, "pairs.parquet"), ("prompt_id", "prompt"), split)
    prompts = pairs.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    return [instruction_text(prompts.loc[prompt_id]) for prompt_id in prompt_ids]


def prompt_origins(artifact: Path, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Of a prompt set: ``index`` and, where the source says one, ``dataset`` of each prompt; elsewhere nothing."""
    if not (artifact / PROMPTS).is_file():
        return [{} for _ in prompt_ids]
    table = read_table(artifact / PROMPTS, ("prompt_id", "index", "dataset")).set_index("prompt_id")
    rows = [table.loc[prompt_id] for prompt_id in prompt_ids]
    return [{"index": int(row["index"])} | ({"dataset": row["dataset"]} if row["dataset"] else {}) for row in rows]


def draw_keys(prompt_ids: pd.Series) -> list[str]:
    """prompt_id/draw of rows that have a prompt several times, draws counted from 0."""
    draws = prompt_ids.groupby(prompt_ids).cumcount()
    return [f"{prompt_id}/{draw}" for prompt_id, draw in zip(prompt_ids, draws, strict=True)]


def votes_table(artifact: Path, pair_ids: pd.Series) -> pd.DataFrame:
    """Votes on exactly these pairs of a pairs artifact, in their order: votes_chosen, votes_rejected, votes_tie.

    With votes held out also held_out_chosen and so on. Raises BadInput where the pairs have no votes.
    """
    table = read_table(artifact / "pairs.parquet")
    columns = [c for kind in ("votes", "held_out") for side in VOTE_SIDES if (c := f"{kind}_{side}") in table]
    if not columns:
        raise BadInput(
            f"{artifact / 'pairs.parquet'}: pairs without votes; declare the data with a source of kind votes, which "
            "keeps every annotator's vote"
        )
    return join_one_to_one(pair_ids.to_frame(), table[["pair_id", *columns]], str(artifact / "pairs.parquet"))


def vote_shares(artifact: Path, pair_ids: pd.Series) -> np.ndarray:
    """Share of votes for the chosen response of exactly these pairs, ties half [N]; BadInput as ``votes_table``."""
    from prefopt.annotators.agreement import vote_share

    return vote_share(votes_table(artifact, pair_ids)[[f"votes_{side}" for side in VOTE_SIDES]].to_numpy())
