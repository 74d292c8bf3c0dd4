"""EM over annotator types: who is of which type, and the mixture of the types' policies."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import numpy as np

from prefopt.artifacts import outputs_digest
from prefopt.errors import BadInput
from prefopt.files import read_json, write_json
from prefopt.stages import RunOptions
from prefopt.stages.tables import token_rows
from prefopt.stages.weights import MIXTURE, policy_of
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

    from prefopt.outer.annotator_types import Types

log = logging.getLogger(__name__)

_SIGNS = {"chosen": 1.0, "rejected": -1.0}  # a tie says nothing about a type


def assign_types(build: Build, options: RunOptions) -> None:
    """Write responsibilities.parquet, a row per annotator, and weights.parquet, a row per train pair, lists over types.

    ``agreeing`` and ``opposing`` of a pair are the responsibilities summed over who voted for its chosen and for its
    rejected response. types.json has the new prior.
    """
    import pandas as pd

    rows = token_rows(build.parent("tokens"), "train", ("pair_id", "split"))[["pair_id"]]
    votes = _votes(build, rows)
    names, annotator = np.unique(votes["annotator"].to_numpy(dtype=str), return_inverse=True)
    found = _types(build, rows, votes, annotator, len(names))
    weights = {side: np.zeros((len(rows), build.node.spec["types"])) for side in ("agreeing", "opposing")}
    for side, sign in zip(weights, (1.0, -1.0), strict=True):
        kept = (votes["sign"] == sign).to_numpy()
        np.add.at(weights[side], votes["row"].to_numpy()[kept], found.responsibility[annotator[kept]])
    listed = {"annotator": names, "votes": np.bincount(annotator), "responsibility": list(found.responsibility)}
    write_table(build.work / "responsibilities.parquet", pd.DataFrame(listed))
    write_table(build.work / "weights.parquet", rows.assign(**{side: list(w) for side, w in weights.items()}))
    write_json(build.work / "types.json", {"prior": found.prior.tolist()})
    sure = float(found.responsibility.max(axis=1).mean())
    build.summary |= {"annotators": len(names), "votes": len(votes), "mean_largest_responsibility": round(sure, 6)}
    build.summary |= {f"prior_{k}": round(float(share), 6) for k, share in enumerate(found.prior)}
    log.info("%d annotators, prior %s", len(names), found.prior.round(3).tolist())


def _votes(build: Build, rows: pd.DataFrame) -> pd.DataFrame:
    """Votes for a side on train pairs: row of the pair, annotator, sign +1 for chosen, -1 for rejected."""
    import pandas as pd

    path = build.parent("pairs") / "pairs.parquet"
    pairs = read_table(path)
    if "votes" not in pairs:
        raise BadInput(f"{path}: pairs without votes; declare a source of kind votes, or 'raters' in the demo world")
    cast = join_one_to_one(rows, pairs[["pair_id", "votes"]], str(path))["votes"]
    listed = [
        (row, vote["annotator"], _SIGNS[vote["vote"]])
        for row, text in enumerate(cast)
        for vote in json.loads(text)
        if vote["vote"] in _SIGNS
    ]
    if not listed:
        raise BadInput(f"{path}: nobody voted for a side of a train pair")
    return pd.DataFrame(listed, columns=["row", "annotator", "sign"])


def _types(build: Build, rows: pd.DataFrame, votes: pd.DataFrame, annotator: np.ndarray, count: int) -> Types:
    """Responsibilities [A, K] from the policies' margins on every vote, or drawn where there are no policies yet."""
    from prefopt.outer.annotator_types import Types, expectation

    spec = build.node.spec
    if not build.has_parent("before"):
        drawn = np.random.default_rng([spec["seed"], 11]).dirichlet(np.ones(spec["types"]), size=count)
        return Types(drawn, drawn.mean(axis=0))
    reference = _margins(build, "reference", rows)
    margins = np.stack([_margins(build, role, rows) - reference for role in build.parents_like("scores")])
    signed = margins[:, votes["row"]] * votes["sign"].to_numpy()
    prior = np.array(read_json(build.parent("before") / "types.json")["prior"])
    return expectation(signed, annotator, prior, spec["beta"])


def _margins(build: Build, role: str, rows: pd.DataFrame) -> np.ndarray:
    path = build.parent(role) / "scores.parquet"
    scores = read_table(path, ("pair_id", "chosen_logp", "rejected_logp"))
    table = join_one_to_one(rows, scores, str(path))
    return (table["chosen_logp"] - table["rejected_logp"]).to_numpy()


def mix_policies(build: Build, options: RunOptions) -> None:
    """Write mixture.json: policies, their weights, and the worth [K, J] of policy j to type k, nats times beta."""
    from prefopt.engine.bulk import score_responses
    from prefopt.outer.annotator_types import min_max_regret

    spec = build.node.spec
    roles = list(build.parents_like("policy"))
    models = [policy_of(build, options, role=role)[0] for role in roles]
    reference, _ = policy_of(build, options)
    worth = np.empty((len(roles), len(roles)))
    for j, folder in enumerate(build.parents_like("samples").values()):
        drawn = read_table(folder / "samples.parquet", ("prompt_ids", "response_ids"))
        ids = [[row.tolist() for row in drawn[name]] for name in ("prompt_ids", "response_ids")]
        logp = [score_responses(model, *ids, batch_size=options.micro_batch)["logp"] for model in (*models, reference)]
        worth[:, j] = [spec["beta"] * float((one - logp[-1]).mean()) for one in logp[:-1]]
    prior = np.array(read_json(build.parent("responsibilities") / "types.json")["prior"])
    weights = np.clip(min_max_regret(worth) if spec["rule"] == "min_max_regret" else prior, 0.0, None)
    weights = weights / weights.sum()
    policies = [
        {"policy": build.node.parents[role], "outputs": outputs_digest(build.parent(role)), "weight": float(weight)}
        for role, weight in zip(roles, weights, strict=True)
    ]
    regret = worth.max(axis=1) - worth @ weights
    write_json(build.work / MIXTURE, {"policies": policies, "worth": worth.tolist(), "regret": regret.tolist()})
    build.summary |= {f"weight_{k}": round(float(weight), 6) for k, weight in enumerate(weights)}
    build.summary |= {f"regret_{k}": round(float(value), 6) for k, value in enumerate(regret)}
