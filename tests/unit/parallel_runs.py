"""Training runs that are the same work as one process and as several: under torchrun this file does them all.

``torchrun --nproc-per-node 2 parallel_runs.py FOLDER`` writes FOLDER/<name>.pt, the curve and the weights, and
FOLDER/stops.json, how runs that cannot go on ended in each process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import test_trainer
import tiny
from prefopt.engine.adapters import add_adapter
from prefopt.engine.reward_models import new_reward_model
from prefopt.errors import PrefoptError
from prefopt.models import save_model
from prefopt.processes import parallel
from prefopt.specs import AdapterSpec
from prefopt.training.heads import heads_on
from prefopt.training.objectives import RewardObjective, SftObjective

SPEC = test_trainer.SPEC.model_copy(update={"batch_size": 7, "steps": 8})  # two processes: 4 and 3 rows, in passes of 3
PAIRS = test_trainer.PAIRS
CUT_AT = 5


def policy(folder, name, **settings):
    """A run over policy gradients, reference samples and a schedule."""
    model = tiny.causal_lm()
    return test_trainer.run(folder / name, model, spec=SPEC, **settings)


def sft(folder, name, **settings):
    """A run whose batches are weighed by tokens."""
    objective = SftObjective(PAIRS["prompt_ids"], PAIRS["chosen_ids"])
    return test_trainer.run(folder / name, objective=objective, spec=SPEC, **settings)


def reward(folder, name, **settings):
    """A run with batches of one row, of which one of two processes has none."""
    base = folder / f"base-{name}"
    if parallel.is_main():
        save_model(tiny.causal_lm(), tiny.tokenizer(), base)
    parallel.barrier()
    spec = SPEC.model_copy(update={"batch_size": 1})
    return test_trainer.run(folder / name, new_reward_model(base, seed=3), RewardObjective(**PAIRS), spec, **settings)


def adapter(folder, name, **settings):
    """A run with a frozen body and a head of the loss's own, recomputing layers."""
    model = tiny.causal_lm()
    objective = test_trainer.policy_objective(tiny.causal_lm(seed=1))
    add_adapter(model, AdapterSpec(rank=2), seed=0)
    with heads_on(model, frozenset({"reward_head"})):
        return test_trainer.run(folder / name, model, objective, SPEC, gradient_checkpointing=True, **settings)


RUNS = {"policy": policy, "sft": sft, "reward": reward, "adapter": adapter}


def cut(metrics):
    """End the process's work as a kill would, with the checkpoint of an earlier step."""
    if metrics["step"] == CUT_AT:
        raise KeyboardInterrupt


def state_of(result):
    """What is compared: the curve, and weights by name."""
    model, trained = result
    return {"curve": trained.metrics, "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def _terminate_last(metrics):
    if metrics["step"] == CUT_AT and parallel.rank() == parallel.world() - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def _without_numbers(folder, name, **settings):
    objective = test_trainer.policy_objective(tiny.causal_lm(), regularised=False)
    objective.signals["ref_chosen_logp"] = [math.nan] * objective.size
    return test_trainer.run(folder / name, objective=objective, spec=SPEC, **settings)


def _indivisible(folder, name, **settings):
    objective = test_trainer.policy_objective(tiny.causal_lm())
    objective.divisible = False
    return test_trainer.run(folder / name, objective=objective, spec=SPEC, **settings)


def _end(run, folder, name, **settings):
    """How a run ended: an error's class and text, or an exit code."""
    try:
        run(folder, name, **settings)
    except PrefoptError as error:
        return [type(error).__name__, str(error)]
    except SystemExit as stop:
        return ["exit", stop.code]
    return ["done", None]


def _all(folder):
    ends = {}
    for sharding in ("none", "full"):
        found = {
            f"{name}-{sharding}": run(folder, f"{name}-{sharding}", sharding=sharding) for name, run in RUNS.items()
        }
        if parallel.is_main():
            shutil.copytree(folder / "one", folder / f"resumed-{sharding}")
        parallel.barrier()
        found[f"resumed-{sharding}"] = policy(folder, f"resumed-{sharding}", sharding=sharding)
        if parallel.is_main():
            for name, result in found.items():
                torch.save(state_of(result), folder / f"{name}.pt")
        for name, run, strike in (
            ("terminated", policy, _terminate_last),
            ("nan", _without_numbers, None),
            ("indivisible", _indivisible, None),
        ):
            of = f"{name}-{sharding}"
            ends[of] = _end(run, folder, of, sharding=sharding, on_metrics=strike)
    (folder / f"ends-{parallel.rank()}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    with parallel.started("these runs", several=True, device="cpu"):
        _all(Path(sys.argv[1]))
