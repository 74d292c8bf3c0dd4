"""Pairs whose chosen response is rewritten from the rejected one, so that the two differ where it matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefopt.errors import BadInput
from prefopt.pairs import digest63

if TYPE_CHECKING:
    import pandas as pd

Rewriter = Callable[[list[dict[str, str]], str, str], str | None]
"""(prompt messages, chosen, rejected) -> a new chosen response close to the rejected one, or None to keep the pair."""


def rewrite_chosen(pairs: pd.DataFrame, rewriter: Rewriter, *, split: str | None = "train") -> pd.DataFrame:
    """A pair table with the chosen responses of a split (None: of all) rewritten; everything else as it was.

    A rewritten pair has the pair_id of its new texts, and stays where it is in the table and in its split. Raises
    BadInput where a rewriter returns no text, or the rejected response itself.

    Source: 2408.07471, data synthesis; its rewriter is a large language model that edits the rejected response.
    """
    rows = pairs.copy()
    wanted = rows.index if split is None else rows.index[rows["split"] == split]
    for at in wanted:
        prompt, chosen, rejected = (_plain(rows.at[at, name]) for name in ("prompt", "chosen", "rejected"))
        text = rewriter(prompt, chosen, rejected)
        if text is None or text == chosen:
            continue
        if not isinstance(text, str) or not text.strip() or text.strip() == rejected.strip():
            raise BadInput(
                f"pair_id {rows.at[at, 'pair_id']}: the rewriter returned {text!r}, which is empty or the rejected "
                "response; return None to keep a pair as it is"
            )
        rows.at[at, "chosen"] = text
        rows.at[at, "pair_id"] = digest63([prompt, text, rejected])
    return rows


def _plain(value: Any) -> Any:
    """A prompt's messages as lists and dicts, whatever the table was read from."""
    return value if isinstance(value, str) else [dict(message) for message in value]
