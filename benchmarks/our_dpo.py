"""A DPO run of this package on the pairs of ``conditions``; started by ``dpo_step``."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.conditions import Found, Timer, matmul_rate, new_model, new_pairs, serve

from prefopt.engine.bulk import score_responses
from prefopt.engine.packed_attention import padded
from prefopt.engine.precision import set_precision
from prefopt.specs import TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import rows_of_stream
from prefopt.training.policy_objective import PolicyObjective


def measure(
    *,
    pairs: dict[str, Any],
    model: dict[str, Any],
    steps: int,
    warm_up: int,
    batch: int,
    precision: str,
    settings: dict[str, Any],
    padding: bool = False,
) -> Found:
    """Pairs per CPU second and peak memory of a run with cached reference scores; ``settings`` are of ``train``.

    padding: as for a model that cannot pack.
    """
    torch.set_num_threads(1)
    size = steps * batch
    given = new_pairs(size, vocabulary=model.get("vocabulary", 8192), **pairs)
    order = np.argsort(rows_of_stream(size, 0, 0, size))  # so that steps take the pairs in the order given
    rows = {name: [values[at] for at in order] for name, values in given.items()}
    policy = set_precision(new_model(**model).eval(), "fp32")
    signals = {
        f"ref_{side}_logp": score_responses(policy, rows["prompt_ids"], rows[f"{side}_ids"], batch_size=8)["logp"]
        for side in ("chosen", "rejected")
    }
    objective = PolicyObjective(**rows, pair_ids=range(size), loss="dpo", loss_params={"beta": 0.1}, signals=signals)
    timer = Timer(warm_up)
    with tempfile.TemporaryDirectory() as folder, padded(policy) if padding else nullcontext():
        train(
            policy,
            objective,
            TrainSpec(steps=steps, batch_size=batch, learning_rate=1e-6, precision=precision),
            seed=0,
            state_dir=Path(folder),
            micro_batch=batch,
            checkpoint_steps=steps + 1,
            device="cpu",
            on_metrics=lambda _: timer.tick(),
            progress=False,
            **settings,
        )
    found = timer.found(batch)
    floor = gflop_of(policy, given, slice(warm_up * batch, None))
    rate = matmul_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
    return found | {
        "gflop_floor": round(floor, 1),
        "matmul_gflop_per_s": round(rate, 1),
        "fraction_of_matmul_rate": round(floor / found["cpu_seconds"] / rate, 3),
    }


def gflop_of(model: torch.nn.Module, pairs: dict[str, list[list[int]]], part: slice) -> float:
    """6 N tokens: layers for every token, each prompt once; the head for response tokens."""
    prompt, chosen, rejected = (sum(map(len, rows[part])) for rows in pairs.values())
    layers = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    return 6 * (layers * (prompt + chosen + rejected) + head * (chosen + rejected)) / 1e9


if __name__ == "__main__":
    serve(measure)
