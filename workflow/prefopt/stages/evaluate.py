"""Evaluation: answers to the test prompts, judgements in both orders, win rates. Files are AlpacaEval's own formats."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.artifacts import Build, join_one_to_one, read_json, read_table, write_json, write_table
from prefopt.judging import ScalarJudge, judge_both_orders
from prefopt.specs import SamplingSpec
from prefopt.stages import RunOptions
from prefopt.stages.common import device_of, token_rows, tokenizer_for, weights_of

log = logging.getLogger(__name__)


def instruction_text(prompt: Sequence[dict[str, str]]) -> str:
    """A prompt as one string: the bare text of a single message, else one labelled paragraph per turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def generate(build: Build, options: RunOptions) -> None:
    """Write outputs.json (AlpacaEval's model_outputs) and responses.parquet with the token ids."""
    import pandas as pd

    from prefopt.generation import generate as sample
    from prefopt.models import load_causal_lm
    from prefopt.tokens import response_text

    spec = build.node.spec
    rows = token_rows(build.parent("tokens"), "test").drop_duplicates("prompt_id").sort_values("prompt_id")
    rows = rows.head(spec["prompts"]).reset_index(drop=True)
    pairs = read_table(build.parent("pairs") / "pairs.parquet").drop_duplicates("prompt_id").set_index("prompt_id")
    folder, trusted = weights_of(build.parent("model"))
    model = load_causal_lm(folder, device=device_of(build, options), trust_remote_code=trusted)
    tokenizer = tokenizer_for(build, folder, trusted)
    drawn = sample(model, tokenizer, rows["prompt_ids"].tolist(), SamplingSpec.model_validate(dict(spec["sampling"])))
    generator = build.node.parents["model"].rsplit("/", 1)[-1]
    outputs = [
        {
            "instruction": instruction_text(pairs.loc[prompt_id, "prompt"]),
            "output": response_text(tokenizer, ids),
            "generator": generator,
            "prompt_id": int(prompt_id),
        }
        for prompt_id, ids in zip(rows["prompt_id"], drawn.response_ids, strict=True)
    ]
    write_json(build.work / "outputs.json", outputs)
    table = pd.DataFrame(
        {
            "prompt_id": rows["prompt_id"],
            "prompt_ids": rows["prompt_ids"],
            "response_ids": drawn.response_ids,
            "tokens": [len(ids) for ids in drawn.response_ids],
            "ended": drawn.ended,
        }
    )
    write_table(build.work / "responses.parquet", table)
    build.summary |= {
        "prompts": len(table),
        "mean_tokens": round(float(table["tokens"].mean()), 3),
        "ended": round(float(table["ended"].mean()), 6),
    }


def _judge(build: Build, options: RunOptions) -> ScalarJudge:
    if build.node.spec["judge"] == "oracle":
        from prefopt.world import oracle_reward

        def oracle(prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
            return np.array([oracle_reward(p["text"], r["text"]) for p, r in zip(prompts, responses, strict=True)])

        return ScalarJudge(oracle, soft=False)
    from prefopt.bulk import reward_responses
    from prefopt.models import load_reward_model

    models = []
    for folder in build.parents_like("judge").values():
        weights, trusted = weights_of(folder)
        models.append(load_reward_model(weights, device=device_of(build, options), trust_remote_code=trusted))

    def reward(prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
        ids = [p["ids"] for p in prompts], [r["ids"] for r in responses]
        return np.mean([reward_responses(m, *ids, batch_size=options.micro_batch) for m in models], axis=0)

    return ScalarJudge(reward, soft=True)


def judge(build: Build, options: RunOptions) -> None:
    """Write annotations.json (AlpacaEval's records, one per prompt) and judgements.parquet with both orders."""
    import pandas as pd

    from prefopt.winrate import combine_orders

    pairs = read_table(build.parent("pairs") / "pairs.parquet").drop_duplicates("prompt_id").set_index("prompt_id")
    sides = {role: _responses(build, role) for role in ("generations", "baseline")}
    if list(sides["generations"]["prompt_id"]) != list(sides["baseline"]["prompt_id"]):
        sides["baseline"] = _aligned(sides["generations"], sides["baseline"])
    model, baseline = (sides[role].to_dict("records") for role in ("generations", "baseline"))
    prompts = [
        {"text": instruction_text(pairs.loc[row["prompt_id"], "prompt"]), "ids": row["prompt_ids"]} for row in model
    ]
    judge_with = _judge(build, options)
    orders = judge_both_orders(judge_with, prompts, model, baseline)
    # a probability of winning is averaged over the orders, a verdict follows the two-order rule
    outcome = combine_orders(
        orders["baseline_first"], orders["model_first"], rule="mean" if judge_with.soft else "two_order"
    )
    rewards = {
        f"reward_{name}": judge_with.score(prompts, rows) for name, rows in (("model", model), ("baseline", baseline))
    }
    annotator = build.node.spec["judge"]
    annotations = [
        {
            "instruction": prompt["text"],
            "output_1": base["text"],
            "generator_1": base["generator"],
            "output_2": mine["text"],
            "generator_2": mine["generator"],
            "annotator": annotator,
            "preference": round(float(preference), 10),
        }
        for prompt, base, mine, preference in zip(prompts, baseline, model, outcome, strict=True)
    ]
    write_json(build.work / "annotations.json", annotations)
    table = pd.DataFrame(
        {
            "prompt_id": [row["prompt_id"] for row in model],
            **orders,
            "preference": outcome,
            **rewards,
            "tokens_model": [len(row["ids"]) for row in model],
            "tokens_baseline": [len(row["ids"]) for row in baseline],
        }
    )
    write_table(build.work / "judgements.parquet", table)
    build.summary |= {"prompts": len(table), "judge": annotator}


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
    """Write metrics.json with 95 % intervals over prompts, and prompts.parquet for paired comparisons."""
    from prefopt import winrate

    table = read_table(build.parent("judgements") / "judgements.parquet")
    outcome = table["preference"].to_numpy()
    advantage = (table["reward_model"] - table["reward_baseline"]).to_numpy()
    metrics = winrate.win_rate(outcome)
    metrics |= {
        "win_rate_interval": [100 * bound for bound in winrate.bootstrap_interval(outcome - 1.0)],
        "reward_advantage": float(advantage.mean()),
        "reward_advantage_interval": list(winrate.bootstrap_interval(advantage)),
        "avg_tokens": float(table["tokens_model"].mean()),
        "avg_tokens_baseline": float(table["tokens_baseline"].mean()),
        "order_disagreement": float(((table["baseline_first"] > 1.5) != (table["model_first"] > 1.5)).mean()),
    }
    metrics = {name: _without_nan(value) for name, value in metrics.items()}
    write_json(build.work / "metrics.json", metrics)
    table["outcome"] = outcome - 1.0
    keep = ["prompt_id", "outcome", "reward_model", "reward_baseline", "tokens_model", "tokens_baseline"]
    write_table(build.work / "prompts.parquet", table[keep])
    build.summary |= metrics
    log.info("win rate %.2f, reward advantage %.4f", metrics["win_rate"], metrics["reward_advantage"])
