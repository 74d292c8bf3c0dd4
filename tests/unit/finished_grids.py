"""Finished grid items with made-up numbers below real artifacts: their pairs, and a trial of every point and seed."""

from __future__ import annotations

import pandas as pd

import finished_results
from prefopt.files import write_json, write_text
from prefopt.tables import write_table


def grid_item(results, content):
    """A finished grid item: its pairs, a trial of the reference and of every point with each seed, and its table."""
    make = finished_results.make
    prompts = [[{"role": "user", "content": f"say {k} {finished_results.HOSTILE}"}] for k in range(5)]
    table = pd.DataFrame({"prompt_id": range(5), "prompt": prompts})
    pairs = make(
        results, "pairs", "grid", {}, {}, lambda w: write_table(w / "pairs.parquet", table), pairs=5, refused={}
    )
    runs = {f"reference.{seed}": ("reference", seed) for seed in content["seeds"]}
    for number, point in enumerate(content["points"]):
        point["runs"] = {str(seed): f"trials/run-{number}-{seed}" for seed in content["seeds"]}
        runs |= {
            f"run.{number}.{seed}": (f"{point['arm']} {point['settings']['beta']}", seed) for seed in content["seeds"]
        }
    parents = {role: trial(results, role, of, seed, pairs) for role, (of, seed) in runs.items()}

    def fill(work):
        write_json(work / "item.json", content)
        write_text(work / "table.csv", "condition\n")

    spec = {"item": {key: content[key] for key in ("paper", "name")}, "layout": content["layout"]}
    stage = f"papers/{content['paper']}"
    return make(results, stage, content["name"], spec, parents | {"pairs": pairs}, fill, verdict=content["verdict"])


def trial(results, role, of, seed, pairs):
    def fill(work):
        rows = [
            {
                "set": "test",
                "step": step,
                "draw": draw,
                "prompt_id": k,
                "score": k / 4,
                "text": f"{of} at {step} to {k}",
            }
            for step in (0, 10)
            for draw in (0, 1)
            for k in range(5)
        ]
        write_table(work / "answers.parquet", pd.DataFrame(rows))

    return finished_results.make(
        results, "trials", "run", {"role": role, "seed": seed}, {"set.test.pairs": pairs}, fill, steps=10
    )
