"""Several annotators per pair: estimates of dispersion beside their votes, and policies against held-out votes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.files import read_json, write_json, write_text
from prefopt.stages import RunOptions
from prefopt.stages.common import run_training
from prefopt.stages.policy import policy_objective, policy_to_train
from prefopt.stages.tables import token_rows, votes_table
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from prefopt.annotators.held_out import Margins
    from prefopt.annotators.votes import RankedPrompt

log = logging.getLogger(__name__)

_VOTES = ("votes_chosen", "votes_rejected", "votes_tie")
_HELD_OUT = ("held_out_chosen", "held_out_rejected", "held_out_tie")


def _write_study(
    build: Build, values: Mapping[str, float], tables: Mapping[str, Any], figures: Mapping[str, str]
) -> None:
    """values.json, tables/<name>.csv and figures/<name>.svg, as an exact study's artifact has them."""
    write_json(build.work / "values.json", dict(values))
    for name, table in tables.items():
        write_text(build.work / "tables" / f"{name}.csv", table.to_csv(index=False))
    for name, svg in figures.items():
        write_text(build.work / "figures" / f"{name}.svg", svg)
    build.summary |= {"values": dict(values), "tables": list(tables), "figures": list(figures)}


# --- estimates beside people ----------------------------------------------------------------------------------------


def compare_disagreement(build: Build, options: RunOptions) -> None:
    """Write estimates/<data>.parquet (a row per test pair), values.json, comparison.json, tables and figures."""
    from prefopt.annotators import estimates, figures

    spec = build.node.spec
    results = {}
    for name in spec["annotated"]:
        table = _estimates(build, name)
        write_table(build.work / f"estimates-{name}.parquet", table)
        given = {key: table[key].to_numpy() for key in estimates.ESTIMATES if key in table}
        length_a, length_b = (table[f"{side}_tokens"].to_numpy() for side in ("chosen", "rejected"))
        counts, prompts = table[list(_VOTES)].to_numpy(), table["prompt_id"].to_numpy()
        how = {"resamples": spec["resamples"]}
        result = estimates.compare_with_people(given, counts, length_a, length_b, prompts, **how)
        every = given | estimates.length_estimates(length_a, length_b)
        ranked = _rankings(build, name)
        result["phi"] = estimates.compare_with_phi(every, prompts, ranked, resamples=spec["resamples"])
        results[name] = result
        log.info("%s: %d test pairs of %d prompts compared", name, result["pairs"], result["prompts"])
    write_json(build.work / "comparison.json", results)
    tables = {
        "estimates": estimates.rows_of(results, spec["annotated"]),
        "agreement": estimates.agreement_rows(results, spec["annotated"]),
    }
    drawn = {"correlations": figures.correlations_figure(results, spec["annotated"])}
    _write_study(build, estimates.flat_values(results), tables, drawn)


def _estimates(build: Build, name: str) -> pd.DataFrame:
    """Votes, lengths and all estimates that the plan wired, for the test pairs of one data set."""
    from prefopt.annotators.estimates import reward_estimates
    from prefopt.dispersion import normalised_entropy, sequence_entropy
    from prefopt.ensemble import reward_margins

    rows = token_rows(build.parent(f"tokens.{name}"), "test", ("pair_id", "prompt_id", "split"))[
        ["pair_id", "prompt_id"]
    ]
    table = join_one_to_one(rows, votes_table(build.parent(f"pairs.{name}"), rows["pair_id"]), "votes")
    folder = build.parent(f"reference.{name}")
    vocab_size = read_json(folder / "reference.json")["vocab_size"]
    columns = [f"{side}_{what}" for what in ("entropy", "tokens") for side in ("chosen", "rejected")]
    table = join_one_to_one(table, read_table(folder / "scores.parquet", ("pair_id", *columns)), str(folder))
    chosen, rejected, chosen_tokens, rejected_tokens = (table[c].to_numpy() for c in columns)
    table["token_entropy"] = normalised_entropy(chosen, rejected, chosen_tokens, rejected_tokens, vocab_size)
    if build.has_parent(f"samples.{name}"):
        drawn = read_table(build.parent(f"samples.{name}") / "samples.parquet")
        entropy = sequence_entropy(drawn["prompt_id"], drawn["ref_logp"], drawn["tokens"], vocab_size)
        table["sequence_entropy"] = table["prompt_id"].map(entropy)
    if build.has_parent(f"rewards.{name}"):
        path = build.parent(f"rewards.{name}") / "scores.parquet"
        scored = join_one_to_one(table[["pair_id"]], read_table(path), str(path))
        for key, values in reward_estimates(reward_margins(scored)).items():
            table[key] = values
    return table


def _rankings(build: Build, name: str) -> dict[int, RankedPrompt]:
    """Complete rankings among the votes of one data set, by prompt_id."""
    from prefopt.annotators.source import votes_of_table
    from prefopt.annotators.votes import rankings_in_pairs

    pairs = read_table(build.parent(f"pairs.{name}") / "pairs.parquet", split="test")
    return {int(one.prompt): one for one in rankings_in_pairs(votes_of_table(pairs))}


# --- policies against held-out votes --------------------------------------------------------------------------------


