"""The sentiment classifier that judges answers; no policy sees it or its texts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prefopt.errors import BadInput
from prefopt.stages import RunOptions
from prefopt.store.builds import Build
from prefopt.tables import read_table

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.evaluation.sentiment import Classifier

log = logging.getLogger(__name__)


def train_classifier(build: Build, options: RunOptions) -> None:
    """Write classifier.json, fitted on a split: its chosen responses are the positive texts, its rejected the negative.

    Raises BadInput where the split is empty.
    """
    from prefopt.evaluation.sentiment import fit_classifier

    split = build.node.spec["split"]
    pairs = read_table(build.parent("pairs") / "pairs.parquet")
    rows = pairs[pairs["split"] == split]
    if rows.empty:
        raise BadInput(f"{build.parent('pairs')}: no pair in the split '{split}'; give it a share, or more data")
    classifier = fit_classifier(rows["chosen"].tolist(), rows["rejected"].tolist())
    classifier.save(build.work)
    build.summary |= {"pairs": len(rows), "words": len(classifier.vocabulary)}
    held_out = pairs[pairs["split"] == "test"]
    if split != "test" and len(held_out):
        build.summary |= held_out_accuracy(classifier, held_out)
    log.info("classifier of %(words)d words from %(pairs)d pairs", build.summary)


def held_out_accuracy(classifier: Classifier, pairs: pd.DataFrame) -> dict[str, float]:
    """``held_out_accuracy``: share of texts on their side of 1/2; ``held_out_order``: share of pairs in their order."""
    chosen, rejected = (classifier.positive(pairs[side].tolist()) for side in ("chosen", "rejected"))
    right = ((chosen > 0.5).mean() + (rejected < 0.5).mean()) / 2
    return {
        "held_out_accuracy": round(float(right), 6),
        "held_out_order": round(float((chosen > rejected).mean()), 6),
    }
