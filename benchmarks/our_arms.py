"""Several arms on one cached reference, or several reward models on the same pairs; started by ``growth``."""

from __future__ import annotations

import copy
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.conditions import Found, new_model, new_pairs, serve
from transformers import LlamaForSequenceClassification

from prefopt.engine.bulk import score_responses
from prefopt.specs import TrainSpec
from prefopt.trainer import train
from prefopt.training.objectives import Objective, RewardObjective
from prefopt.training.policy_objective import PolicyObjective


def measure(*, kind: str, count: int, steps: int, batch: int, precision: str) -> Found:
    """CPU seconds in all and of the reference pass, and peak memory of this process; kind: arms or members."""
    torch.set_num_threads(1)
    rows = new_pairs(steps * batch, seed=1)
    start = new_model().eval()
    began, reference = time.process_time(), 0.0
    if kind == "arms":
        signals = {
            f"ref_{side}_logp": score_responses(start, rows["prompt_ids"], rows[f"{side}_ids"], batch_size=8)["logp"]
            for side in ("chosen", "rejected")
        }
        reference = time.process_time() - began
    for number in range(count):
        if kind == "arms":
            model, params = copy.deepcopy(start), {"beta": 0.1 * (number + 1)}
            objective: Objective = PolicyObjective(
                **rows, pair_ids=range(steps * batch), loss="dpo", loss_params=params, signals=signals
            )
        else:
            start.config.num_labels = 1
            model, objective = LlamaForSequenceClassification(start.config).eval(), RewardObjective(**rows)
        with tempfile.TemporaryDirectory() as folder:
            train(
                model,
                objective,
                TrainSpec(steps=steps, batch_size=batch, learning_rate=1e-6, precision=precision),
                seed=number,
                state_dir=Path(folder),
                micro_batch=batch,
                checkpoint_steps=steps + 1,
                device="cpu",
                progress=False,
            )
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "cpu_seconds": round(time.process_time() - began, 2),
        "reference_cpu_seconds": round(reference, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6, 1),
    }


if __name__ == "__main__":
    serve(measure)
