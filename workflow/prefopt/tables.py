"""Parquet tables: written whole, read by columns and split, joined on keys and never on row order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import BadInput

_MANY = {"pair_id": "pairs", "prompt_id": "prompts"}


def write_table(path: Path, table: Any) -> None:
    """Write a pandas data frame as parquet, without its index, so that it appears whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    table.to_parquet(beside, index=False)
    os.replace(beside, path)


def read_table(path: Path, columns: Sequence[str] | None = None, split: str | None = None) -> Any:
    """Read a parquet table as a pandas data frame: all of it, or some columns, or the rows of one split."""
    import pandas as pd
    import pyarrow as pa

    kept = [("split", "==", split)] if split is not None else None
    try:
        return pd.read_parquet(path, columns=list(columns) if columns is not None else None, filters=kept)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except MemoryError:  # of the machine, and no finding about the file, though Arrow's is one of its own as well
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise BadInput(f"{path}: not the table that was written ({error}); remove the folder and run again") from None


def join_one_to_one(left: Any, right: Any, what: str, on: str = "pair_id") -> Any:
    """Join two tables on a key; every row of the left must be in both exactly once.

    Raises BadInput naming the first missing or repeated key: tables are never joined on row order.
    """
    for side in (left, right):
        repeated = side.loc[side[on].duplicated(), on]
        if len(repeated):
            raise BadInput(f"{what}: {on} {repeated.iloc[0]} stands in more than one row")
    missing = left.loc[~left[on].isin(right[on]), on]
    if len(missing):
        raise BadInput(f"{what}: no row for {on} {missing.iloc[0]} ({len(missing)} {_MANY.get(on, 'rows')} missing)")
    return left.merge(right, on=on, how="left", validate="one_to_one")
