"""Evaluation: answers to the test prompts, judgements in both orders, win rates. Files are AlpacaEval's own formats."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.digests import file_sha256
from prefopt.errors import BadInput, FailedCheck
from prefopt.files import read_json, write_json
from prefopt.judging import BothOrders, judge_both_orders
from prefopt.specs import SamplingSpec
from prefopt.stages import RunOptions
from prefopt.stages.judges import judge_of
from prefopt.stages.leakage import check_unseen, check_unseen_texts
from prefopt.stages.tables import prompt_origins, prompt_rows, prompt_texts
from prefopt.stages.weights import answerer_of
from prefopt.store.builds import Build
from prefopt.tables import join_one_to_one, read_table, write_table

log = logging.getLogger(__name__)


def generate(build: Build, options: RunOptions) -> None:
    """Write outputs.json (AlpacaEval's model_outputs) and responses.parquet with the token ids."""
    import pandas as pd

    from prefopt.engine.answers import draw_answers

    spec = build.node.spec
    rows = prompt_rows(build.parent("tokens"), "test", spec["prompts"])
    check_unseen(build, ["model"], rows["prompt_id"])
    check_unseen_texts(build, "model", "pairs")
    prompts = prompt_texts(build.parent("pairs"), rows["prompt_id"], "test")
    origins = prompt_origins(build.parent("pairs"), rows["prompt_id"])
    model, tokenizer = answerer_of(build, options)
    sampling = SamplingSpec.model_validate(dict(spec["sampling"]))
    kept = build.scratch / "responses"
    answers = draw_answers(model, tokenizer, rows["prompt_ids"].tolist(), sampling, state=kept)
    generator = build.node.parents["model"].rsplit("/", 1)[-1]
    outputs = [
        {
            "instruction": prompt,
            "output": answer["text"],
            "generator": generator,
            "prompt_id": int(prompt_id),
            **origin,
        }
        for prompt_id, prompt, origin, answer in zip(rows["prompt_id"], prompts, origins, answers, strict=True)
    ]
    write_json(build.work / "outputs.json", outputs)
    table = pd.DataFrame(
        {
            "prompt_id": rows["prompt_id"],
            "prompt_ids": rows["prompt_ids"],
            "response_ids": [answer["ids"] for answer in answers],
            "tokens": [len(answer["ids"]) for answer in answers],
            "ended": [answer["ended"] for answer in answers],
        }
    )
    write_table(build.work / "responses.parquet", table)
    build.summary |= {
        "prompts": len(table),
        "mean_tokens": round(float(table["tokens"].mean()), 3),
        "ended": round(float(table["ended"].mean()), 6),
    }


def judge(build: Build, options: RunOptions) -> None:
    """Write annotations.json (AlpacaEval's records, one per prompt) and judgements.parquet with both orders."""
    import pandas as pd

    from prefopt.winrate import combine_orders

    model, baseline = _sides(build)
    asked = [row["prompt_id"] for row in model]
    texts, origins = prompt_texts(build.parent("pairs"), asked), prompt_origins(build.parent("pairs"), asked)
    prompts = [{"text": text, "ids": row["prompt_ids"]} for text, row in zip(texts, model, strict=True)]
    with judge_of(build, options) as judge_with:
        orders = judge_both_orders(judge_with.judge, prompts, model, baseline, max_unparsable=judge_with.max_unparsable)
        # a probability of winning is averaged over the orders, a verdict follows the two-order rule
        outcome = combine_orders(
            orders.baseline_first, orders.model_first, rule="mean" if judge_with.soft else "two_order"
        )
        rewards = {}
        if (score := judge_with.score) is not None:
            rewards = {"reward_model": score(prompts, model), "reward_baseline": score(prompts, baseline)}
        report = judge_with.report(orders)
    records = map(partial(_annotation, judge_with.name), texts, baseline, model, outcome)
    annotations = [record | origin for record, origin in zip(records, origins, strict=True)]
    write_json(build.work / "annotations.json", annotations)
    table = pd.DataFrame(
        {
            "prompt_id": [row["prompt_id"] for row in model],
            "baseline_first": orders.baseline_first,
            "model_first": orders.model_first,
            **{f"raw_{order}": said for order, said in orders.raw.items()},
            "preference": outcome,
            **rewards,
            "tokens_model": [len(row["ids"]) for row in model],
            "tokens_baseline": [len(row["ids"]) for row in baseline],
        }
    )
    write_table(build.work / "judgements.parquet", table)
    build.summary |= {"prompts": len(table), "judge": judge_with.name, **report}


def _annotation(
    annotator: str, text: str, base: Mapping[str, Any], mine: Mapping[str, Any], preference: float
) -> dict[str, Any]:
    """AlpacaEval's record of one prompt; a preference without a usable judgement is null."""
    return {
        "instruction": text,
        "output_1": base["text"],
        "generator_1": base["generator"],
        "output_2": mine["text"],
        "generator_2": mine["generator"],
        "annotator": annotator,
        "preference": None if math.isnan(preference) else round(float(preference), 10),
    }


def _sides(build: Build) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The model's answers and the baseline's to the same prompts, in the model's order."""
    model, baseline = _responses(build, "generations"), _responses(build, "baseline")
    if list(model["prompt_id"]) != list(baseline["prompt_id"]):
        baseline = _aligned(build, model, baseline)
    return model.to_dict("records"), baseline.to_dict("records")


def _responses(build: Build, role: str) -> Any:
    """Token ids and texts of one side, joined on the prompt."""
    folder = build.parent(role)
    table = read_table(folder / "responses.parquet")
    table["ids"] = [ids.tolist() for ids in table.pop("response_ids")]
    table["prompt_ids"] = [ids.tolist() for ids in table["prompt_ids"]]
    outputs = {record["prompt_id"]: record for record in read_json(folder / "outputs.json")}
    table["text"] = [outputs[prompt_id]["output"] for prompt_id in table["prompt_id"]]
    table["generator"] = [outputs[prompt_id]["generator"] for prompt_id in table["prompt_id"]]
    return table


def _aligned(build: Build, model: Any, baseline: Any) -> Any:
    """The baseline's rows in the model's order; BadInput where it did not answer one of the model's prompts."""
    missing = model.loc[~model["prompt_id"].isin(baseline["prompt_id"]), "prompt_id"]
    if len(missing):
        (first,) = prompt_texts(build.parent("pairs"), missing.tolist()[:1])
        raise BadInput(
            f"{build.node.parents['baseline']}: no answer to {len(missing)} of {len(model)} prompts, first "
            f"{first[:60]!r}; baseline and model must answer the same prompts"
        )
    return join_one_to_one(model[["prompt_id"]], baseline, "baseline answers", on="prompt_id")


def _without_nan(value: Any) -> Any:
    """None for what a single prompt cannot have, such as a standard error: JSON has no NaN."""
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def win_rate(build: Build, options: RunOptions) -> None:
    """Write metrics.json with 95 % intervals over prompts, and prompts.parquet for paired comparisons.

    Rewards and their advantage are there for judges that score every answer alone. A prompt without a usable judgement
    counts in ``n_missing`` and is in no average.
    """
    from prefopt import winrate

    table = read_table(build.parent("judgements") / "judgements.parquet")
    outcome = table["preference"].to_numpy()
    rewards = [name for name in ("reward_model", "reward_baseline") if name in table]
    judged = table.dropna(subset=["baseline_first", "model_first"])
    metrics: dict[str, Any] = {**winrate.win_rate(outcome)}
    metrics |= {
        "win_rate_interval": [100 * bound for bound in winrate.bootstrap_interval(judged["preference"] - 1.0)],
        **(_reward_advantage(table) if rewards else {}),
        "avg_tokens": float(table["tokens_model"].mean()),
        "avg_tokens_baseline": float(table["tokens_baseline"].mean()),
        "order_disagreement": float(((judged["baseline_first"] > 1.5) != (judged["model_first"] > 1.5)).mean()),
    }
    if said := {order: table[f"raw_{order}"] for order in ("baseline_first", "model_first") if f"raw_{order}" in table}:
        straight, swapped = (table[order].to_numpy() for order in ("baseline_first", "model_first"))
        metrics |= BothOrders(straight, swapped, said).order_effects()
    controlled = []
    if "length_control" in build.node.spec:
        found, table["length_controlled"] = _length_controlled(build, len(table))
        metrics |= found
        controlled = ["length_controlled"]
    metrics = {name: _without_nan(value) for name, value in metrics.items()}
    write_json(build.work / "metrics.json", metrics)
    table["outcome"] = outcome - 1.0
    keep = ["prompt_id", "outcome", *controlled, *rewards, "tokens_model", "tokens_baseline"]
    write_table(build.work / "prompts.parquet", table.loc[judged.index, keep])
    build.summary |= metrics
    log.info("win rate %.2f over %d prompts, %d missing", *(metrics[k] for k in ("win_rate", "n_total", "n_missing")))


def _length_controlled(build: Build, rows: int) -> tuple[dict[str, Any], Any]:
    """The length-controlled metrics of the annotations, and a value per prompt, in the judgements' order."""
    import pandas as pd

    from prefopt.evaluation.lc_values import prompt_values
    from prefopt.evaluation.length_control import comparison_of
    from prefopt.stages.annotated import difficulties_of, gamed_of
    from prefopt.winrate import length_controlled_win_rate, model_win_probability

    records = read_json(build.parent("judgements") / "annotations.json")
    if len(records) != rows:
        raise FailedCheck(f"{build.parent('judgements')}: {len(records)} annotations of {rows} judgements")
    table = pd.DataFrame(
        {
            "preference": [math.nan if r["preference"] is None else r["preference"] for r in records],
            "len_model": [len(r["output_2"]) for r in records],
            "len_baseline": [len(r["output_1"]) for r in records],
            "index": [r.get("index", row) for row, r in enumerate(records)],
        }
    )
    paths = {role: _pinned(build, role) for role in ("difficulty", "gamed")}
    inputs: dict[str, Any] = {
        "difficulty": None if paths["difficulty"] is None else difficulties_of(paths["difficulty"]),
        "gamed": None if paths["gamed"] is None else gamed_of(paths["gamed"]),
    }
    found = length_controlled_win_rate(table, **inputs)
    compared = comparison_of(
        model_win_probability(table["preference"]), table, inputs["difficulty"], inputs["gamed"], False
    )
    values = prompt_values(compared, list(found["weights"].values()))
    kept = ("length_controlled_win_rate", "lc_standard_error", "avg_length", "variant", "C", "weights")
    return {name: found[name] for name in kept}, values


def _pinned(build: Build, role: str) -> Path | None:
    """The planned file of length control, or None; BadInput where it is not what was planned."""
    planned = build.node.spec["length_control"][role]
    if planned is None:
        return None
    path = Path(build.node.execution[role])
    if not path.is_file() or (found := file_sha256(path)) != planned["sha256"]:
        said = f"sha256 is {found}, planned was {planned['sha256']}" if path.is_file() else "no such file"
        raise BadInput(f"{path}: {said}; restore the file, or plan again")
    return path


def _reward_advantage(table: Any) -> dict[str, Any]:
    from prefopt import winrate

    advantage = (table["reward_model"] - table["reward_baseline"]).to_numpy()
    interval = list(winrate.bootstrap_interval(advantage))
    return {"reward_advantage": float(advantage.mean()), "reward_advantage_interval": interval}
