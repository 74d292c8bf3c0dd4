"""Evaluation: answers to the test prompts, judgements in both orders, win rates. Files are AlpacaEval's own formats."""

from __future__ import annotations

import logging
import math
from typing import Any

from prefopt.artifacts import Build, join_one_to_one, read_json, read_table, write_json, write_table
from prefopt.judging import judge_both_orders
from prefopt.specs import SamplingSpec
from prefopt.stages import RunOptions
from prefopt.stages.common import policy_of, prompt_rows, prompt_texts
from prefopt.stages.judges import judge_of

log = logging.getLogger(__name__)


def generate(build: Build, options: RunOptions) -> None:
    """Write outputs.json (AlpacaEval's model_outputs) and responses.parquet with the token ids."""
    import pandas as pd

    from prefopt.answers import draw_answers

    spec = build.node.spec
    rows = prompt_rows(build.parent("tokens"), "test", spec["prompts"])
    prompts = prompt_texts(build.parent("pairs"), rows["prompt_id"], "test")
    model, tokenizer = policy_of(build, options)
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
        }
        for prompt_id, prompt, answer in zip(rows["prompt_id"], prompts, answers, strict=True)
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

    sides = {role: _responses(build, role) for role in ("generations", "baseline")}
    if list(sides["generations"]["prompt_id"]) != list(sides["baseline"]["prompt_id"]):
        sides["baseline"] = _aligned(sides["generations"], sides["baseline"])
    model, baseline = (sides[role].to_dict("records") for role in ("generations", "baseline"))
    texts = prompt_texts(build.parent("pairs"), [row["prompt_id"] for row in model])
    prompts = [{"text": text, "ids": row["prompt_ids"]} for text, row in zip(texts, model, strict=True)]
    with judge_of(build, options) as judge_with:
        orders = judge_both_orders(judge_with.judge, prompts, model, baseline, max_unparsable=judge_with.max_unparsable)
        # a probability of winning is averaged over the orders, a verdict follows the two-order rule
        rule = "mean" if judge_with.soft else "two_order"
        outcome = combine_orders(orders.baseline_first, orders.model_first, rule=rule)
        scores = {"model": model, "baseline": baseline} if judge_with.score is not None else {}
        rewards = {f"reward_{name}": judge_with.score(prompts, rows) for name, rows in scores.items()}
        took = judge_with.took()
    annotations = [
        {
            "instruction": prompt["text"],
            "output_1": base["text"],
            "generator_1": base["generator"],
            "output_2": mine["text"],
            "generator_2": mine["generator"],
            "annotator": judge_with.name,
            "preference": None if math.isnan(preference) else round(float(preference), 10),
        }
        for prompt, base, mine, preference in zip(prompts, baseline, model, outcome, strict=True)
    ]
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
    build.summary |= {"prompts": len(table), "judge": judge_with.name, **took}


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


def _aligned(model: Any, baseline: Any) -> Any:
    keyed = baseline.rename(columns={"prompt_id": "pair_id"})
    joined = join_one_to_one(model[["prompt_id"]].rename(columns={"prompt_id": "pair_id"}), keyed, "baseline answers")
    return joined.rename(columns={"pair_id": "prompt_id"})


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
    metrics = winrate.win_rate(outcome)
    metrics |= {
        "win_rate_interval": [100 * bound for bound in winrate.bootstrap_interval(judged["preference"] - 1.0)],
        **(_reward_advantage(table) if rewards else {}),
        "avg_tokens": float(table["tokens_model"].mean()),
        "avg_tokens_baseline": float(table["tokens_baseline"].mean()),
        "order_disagreement": float(((judged["baseline_first"] > 1.5) != (judged["model_first"] > 1.5)).mean()),
    }
    metrics = {name: _without_nan(value) for name, value in metrics.items()}
    write_json(build.work / "metrics.json", metrics)
    table["outcome"] = outcome - 1.0
    keep = ["prompt_id", "outcome", *rewards, "tokens_model", "tokens_baseline"]
    write_table(build.work / "prompts.parquet", table.loc[judged.index, keep])
    build.summary |= metrics
    log.info("win rate %.2f over %d prompts, %d missing", *(metrics[k] for k in ("win_rate", "n_total", "n_missing")))


def _reward_advantage(table: Any) -> dict[str, Any]:
    from prefopt import winrate

    advantage = (table["reward_model"] - table["reward_baseline"]).to_numpy()
    interval = list(winrate.bootstrap_interval(advantage))
    return {"reward_advantage": float(advantage.mean()), "reward_advantage_interval": interval}
