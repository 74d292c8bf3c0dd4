"""A DPO run of this package on the pairs of ``gpu_shapes``; started by ``gpu_step``."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.conditions import Found, serve
from benchmarks.gpu_shapes import SHAPES, Clock, Conditions, equal_pairs, new_llama

from prefopt.engine.adapters import add_adapter
from prefopt.engine.bulk import score_responses
from prefopt.engine.precision import set_precision
from prefopt.specs import AdapterSpec, TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import rows_of_stream
from prefopt.training.policy_objective import PolicyObjective


def measure(**given: Any) -> Found:
    """Rates and memory of a bf16 run with cached reference scores, and the margins' gap to them before step 1."""
    on = Conditions(**given)
    size = on.steps * on.batch
    pairs = equal_pairs(size, on.length, SHAPES[on.shape]["vocabulary"])
    order = np.argsort(rows_of_stream(size, 0, 0, size))  # so that steps take the pairs in the order given
    rows = {name: [values[at] for at in order] for name, values in pairs.items()}
    policy = set_precision(new_llama(on.shape, on.device, on.length).eval(), "bf16")
    score = partial(score_responses, policy, rows["prompt_ids"], batch_size=on.micro)
    signals = {f"ref_{side}_logp": score(rows[f"{side}_ids"])["logp"] for side in ("chosen", "rejected")}
    if on.lora:
        add_adapter(policy, AdapterSpec(kind="lora", rank=on.lora), seed=0)
    objective = PolicyObjective(**rows, pair_ids=range(size), loss="dpo", loss_params={"beta": 0.1}, signals=signals)
    gap = objective.check_start(policy, range(on.batch), float("inf"), on.micro)
    clock = Clock(on.device, on.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        train(
            policy,
            objective,
            TrainSpec(steps=on.steps, batch_size=on.batch, learning_rate=1e-6, precision="bf16"),
            seed=0,
            state_dir=Path(folder),
            micro_batch=on.micro,
            checkpoint_steps=on.steps + 1,
            device=on.device,
            gradient_checkpointing=on.checkpointing,
            compile_layers=on.compiled,
            on_metrics=lambda _: clock.tick(),
            progress=False,
        )
    return {**clock.found(policy, pairs, on.batch, adapted=on.lora > 0), "step0_margin_gap": gap}


if __name__ == "__main__":
    serve(measure)
