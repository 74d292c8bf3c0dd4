"""Values of a table's rows, computed batch by batch: shared among a job's processes, kept on the way, merged by key.

Batches are the same whatever the number of processes, and one process computes a batch whole. So values are the same
bits as those of one process wherever a device repeats itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt import team
from prefopt.errors import BadInput, FailedCheck
from prefopt.processes.shares import shares
from prefopt.progress import Progress
from prefopt.tables import join_one_to_one, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

Batch = Sequence[int]
Column = np.ndarray | list[np.ndarray]
"""One number per row, or one array per row."""

KEY = "key"
_KEEP_SECONDS = 60.0


@dataclass(frozen=True)
class Kept:
    """Where finished rows of one pass are kept, and the rows' keys in the table's order.

    ``folder`` gives a folder for what the rows are made from and by, when it is needed.
    """

    root: Path
    folder: Callable[[], Path]
    keys: Sequence[Any]

    def rows(self) -> pd.DataFrame | None:
        """What any process of any run has kept; None where there is nothing."""
        import pandas as pd

        if not self.root.is_dir():
            return None
        tables = [read_table(path) for path in sorted(self.folder().glob("*.parquet"))]
        return pd.concat(tables, ignore_index=True) if tables else None

    def add(self, table: pd.DataFrame) -> None:
        """Keep rows that this process has finished, under a name that no other process takes."""
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob(f"{team.rank():04d}-*.parquet")))
        write_table(folder / f"{team.rank():04d}-{number:06d}.parquet", table)


def over_batches(
    compute: Callable[[Batch], Mapping[str, Column]],
    batches: Sequence[Batch],
    costs: Sequence[float],
    *,
    what: str,
    kept: Kept | None = None,
) -> dict[str, Column]:
    """Every column that ``compute`` gives for a batch's rows, over all rows in their order.

    ``batches`` have every row number once, ``costs`` are of rows. As one of several processes it computes its share of
    the batches, and all get all rows; that takes ``kept``, from which rows that are there are taken and not computed.
    Raises FailedCheck where the merged rows are not one to one with the table's, TryAgain after SIGTERM.
    """
    keys = range(sum(map(len, batches))) if kept is None else kept.keys
    there = _there(kept, keys)
    team.barrier()  # all have looked before anyone adds
    left = [part for batch in batches if (part := [row for row in batch if keys[row] not in there])]
    mine = shares([sum(costs[row] for row in batch) for batch in left], team.size())[team.rank()]
    found = _Found(keys)
    written, since = bool(there) or team.size() > 1, time.monotonic()
    try:
        with Progress(len(mine), what) as bar:
            for number in mine:
                team.check()
                if kept is not None and found.rows and time.monotonic() - since > _KEEP_SECONDS:
                    kept.add(found.taken())
                    written, since = True, time.monotonic()
                found.put(left[number], compute(left[number]))
                bar.advance()
    except BaseException:
        if kept is not None and found.rows:
            kept.add(found.taken())
        raise
    if not written:
        return _in_order(found.taken(), keys, what)
    if kept is None:
        raise ValueError("several processes need a folder to merge their rows from")
    if found.rows:
        kept.add(found.taken())
    team.barrier()
    return _in_order(kept.rows(), keys, what)


def _there(kept: Kept | None, keys: Sequence[Any]) -> set[Any]:
    """Keys of the rows that need not be computed."""
    table = kept.rows() if kept is not None else None
    there = set() if table is None else set(table[KEY].tolist())
    if kept is not None and (unknown := there.difference(keys)):
        raise FailedCheck(f"{kept.folder()}: rows of another table ({min(unknown)}); remove the folder and run again")
    return there


class _Found:
    """Rows that were computed and are not kept yet."""

    def __init__(self, keys: Sequence[Any]) -> None:
        self._keys = keys
        self.rows: list[int] = []
        self._values: dict[str, list[Any]] = {}

    def put(self, rows: Batch, values: Mapping[str, Column]) -> None:
        self.rows += rows
        for name, column in values.items():
            self._values.setdefault(name, []).append(column)

    def taken(self) -> pd.DataFrame:
        """All of them as a table, and none are left."""
        import pandas as pd

        columns: dict[str, Any] = {KEY: [self._keys[row] for row in self.rows]}
        for name, parts in self._values.items():
            ragged = isinstance(parts[0], list)
            columns[name] = [values for part in parts for values in part] if ragged else np.concatenate(parts)
        self.rows, self._values = [], {}
        return pd.DataFrame(columns)


def _in_order(table: pd.DataFrame | None, keys: Sequence[Any], what: str) -> dict[str, Column]:
    """The columns in the keys' order; FailedCheck where a key has no row or several."""
    import pandas as pd

    if table is None:
        raise FailedCheck(f"{what}: no rows were computed")
    try:
        joined = join_one_to_one(pd.DataFrame({KEY: list(keys)}), table, what, on=KEY).drop(columns=KEY)
    except BadInput as error:
        raise FailedCheck(f"{error}; remove the scratch folder of the artifact and run again") from None
    return {name: list(column) if column.dtype == object else column.to_numpy() for name, column in joined.items()}
