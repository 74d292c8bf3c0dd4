"""A DPO run of this package on the pairs of ``gpu_shapes``; started by ``gpu_step``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from benchmarks.conditions import Found, serve
from benchmarks.gpu_shapes import SHAPES, Clock, equal_pairs, new_llama

from prefopt.engine.adapters import add_adapter
from prefopt.engine.bulk import score_responses
from prefopt.engine.precision import set_precision
from prefopt.specs import AdapterSpec, TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import rows_of_stream
from prefopt.training.policy_objective import PolicyObjective


def measure(  # noqa: PLR0917 - the conditions of a measurement
    shape: str,
    device: str,
    length: int,
    steps: int,
    warm_up: int,
    batch: int,
    micro: int,
    lora: int,
    checkpointing: bool,
    compiled: bool,
) -> Found:
    """Rates and memory of a bf16 run with cached reference scores, and the margins' gap to them before step 1."""
    size = steps * batch
    pairs = equal_pairs(size, length, SHAPES[shape]["vocabulary"])
    order = np.argsort(rows_of_stream(size, 0, 0, size))  # so that steps take the pairs in the order given
    rows = {name: [values[at] for at in order] for name, values in pairs.items()}
    policy = set_precision(new_llama(shape, device, length).eval(), "bf16")
    signals = {
        f"ref_{side}_logp": score_responses(policy, rows["prompt_ids"], rows[f"{side}_ids"], batch_size=micro)["logp"]
        for side in ("chosen", "rejected")
    }
    if lora:
        add_adapter(policy, AdapterSpec(kind="lora", rank=lora), seed=0)
    objective = PolicyObjective(**rows, pair_ids=range(size), loss="dpo", loss_params={"beta": 0.1}, signals=signals)
    gap = objective.check_start(policy, range(batch), float("inf"), micro)
    clock = Clock(device, warm_up)
    with tempfile.TemporaryDirectory() as folder:
        train(
            policy,
            objective,
            TrainSpec(steps=steps, batch_size=batch, learning_rate=1e-6, precision="bf16"),
            seed=0,
            state_dir=Path(folder),
            micro_batch=micro,
            checkpoint_steps=steps + 1,
            device=device,
            gradient_checkpointing=checkpointing,
            compile_layers=compiled,
            on_metrics=lambda _: clock.tick(),
            progress=False,
        )
    return {**clock.found(policy, pairs, batch, adapted=lora > 0), "step0_margin_gap": gap}


if __name__ == "__main__":
    serve(measure)