def run_vote_trial(build: Build, options: RunOptions) -> None:
    """Write margins.parquet: a policy trained with one loss, its margins over the reference on all pairs."""
    import pandas as pd

    from prefopt.engine.bulk import score_responses

    spec = build.node.spec
    model, _ = policy_to_train(build, options)
    objective = policy_objective(build, options, model)
    run_training(build, options, model, objective, spec["seed"])
    rows = token_rows(build.parent("tokens"))
    path = build.parent("reference") / "scores.parquet"
    table = join_one_to_one(
        rows[["pair_id", "prompt_id", "split"]],
        read_table(path, ("pair_id", "chosen_logp", "rejected_logp")),
        str(path),
    )
    sides = ("chosen", "rejected")
    asked = rows["prompt_ids"].tolist() * 2
    texts = list(zip(map(tuple, asked), map(tuple, [*rows["chosen_ids"], *rows["rejected_ids"]]), strict=True))
    once = list(dict.fromkeys(texts))  # a response stands in many pairs, and is scored once
    scores = score_responses(model, *zip(*once, strict=True), batch_size=options.micro_batch)["logp"]
    logp_of = dict(zip(once, scores, strict=True))
    logp = np.split(np.array([logp_of[text] for text in texts]), 2)
    margin = {side: policy - table[f"{side}_logp"] for side, policy in zip(sides, logp, strict=True)}
    table = pd.DataFrame(table[["pair_id", "prompt_id", "split"]]).assign(margin=margin["chosen"] - margin["rejected"])
    write_table(build.work / "margins.parquet", table)
    accuracy = (table["margin"] > 0).groupby(table["split"]).mean()
    build.summary["accuracy"] = {split: round(float(value), 6) for split, value in accuracy.items()}


def _margins(build: Build, role: str, shares: Mapping[str, pd.Series]) -> dict[str, Margins]:
    """A run's logits beside the shares of held-out votes: on the trained pairs (``seen``), and on new prompts.

    The trained pairs fall into two halves by their id, one of which takes the place of the validation split.
    """
    from prefopt.annotators.held_out import Margins

    folder = build.parent(role)
    table = read_table(folder / "margins.parquet")
    beta = read_json(folder / "manifest.json")["spec"]["loss"]["params"]["beta"]
    trained = (table["split"] == "train").to_numpy()
    found = {}
    for name, share in shares.items():
        part = table[trained if name == "seen" else ~trained]
        halves = np.where(part["pair_id"].to_numpy() % 2, "validation", "test")
        found[name] = Margins(
            logit=beta * part["margin"].to_numpy(),
            share=share.loc[part["pair_id"]].to_numpy(),
            prompt=part["prompt_id"].to_numpy(),
            split=halves if name == "seen" else part["split"].to_numpy(),
        )
    return found


def _shares(build: Build) -> dict[str, pd.Series]:
    """Shares of votes that no run has seen, by pair_id: those held out, and for new prompts all there are."""
    import pandas as pd

    from prefopt.annotators.agreement import vote_share

    ids = read_table(build.parent("pairs") / "pairs.parquet", ("pair_id",))["pair_id"]
    table = votes_table(build.parent("pairs"), ids)
    every = table[list(_VOTES)].to_numpy()
    if _HELD_OUT[0] not in table:
        return {"new": pd.Series(vote_share(every), index=ids.to_numpy())}
    unseen = table[list(_HELD_OUT)].to_numpy()
    return {
        "seen": pd.Series(vote_share(unseen), index=ids.to_numpy()),
        "new": pd.Series(vote_share(every + unseen), index=ids.to_numpy()),
    }


def compare_vote_trials(build: Build, options: RunOptions) -> None:
    """Write values.json, arms.json, tables and figures: every arm at its selected beta against held-out votes."""
    from prefopt.annotators import figures, held_out

    spec = build.node.spec
    shares = _shares(build)
    keys = [(number, seed) for number in range(len(spec["betas"])) for seed in spec["seeds"]]
    every = {
        (arm, *key): _margins(build, f"run.{arm}.{key[0]}.{key[1]}", shares) for arm in spec["arms"] for key in keys
    }
    results: dict[str, Any] = {}
    values: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    metrics = {spec["first_metric"]: held_out.METRICS[spec["first_metric"]]} | held_out.METRICS
    for name in shares:
        runs = {arm: {key: every[arm, *key][name] for key in keys} for arm in spec["arms"]}
        result = held_out.compare_arms(runs, spec["betas"], spec["seeds"], [tuple(pair) for pair in spec["contrasts"]])
        results[name] = result
        values |= {f"{name}.{key}": value for key, value in held_out.values_of(result).items()}
        tables |= {
            f"arms_{name}": held_out.arm_rows(result),
            f"betas_{name}": held_out.beta_rows(result, spec["betas"]),
        }
        tables[f"differences_{name}"] = held_out.difference_rows(result)
        chosen = {arm: spec["betas"].index(found["beta"]) for arm, found in result["arms"].items()}
        curves = {arm: held_out.reliability([runs[arm][chosen[arm], s] for s in spec["seeds"]]) for arm in runs}
        drawn[f"arms_{name}"] = figures.arms_figure(result["arms"], metrics)
        drawn[f"reliability_{name}"] = figures.reliability_figure(curves)
    write_json(build.work / "arms.json", results)
    _write_study(build, values, tables, drawn)
